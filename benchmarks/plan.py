"""The plan against what is: `python benchmarks/plan.py`, and with a GPU `--device cuda`.

On a CPU the bytes of weights, gradients, optimizer states and saved activations are counted by
hooks on real models of two sizes, and have to be the plan's. On a GPU the peak of memory and the
seconds of a step are measured, and stand beside the plan's; no GPU has run this part yet. The last
line is one JSON object, with the seconds in which the plans were made, imports left out; the exit
code is 1 if a count differs.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from orpo_lab import api, config, engine, memory, methods
from orpo_lab import optimizer as optimizers
from orpo_lab.config.model import local_path
from orpo_lab.model.precision import resolve_device, resolve_dtype
from orpo_lab.model.start import origin_of
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.plan import cards, lengths, planned
from orpo_lab.plan import memory as of_memory
from orpo_lab.plan.command import plan_of
from orpo_lab.plan.memory import Step
from orpo_lab.plan.shapes import Sizes, skeleton
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.state import State
from orpo_lab.upstream import silence

OPTIMIZERS = (
    ("optimizer=qlora",),
    ("optimizer=qlora", "quantization.double_quantization=false"),
    ("optimizer=lora",),
    ("optimizer=galore",),
    ("optimizer=galore_8bit",),
    ("optimizer=galore", "optimizer.layerwise=true"),
    ("optimizer=galore_8bit", "optimizer.layerwise=true"),
    ("optimizer=adamw",),
)
CONFIGURATIONS = [
    (*overrides, f"train.gradient_checkpointing={how}")
    for overrides, how in itertools.product(OPTIMIZERS, ("false", "true"))
]
# Indices into CONFIGURATIONS of those that every test run counts
QUICK = (0, 13, 14)
# Tokens of prompt, chosen and rejected completion of the pairs of a micro-batch
TINY: tuple[Sizes, ...] = ((20, 30, 25), (10, 12, 14))
# The second size: fewer key heads than heads, and a head of its own
LARGER = LlamaConfig(
    vocab_size=1000,
    hidden_size=320,
    intermediate_size=896,
    num_hidden_layers=3,
    num_attention_heads=10,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
NUM_STEPS = 4


def own_config(loaded: config.Config) -> PretrainedConfig:
    """Return the model's own configuration."""
    return AutoConfig.from_pretrained(local_path(loaded.model.path))


def built(loaded: config.Config, *, dtype: torch.dtype) -> tuple[Any, State, Any]:
    """Return the model, the state of training and the engine of a run."""
    own = own_config(loaded)
    tokenizer = load_tokenizer(api.compose().config.model, own)
    network, _ = origin_of(loaded).load(tokenizer, dtype)
    devices = OneDevice(next(network.parameters()).device, dtype)
    updater = optimizers.build(loaded, network, num_steps=10, dtype=dtype)
    state = State(network, updater, devices, lambda step: 1.0)
    if loaded.train.gradient_checkpointing == "true":
        state.enable_checkpointing()
    made = engine.build(loaded, model=network, tokenizer=tokenizer, devices=devices)
    network.train()
    return network, state, made


def pairs_of(sizes: Iterable[Sizes]) -> list[dict[str, list[int]]]:
    """Return pairs of some sizes."""
    return [
        {"prompt_ids": [5] * p, "chosen_ids": [6] * c, "rejected_ids": [7] * r} for p, c, r in sizes
    ]


def compare(loaded: config.Config, sizes: Sequence[Sizes]) -> dict[str, tuple[int, int]]:
    """Return for each part its bytes by the plan, and as counted on a real model on a CPU."""
    own, dtype = own_config(loaded), resolve_dtype(loaded.model.dtype, resolve_device())
    network, state, made = built(loaded, dtype=dtype)
    (micro_batch,) = made.micro_batches(pairs_of(sizes))
    saved = _saved(network, made, micro_batch)
    weights = _bytes(_stored(network))
    gradients = _gradients(state, made, micro_batch)
    state.update()
    optimizer = state.updater.optimizer
    states = [optimizer.state, getattr(optimizer, "inner", optimizer).state]
    plan = of_memory.of_run(
        loaded,
        own,
        skeleton(loaded, own, dtype),
        dtype,
        num_steps=10,
        step=Step(tuple(sizes), methods.build(loaded).scores_prompt),
        on_gpu=False,
        checkpointing=loaded.train.gradient_checkpointing == "true",
    )
    return {
        "weights": (plan.frozen + plan.trained, weights),
        "gradients": (plan.gradients, gradients),
        "states": (plan.moments + plan.bases, _bytes(_tensors(states))),
        "saved": (plan.activations + plan.head.saved, saved),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _stored(network: torch.nn.Module) -> list[Tensor]:
    """Return the tensors of a network, with what 4-bit weights are dequantized by."""
    found: list[Tensor] = [*network.parameters(), *network.buffers()]
    for weight in network.parameters():
        if how := getattr(weight, "quant_state", None):
            found += [how.absmax, how.code]
            if how.nested:
                found += [how.offset, how.state2.absmax, how.state2.code]
    return found


def _saved(network: torch.nn.Module, made: Any, micro_batch: Any) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without weights."""
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), made.reading():
        made.logps(micro_batch)
    return _bytes(kept)


def _gradients(state: State, made: Any, micro_batch: Any) -> int:
    """Return the bytes of gradients: all that stay, and the largest of those that are freed."""
    seen: dict[int, int] = {}
    weights = [weight for weight in state.model.parameters() if weight.requires_grad]

    def note(which: int, gradient: Tensor) -> None:
        seen[which] = gradient.nbytes

    hooks = [weight.register_hook(partial(note, id(weight))) for weight in weights]
    with made.reading():
        state.devices.backward(made.logps(micro_batch).sum())
    for hook in hooks:
        hook.remove()
    stay = [weight.grad for weight in weights if weight.grad is not None]
    freed = [seen[id(weight)] for weight in weights if weight.grad is None]
    slots = getattr(state.updater.optimizer, "_slots", [])
    flats = [slot.flat.grad for slot in slots]
    return _bytes([*stay, *flats]) + max(freed, default=0)


def measure(loaded: config.Config, card: cards.Card) -> dict[str, tuple[float, float]]:
    """Return the peak of memory and the seconds of a step, planned and measured on a GPU."""
    own, dtype = own_config(loaded), card.dtype(loaded.model.dtype)
    sizes = [(200, 300, 300)] * loaded.train.batch_size
    plan = planned.plan(loaded, own, card, lengths.Lengths(sizes, len(sizes), 1, "given"))
    _, state, made = built(loaded, dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        for micro_batch in made.micro_batches(pairs_of(sizes)):
            with made.reading():
                state.devices.backward(made.score(micro_batch, 0.1).loss)
        state.update()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    of_step = plan.seconds.steps / plan.num_steps
    return {
        "peak_bytes": (plan.memory.phases["backward"], torch.cuda.max_memory_allocated()),
        "seconds_of_step": (of_step, min(seconds[1:])),
    }


def seconds_of_plan(loaded: config.Config) -> float:
    """Return in how many seconds the plan of a run on this machine is made."""
    begin = time.perf_counter()
    plan_of(loaded, cards.this_machine(), "prompt=20,chosen=30,rejected=30,pairs=1000")
    return time.perf_counter() - begin


def main() -> None:
    """Print the plan beside what is counted or measured."""
    parser = argparse.ArgumentParser(description="The plan against what is.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a folder of the second size's model")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here")
    silence()
    report, equal, seconds = {}, True, []
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            torch.manual_seed(0)
            LlamaForCausalLM(LARGER).save_pretrained(folder)
        second = str(options.model or folder)
        models: list[tuple[str, ...]] = [(), ("model=local", f"model.path={second}")]
        for model, overrides in itertools.product(models, CONFIGURATIONS):
            given = (*model, *overrides, *(["model.dtype=fp32"] if options.device == "cpu" else []))
            loaded = api.compose("tracker=none", *given).config
            seconds.append(seconds_of_plan(loaded))
            name = " ".join([model[0] if model else "model=tiny", *overrides])
            if options.device == "cpu":
                rows: dict[str, Any] = compare(loaded, TINY)
            else:
                rows = measure(loaded, cards.this_machine())
            for part, (plan, found) in rows.items():
                print(f"{name:96} {part:16} {plan:>16,.4g} {found:>16,.4g} {plan / found:8.4f}")
                equal = equal and (plan == found or options.device == "cuda")
            report[name] = rows
            memory.give_back()
    made = {"median": statistics.median(seconds), "longest": max(seconds)}
    result = {"device": options.device, "equal": equal, "plan_seconds": made}
    print(json.dumps(result | {"configurations": report}))
    sys.exit(int(not equal))


if __name__ == "__main__":
    main()
