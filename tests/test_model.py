"""Weights and tokenizers: the real bitsandbytes layers, and every fallback."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_lab import config, model
from orpo_lab.errors import UserError
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
    layers = [m for m in model.projections(network).values() if hasattr(m.weight, "quant_state")]
    assert len(layers) == 7 * network.config.num_hidden_layers
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert getattr(layer.weight, "quant_state").nested  # noqa: B009  (not in its type)


def test_int8_bases_train_adapters(load: Load, build_model: Any, ids: torch.Tensor) -> None:
    network = build_model(load("quantization=int8", "optimizer.dropout=0"))
    assert any(p.dtype == torch.int8 for p in network.parameters())
    found = gradients(network, ids)
    assert found
    assert all(torch.isfinite(one).all() for one in found.values())


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
    assert model.weight_dtype(optimizer, torch.bfloat16) == dtype
    assert model.weight_dtype(optimizer, torch.float16) == torch.float32
    assert model.weight_dtype(optimizer, torch.float32) == torch.float32


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
        found = model.projections(network)
        assert len(found) == 14
        assert "lm_head" not in found


def cuda(*, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that exists in name only: no GPU is here to ask."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    return torch.device("cuda")


def test_a_precision_that_the_device_lacks_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    caplog.set_level("INFO")
    old = cuda(bf16=False, monkeypatch=monkeypatch)
    assert model.resolve_dtype("bf16", old) == torch.float16
    assert "has no bf16, using fp16" in caplog.text
    assert model.resolve_dtype("fp16", torch.device("cpu")) == torch.float32
    assert "this cpu has no fp16, using fp32" in caplog.text
    caplog.clear()
    assert model.resolve_dtype("fp32", old) == torch.float32
    assert not caplog.text


def test_no_flash_attention_means_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("orpo_lab").propagate = True
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    assert model.resolve_attention("auto", cpu, torch.bfloat16) is None  # transformers' choice
    assert not caplog.text
    assert model.resolve_attention("flash_attention_2", cpu, torch.bfloat16) is None
    assert "using sdpa" in caplog.text
    assert model.resolve_attention("eager", cpu, torch.bfloat16) == "eager"


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


def local(load: Load, folder: Path) -> config.Model:
    return load("model=local", f"model.path={folder}").model


def test_missing_template_and_pad_token_are_filled_in_and_said(
    load: Load, bare: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    caplog.set_level("INFO")
    settings = local(load, bare)
    tokenizer = model.load_tokenizer(settings, model.load_config(settings))
    assert "no chat template" in caplog.text
    assert "no pad token" in caplog.text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\nhi</s>\n<|assistant|>\n"


def test_eos_stays_in_the_loss_where_it_is_the_pad_token(load: Load, bare: Path) -> None:
    """TRL's collator and step, on our rows: labels come from the mask, not from the pad id."""
    from trl.experimental.utils import DPODataCollatorWithPadding

    from orpo_lab.engine.trl import TrlTrainer

    settings = local(load, bare)
    tokenizer = model.load_tokenizer(settings, model.load_config(settings))
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
        model.load_config(local(load, tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        model.load_config(local(load, tmp_path / "nowhere"))


def test_an_unreachable_hub_model_is_refused_in_one_line(load: Load) -> None:
    with pytest.raises(UserError, match=r"mistralai/Mistral-7B-v0.1 cannot be loaded") as refusal:
        model.load_config(load("model=mistral_7b").model)
    assert "\n" not in str(refusal.value)


def test_sequences_above_the_context_are_refused(load: Load) -> None:
    loaded = load("dataset.max_length=512")
    with pytest.raises(UserError, match="above the model's context of 256"):
        model.check_context(model.load_config(loaded.model), loaded.dataset)
    loaded = load("dataset.max_new_tokens=200")
    with pytest.raises(UserError, match=r"dataset\.max_new_tokens=200 are above"):
        model.check_context(model.load_config(loaded.model), loaded.dataset)
