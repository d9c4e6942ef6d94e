"""Weights and tokenizers: what a folder holds, and every fallback."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from faults.families import numbers, weights
from orpo_lab import config
from orpo_lab.config.model import Model
from orpo_lab.data import Data
from orpo_lab.errors import UserError
from orpo_lab.model import quantization
from orpo_lab.model.precision import DTYPES, resolve_attention, resolve_dtype, weight_dtype
from orpo_lab.model.projections import num_weights, projections
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import check_context, check_ids, load_tokenizer
from orpo_lab.model.weights import fingerprint, load_model
from tests.conftest import ROOT

Load = Callable[..., config.Config]
TINY = ROOT / "orpo_lab" / "tiny"


def gradients(network: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return every trained gradient of one language-model loss in training mode."""
    network.train()
    network.zero_grad()
    network(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def evaluate_once(network: Any, ids: torch.Tensor) -> None:
    network.eval()
    with torch.no_grad():
        network(input_ids=ids)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 200, (3, 24), generator=torch.Generator().manual_seed(0))


def qlora_without_dropout(load: Load, build_model: Any) -> Any:
    return build_model(load("optimizer.dropout=0", "tracker=none"))


def test_nf4_gradients_survive_an_evaluation_and_a_save(
    load: Load, build_model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    network = qlora_without_dropout(load, build_model)
    before = gradients(network, ids)
    evaluate_once(network, ids)
    network.save_pretrained(tmp_path)
    network.base_model.model.state_dict()
    after = gradients(network, ids)
    assert len(before) == 2 * 7 * network.config.num_hidden_layers
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nf4_gradients_equal_those_of_the_dequantized_model_after_an_evaluation(
    load: Load, build_model: Any, ids: torch.Tensor
) -> None:
    import bitsandbytes as bnb

    network = qlora_without_dropout(load, build_model)
    evaluate_once(network, ids)
    quantized = gradients(network, ids)
    for module in list(network.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
            plain = torch.nn.Linear(base.in_features, base.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            module.base_layer = plain
    plain_gradients = gradients(network, ids)
    for name, gradient in quantized.items():
        scale = plain_gradients[name].abs().max()
        assert (gradient - plain_gradients[name]).abs().max() <= 1e-5 * scale, name


def test_the_switch_that_keeps_4bit_exact_still_exists() -> None:
    import bitsandbytes as bnb

    assert hasattr(bnb.nn.Linear4bit(64, 64), "support_avx512bf16_for_cpu")


def test_nf4_really_stores_four_bits(load: Load, build_model: Any) -> None:
    network = qlora_without_dropout(load, build_model)
    layers = [m for m in projections(network).values() if hasattr(m.weight, "quant_state")]
    assert len(layers) == 7 * network.config.num_hidden_layers
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert num_weights(layer) == layer.in_features * layer.out_features
        assert getattr(layer.weight, "quant_state").nested  # noqa: B009  (not in its type)


def test_int8_bases_train_adapters(load: Load, build_model: Any, ids: torch.Tensor) -> None:
    network = build_model(load("quantization=int8", "optimizer.dropout=0"))
    assert any(p.dtype == torch.int8 for p in network.parameters())
    found = gradients(network, ids)
    assert found
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["optimizer=adamw"], torch.float32),
        (["optimizer=galore", "optimizer.implementation=galore_torch"], torch.float32),
        (["optimizer=galore"], torch.bfloat16),  # it rounds stochastically
    ],
)
def test_trained_weights_are_fp32_unless_the_optimizer_keeps_small_updates(
    load: Load, overrides: list[str], dtype: torch.dtype
) -> None:
    optimizer = load(*overrides).optimizer
    assert weight_dtype(optimizer, torch.bfloat16) == dtype
    assert weight_dtype(optimizer, torch.float16) == torch.float32
    assert weight_dtype(optimizer, torch.float32) == torch.float32


def test_frozen_weights_are_kept_in_the_precision_of_the_arithmetic(load: Load) -> None:
    for dtype in DTYPES.values():
        assert weight_dtype(load("optimizer=lora").optimizer, dtype) == dtype


def test_the_cache_is_off_in_training(load: Load, build_model: Any) -> None:
    assert build_model(load("optimizer=lora")).config.use_cache is False


def test_projections_leave_out_the_head_tied_or_not() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        network = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=32,
                tie_word_embeddings=tied,
            )
        )
        found = projections(network)
        assert len(found) == 14
        assert "lm_head" not in found


def cuda(*, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that exists in name only: no GPU is here to ask."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    return torch.device("cuda")


def test_a_precision_that_the_device_lacks_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    old = cuda(bf16=False, monkeypatch=monkeypatch)
    assert resolve_dtype("bf16", old) == torch.float16
    assert "has no bf16, using fp16" in caplog.text
    assert resolve_dtype("fp16", torch.device("cpu")) == torch.float32
    assert "this cpu has no fp16, using fp32" in caplog.text
    caplog.clear()
    assert resolve_dtype("fp32", old) == torch.float32
    assert not caplog.text


def test_no_flash_attention_means_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    assert resolve_attention("auto", cpu, torch.bfloat16) is None  # transformers' choice
    assert not caplog.text
    assert resolve_attention("flash_attention_2", cpu, torch.bfloat16) is None
    assert "using sdpa" in caplog.text
    assert resolve_attention("eager", cpu, torch.bfloat16) == "eager"


def test_flash_attention_is_for_gpus_half_precision_and_models_that_know_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where its package is installed: here it is not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    on, half = torch.device("cuda"), torch.bfloat16
    assert resolve_attention("auto", on, half) == "flash_attention_2"
    assert resolve_attention("sdpa", on, half) is None
    assert resolve_attention("auto", on, torch.float32) is None
    assert resolve_attention("auto", torch.device("cpu"), half) is None
    assert resolve_attention("auto", on, half, has_flash=False) is None


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The tiny model without a chat template and without a pad token."""
    folder = tmp_path / "bare"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.jinja", "*.py", "__pycache__"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**words, "padding": None}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may change."""
    return numbers.base_model(tmp_path / "base")


def test_a_fingerprint_is_of_every_weight_from_its_first_number_to_its_last() -> None:
    def after(change: Callable[[torch.nn.Module], object]) -> str:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 48))
        with torch.no_grad():
            change(network)
        return fingerprint(network)

    changes: dict[str, Callable[[Any], object]] = {
        "none": lambda network: None,
        "first half": lambda network: network[0].weight[:32].add_(1),
        "last half": lambda network: network[0].weight[32:].add_(1),
        "last weight": lambda network: network[1].bias.add_(1),
        "precision": lambda network: network[1].double(),
    }
    found = {name: after(change) for name, change in changes.items()}
    assert len(set(found.values())) == len(found)
    assert after(changes["none"]) == found["none"]


def load_base(load: Load, folder: Path, *overrides: str) -> Any:
    """Load a folder as a run does: its configuration, its tokenizer, its weights."""
    loaded = load("model=local", f"model.path={folder}", "model.dtype=fp32", *overrides)
    settings = load_config(loaded.model)
    quantization.check(loaded, settings)
    tokenizer = load_tokenizer(loaded.model, settings)
    return load_model(loaded, tokenizer, torch.float32)


ONE_EACH = [
    pytest.param(damage, overrides, says, id=name)
    for name, (damage, overrides, says) in weights.DAMAGED.items()
]


@pytest.mark.parametrize(("damage", "attempts", "says"), ONE_EACH)
def test_a_damaged_base_is_refused_in_one_line(
    load: Load,
    base: Path,
    damage: Callable[[Path], None],
    attempts: tuple[str, ...],
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(base)
    for attempt in attempts:
        with pytest.raises(UserError, match=says) as refusal:
            load_base(load, base, attempt)
        assert "\n" not in str(refusal.value)
    assert not [
        record for record in caplog.records if record.name.startswith("transformers.modeling")
    ]


def test_weights_that_nothing_needs_are_no_fault(load: Load, base: Path) -> None:
    """Rotary buffers of old checkpoints; a head beside embeddings that it is tied to."""
    weights.set_weights(
        base,
        lambda old: (
            old
            | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
            | {"lm_head.weight": old["model.embed_tokens.weight"].clone()}
        ),
    )
    network = load_base(load, base, "optimizer=lora")
    assert fingerprint(network) == fingerprint(load_base(load, TINY, "optimizer=lora"))


def test_a_head_that_differs_from_embeddings_is_kept(load: Load, base: Path) -> None:
    weights.untie(base)
    weights.set_weights(base, lambda old: old | {"lm_head.weight": 2 * old["lm_head.weight"]})
    network = load_base(load, base, "optimizer=lora")
    assert torch.equal(network.lm_head.weight, 2 * network.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("damage", "asked", "kind"),
    [
        (weights.NF4, "quantization=nf4", torch.uint8),
        (weights.INT8, "quantization=int8", torch.int8),
    ],
)
def test_a_folder_quantized_as_asked_for_is_loaded_as_it_is(
    load: Load, base: Path, damage: Callable[[Path], None], asked: str, kind: torch.dtype
) -> None:
    fresh = load_base(load, base, asked)
    damage(base)
    stored = load_base(load, base, asked)
    assert fingerprint(stored) == fingerprint(fresh)
    layer = stored.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == kind
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(stored(input_ids=ids).logits, fresh(input_ids=ids).logits)


def test_a_folder_in_4_bits_computes_in_the_precision_that_is_asked_for(
    load: Load, base: Path
) -> None:
    weights.quantized(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )(base)
    layer = load_base(load, base).model.layers[0].self_attn.q_proj
    assert layer.compute_dtype == torch.float32


def test_settings_of_sampling_beside_greedy_do_not_stop_a_save(
    load: Load, base: Path, tmp_path: Path
) -> None:
    file = base / "generation_config.json"
    vicuna = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]}
    file.write_text(json.dumps({**vicuna, "repetition_penalty": 1.1}))
    network = load_base(load, base, "optimizer=adamw")
    network.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert "temperature" not in saved
    assert (saved["eos_token_id"], saved["repetition_penalty"]) == ([2, 5], 1.1)


def architecture(folder: Path, kind: str, **settings: Any) -> Path:
    """Save a model with random weights, of the tiny one's vocabulary, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 696,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own = AutoConfig.for_model(kind, **{**sizes, **settings})
    AutoModelForCausalLM.from_config(own).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.5}),
        ("gpt_bigcode", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("gpt_neox", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
        ("phimoe", {"num_local_experts": 2, "router_jitter_noise": 0.5}),
    ],
)
def test_no_base_draws_at_random(
    load: Load, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    network = load_base(load, architecture(tmp_path, kind, **settings), "optimizer=adamw").train()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first, second = (network(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_base_that_draws_at_random_all_the_same_is_refused(
    load: Load, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    read = modeling_llama.LlamaMLP.forward
    drop = torch.nn.functional.dropout
    monkeypatch.setattr(
        modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: drop(read(self, x), 0.1, self.training),
    )
    with pytest.raises(UserError, match="LlamaForCausalLM draws at random in training"):
        load_base(load, base, "optimizer=adamw")


def test_a_dropout_that_no_configuration_tells_of_is_off_too(
    load: Load, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    begin, read = modeling_llama.LlamaMLP.__init__, modeling_llama.LlamaMLP.forward

    def with_dropout(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.drop = torch.nn.Dropout(0.1)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_dropout)
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: self.drop(read(self, x))
    )
    network = load_base(load, base, "optimizer=adamw").train()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first, second = (network(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)


def test_loading_draws_nothing_from_the_seed(load: Load, base: Path) -> None:
    torch.manual_seed(5)
    load_base(load, base, "optimizer=adamw")
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))


def test_a_model_without_sdpa_is_read_with_eager_attention_which_is_said(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    network = load_base(load, architecture(tmp_path, "bloom", n_layer=2, n_head=4))
    assert network.config._attn_implementation == "eager"
    assert "BloomForCausalLM has no sdpa, using eager" in caplog.text


def test_experts_in_one_parameter_are_refused_with_their_share(load: Load, tmp_path: Path) -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
    folder = architecture(tmp_path, "mixtral", **settings)
    network = load_base(load, folder, "optimizer=adamw")
    layer = network.model.layers[0]
    experts = sum(p.numel() for p in layer.mlp.parameters())
    attention = sum(p.numel() for p in layer.self_attn.parameters())
    share = f"{experts / (experts + attention):.0%}"
    with pytest.raises(UserError, match=f"MixtralForCausalLM has {share} of its layers' weights"):
        projections(network)


def test_of_a_model_that_also_sees_the_language_model_is_meant(load: Load, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 696,
        "max_position_embeddings": 128,
        # Off, or loading would be refused
        "attention_dropout": 0.1,
    }
    folder = architecture(
        tmp_path,
        "gemma3",
        text_config=sizes | text,
        vision_config=sizes | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=695,
    )
    found = projections(load_base(load, folder, "optimizer=lora"))
    assert len(found) == 2 * 7
    assert all(".language_model.layers." in name for name in found)
    loaded = load("model=local", f"model.path={folder}", "dataset.max_length=129")
    with pytest.raises(UserError, match=r"dataset.max_length=129 is above the model's context"):
        check_context(load_config(loaded.model), loaded.dataset)


def test_longrope_is_refused_where_a_row_would_change_the_rows_beside_it(load: Load) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    own = AutoConfig.for_model(
        "phi3", hidden_size=32, num_attention_heads=4, max_position_embeddings=4096
    )
    own.rope_parameters = rope
    shorter = ("dataset.max_prompt_length=32", "dataset.max_new_tokens=8")
    check_context(own, load("dataset.max_length=64", *shorter).dataset)
    with pytest.raises(UserError, match=r"dataset.max_length=65 is above .*longrope.* 64 tokens"):
        check_context(own, load("dataset.max_length=65", *shorter).dataset)
    # Where kinds of layers have one each, the shorter one counts
    own.rope_parameters = {
        "full_attention": rope,
        "sliding_attention": rope | {"original_max_position_embeddings": 48},
    }
    check_context(own, load("dataset.max_length=48", *shorter).dataset)
    with pytest.raises(UserError, match=r"dataset.max_length=49 is above .*longrope.* 48 tokens"):
        check_context(own, load("dataset.max_length=49", *shorter).dataset)


def test_a_spare_token_is_warned_of_and_refused_in_a_text(
    load: Load, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = json.loads((base / "tokenizer.json").read_text())
    spare = {**words["added_tokens"][0], "id": 696, "content": "<image_soft_token>"}
    words["added_tokens"].append(spare)
    (base / "tokenizer.json").write_text(json.dumps(words))
    settings = local(load, base)
    own = load_config(settings)
    tokenizer = load_tokenizer(settings, own)
    assert "<image_soft_token> of its tokenizer have no row" in caplog.text
    ids = {"prompt_ids": [1, 7], "chosen_ids": [9, 2]}
    fine, spare_one = (
        datasets.Dataset.from_list([ids | {"rejected_ids": [last]}]) for last in (695, 696)
    )
    check_ids(tokenizer, own, Data(fine, fine, {}))
    for train, held_out in ((spare_one, fine), (fine, spare_one)):
        with pytest.raises(UserError, match="<image_soft_token>"):
            check_ids(tokenizer, own, Data(train, held_out, {}))
    # Of all tokens the end may not be the spare one
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<image_soft_token>"}))
    with pytest.raises(UserError, match="they do not belong together"):
        load_tokenizer(settings, own)


def test_a_tokenizer_of_another_model_is_refused(load: Load, base: Path) -> None:
    weights.set_config(base, vocab_size=300)
    settings = local(load, base)
    with pytest.raises(UserError, match="they do not belong together"):
        load_tokenizer(settings, load_config(settings))


@pytest.mark.parametrize(("optimizer", "warned"), [("lora", True), ("adamw", False)])
def test_adapters_on_special_tokens_that_were_never_trained_are_warned_of(
    load: Load, base: Path, caplog: pytest.LogCaptureFixture, optimizer: str, warned: bool
) -> None:

    def forget(old: dict[str, Any]) -> dict[str, Any]:
        # The end, which every text holds, and the padding, which none holds
        old["model.embed_tokens.weight"][[0, 2]] = 0
        return old

    load_base(load, base, f"optimizer={optimizer}")
    assert "never trained" not in caplog.text
    weights.set_weights(base, forget)
    load_base(load, base, f"optimizer={optimizer}")
    assert ("the embeddings of </s> are (nearly) zero" in caplog.text) == warned


def local(load: Load, folder: Path) -> Model:
    return load("model=local", f"model.path={folder}").model


def test_missing_template_and_pad_token_are_filled_in_and_said(
    load: Load, bare: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = local(load, bare)
    tokenizer = load_tokenizer(settings, load_config(settings))
    assert "no chat template" in caplog.text
    assert "no pad token" in caplog.text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<s><|user|>\nhi</s>\n<|assistant|>\n"


def test_a_models_own_template_and_padding_are_kept(load: Load, base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{{ eos_token }}")
    weights.set_config(base, pad_token_id=5)
    settings = local(load, base)
    tokenizer = load_tokenizer(settings, load_config(settings))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi</s>"
    # Where tokenizer and weights name another, the tokenizer pads
    assert tokenizer.pad_token_id == 0
    assert load_base(load, base, "optimizer=lora").config.pad_token_id == 0


def test_eos_stays_in_the_loss_where_it_is_the_pad_token(load: Load, bare: Path) -> None:
    """TRL's collator and step, on our rows: labels come from the mask, not from the pad id."""
    from trl.experimental.utils import DPODataCollatorWithPadding

    from orpo_lab.engine.trl import TrlTrainer

    settings = local(load, bare)
    tokenizer = load_tokenizer(settings, load_config(settings))
    eos = tokenizer.eos_token_id
    rows = [
        {"prompt_ids": [1, 7], "chosen_ids": [9, eos], "rejected_ids": [9, 9, 9, eos]},
        {"prompt_ids": [1], "chosen_ids": [8, 8, 8, 8, eos], "rejected_ids": [8, eos]},
    ]
    collate = DPODataCollatorWithPadding(pad_token_id=tokenizer.pad_token_id)
    encoded = [TrlTrainer.tokenize_row(None, row) for row in rows]  # type: ignore[arg-type]
    batch = TrlTrainer.concatenated_inputs(collate(encoded), padding_value=eos)
    labels = batch["concatenated_labels"]
    assert [(row == eos).sum().item() for row in labels] == [1, 1, 1, 1]
    assert batch["concatenated_attention_mask"].sum().item() == 4 + 6 + 6 + 3


def test_a_folder_that_holds_no_model_is_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a model folder: no config\.json"):
        load_config(local(load, tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        load_config(local(load, tmp_path / "nowhere"))


def test_an_unreachable_hub_model_is_refused_in_one_line(load: Load) -> None:
    with pytest.raises(UserError, match=r"mistralai/Mistral-7B-v0.1 cannot be loaded") as refusal:
        load_config(load("model=mistral_7b").model)
    assert "\n" not in str(refusal.value)


def test_the_revision_that_is_asked_for_is_loaded(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as it lies on the disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--name"
    for number, revision in enumerate(("main", "v2")):
        commit = str(number) * 40
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        own = AutoConfig.for_model("llama", max_position_embeddings=100 + number)
        own.save_pretrained(snapshot)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    for asked, found in (("null", 100), ("main", 100), ("v2", 101)):
        loaded = load("model=hub", "model.path=org/name", f"model.revision={asked}")
        assert load_config(loaded.model).max_position_embeddings == found


def test_sequences_above_the_context_are_refused(load: Load) -> None:
    loaded = load("dataset.max_length=512")
    with pytest.raises(UserError, match="above the model's context of 256"):
        check_context(load_config(loaded.model), loaded.dataset)
    check_context(load_config(loaded.model), load("dataset.max_length=256").dataset)
    loaded = load("dataset.max_new_tokens=200")
    with pytest.raises(UserError, match=r"dataset\.max_new_tokens=200 are above"):
        check_context(load_config(loaded.model), loaded.dataset)
