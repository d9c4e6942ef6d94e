"""Base models that are not what their folder says, or are stored otherwise than the run asks for.

Each is the embedded model, damaged. None may be trained: what is missing would be drawn at random,
and codes of a quantization would be taken for weights.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.bench import UNTRACKED, Bench, Injection
from faults.families.numbers import base_model
from faults.judge import Outcome, refused, survived

Weights = dict[str, Any]

NOT_DESCRIBED = "its weights are not those that its config.json describes"
STORED = "is quantized already, otherwise than asked for; use optimizer=qlora "
FILE = "model.safetensors"
# transformers loads on a meta device that holds for all threads of the process
ONE_AT_A_TIME = threading.Lock()


def set_config(folder: Path, **values: Any) -> None:
    """Change keys of `config.json`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def set_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Replace the weights by what a function makes of them."""
    from safetensors.torch import load_file, save_file

    changed = {
        name: weight.contiguous() for name, weight in change(load_file(folder / FILE)).items()
    }
    save_file(changed, folder / FILE, metadata={"format": "pt"})


def untie(folder: Path) -> None:
    """Give the model an output head of its own."""
    embeddings = "model.embed_tokens.weight"
    set_config(folder, tie_word_embeddings=False)
    set_weights(folder, lambda old: old | {"lm_head.weight": old[embeddings].clone()})


def no_head(folder: Path) -> None:
    """Say that there is an output head, where there is none."""
    set_config(folder, tie_word_embeddings=False)


def renamed(folder: Path) -> None:
    """Name every weight as inside an adapter."""
    set_weights(
        folder, lambda old: {f"base_model.model.{name}": weight for name, weight in old.items()}
    )


def num_layers(num: int) -> Callable[[Path], None]:
    """Say that there are so many layers; there are five."""
    return lambda folder: set_config(folder, num_hidden_layers=num)


def reward_model(folder: Path) -> None:
    """Put a score in the place of the output head."""
    import torch

    set_weights(folder, lambda old: old | {"score.weight": torch.ones(1, 128)})
    set_config(folder, architectures=["LlamaForSequenceClassification"])


def wider_vocabulary(folder: Path) -> None:
    """Say that there are 64 tokens more than there are rows."""
    set_config(folder, vocab_size=696 + 64)


def quantized(**settings: Any) -> Callable[[Path], None]:
    """Store the model as bitsandbytes does."""

    def damage(folder: Path) -> None:
        with ONE_AT_A_TIME:
            from transformers import AutoModelForCausalLM, BitsAndBytesConfig

            how = BitsAndBytesConfig(**settings)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
            model.save_pretrained(folder)

    return damage


def without_its_word(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Store the model quantized, and strike that from `config.json`."""

    def struck(folder: Path) -> None:
        damage(folder)
        file = folder / "config.json"
        kept = json.loads(file.read_text())
        kept.pop("quantization_config")
        file.write_text(json.dumps(kept))

    return struck


def in_fp8(folder: Path) -> None:
    """Store the projections in FP8 with a scale each, as DeepSeek and Qwen publish theirs."""
    import torch

    def change(old: Weights) -> Weights:
        new: Weights = {}
        for name, weight in old.items():
            if "proj" in name:
                scale = weight.abs().max() / 448
                new[name] = (weight / scale).to(torch.float8_e4m3fn)
                new[name + "_scale_inv"] = scale.view(1, 1)
            else:
                new[name] = weight
        return new

    set_weights(folder, change)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [384, 384]}
    set_config(folder, quantization_config=fp8)


def half(folder: Path) -> None:
    """Cut the file of the weights in two and throw one half away."""
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])


def pointer(folder: Path) -> None:
    """Leave what Git leaves where git-lfs is not installed."""
    oid = "0" * 64
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 4626824\n"
    (folder / FILE).write_text(text)


def with_adapter(folder: Path) -> None:
    """Put an adapter beside the model."""
    words = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(words))


def only_adapter(folder: Path) -> None:
    """Leave an adapter alone."""
    with_adapter(folder)
    (folder / "config.json").unlink()
    (folder / FILE).rename(folder / "adapter_model.safetensors")


def empty_config(folder: Path) -> None:
    """Leave a configuration that says nothing."""
    (folder / "config.json").write_text("{}")


INT8 = quantized(load_in_8bit=True)
NF4 = quantized(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
FP4 = quantized(load_in_4bit=True, bnb_4bit_quant_type="fp4")
ALL_OPTIMIZERS = ("optimizer=lora", "optimizer=adamw", "optimizer=galore", "optimizer=qlora")

# What is done to the folder, the command lines that are tried on it, and what each is to say
DAMAGED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "no output head": (no_head, ("optimizer=lora",), f"{NOT_DESCRIBED}: .*missing .lm_head"),
    "every key renamed": (renamed, ("optimizer=adamw",), f"{NOT_DESCRIBED}: .*not of this model"),
    "a layer too many by its configuration": (
        num_layers(6),
        ("optimizer=qlora",),
        f"{NOT_DESCRIBED}: 9 weights are missing .model.layers.5",
    ),
    "a layer too few by its configuration": (
        num_layers(4),
        ("optimizer=galore",),
        f"{NOT_DESCRIBED}: 9 weights are not of this model .model.layers.4",
    ),
    "a reward model": (reward_model, ("optimizer=lora",), f"{NOT_DESCRIBED}: .*score.weight"),
    "64 tokens more than rows": (
        wider_vocabulary,
        ("optimizer=lora",),
        rf"{NOT_DESCRIBED}: .*\[696, 128\] there and \[760, 128\]",
    ),
    "stored in 8 bits": (INT8, ALL_OPTIMIZERS, f"{STORED}quantization=int8"),
    "stored in 8 bits, which its configuration does not say": (
        without_its_word(INT8),
        ("optimizer=lora",),
        f"{NOT_DESCRIBED}: .*SCB",
    ),
    "stored in FP8": (in_fp8, ALL_OPTIMIZERS, "is stored as fp8, which is not trained here"),
    "stored in FP8, which its configuration does not say": (
        without_its_word(in_fp8),
        ("optimizer=adamw",),
        f"{NOT_DESCRIBED}: .*scale_inv",
    ),
    "stored in nf4": (
        NF4,
        (*ALL_OPTIMIZERS[:3], "quantization=int8", "quantization.double_quantization=false"),
        f"{STORED}quantization=nf4 quantization.double_quantization=true",
    ),
    "stored in fp4": (FP4, ALL_OPTIMIZERS, "is quantized already.*give the same model in bf16"),
    "half a file": (half, ("optimizer=lora",), "cannot be loaded .*check that its files are whole"),
    "a pointer of git-lfs": (pointer, ("optimizer=lora",), "is a pointer of git-lfs"),
    "an adapter beside it": (with_adapter, ("optimizer=lora",), "holds an adapter of org/base"),
    "an adapter alone": (only_adapter, ("optimizer=lora",), "holds an adapter of org/base"),
    "an empty configuration": (empty_config, ("optimizer=lora",), "cannot be loaded"),
}


def faults(bench: Bench) -> Iterator[Injection]:
    """Return a fault for each damaged base, and for what looks like one and is none."""
    for name, damaged in DAMAGED.items():
        yield Injection(name, _refuses(*damaged))
    yield Injection("an output head of its own", _comes_through(untie))


def _base(bench: Bench, damage: Callable[[Path], None]) -> tuple[str, ...]:
    damage(base_model(bench.path("base")))
    return (*UNTRACKED, "model=local", "model.path=./base")


def _refuses(
    damage: Callable[[Path], None], attempts: tuple[str, ...], says: str
) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        settings = _base(bench, damage)
        for attempt in attempts:
            done = bench.run(*settings, attempt, "hydra.run.dir=run")
            outcome = refused(done, bench.path("run"), says)
            if outcome.ending != "refused":
                break
            shutil.rmtree(bench.path("run"))
        return outcome

    return happen


def _comes_through(change: Callable[[Path], None]) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        settings = (*_base(bench, lambda folder: None), "optimizer=lora")
        reference = bench.unharmed(*settings, into="reference")
        change(bench.path("base"))
        return survived(bench.run(*settings, "hydra.run.dir=run"), bench.path("run"), reference)

    return happen
