"""Fused layers against PEFT's: the outputs and every gradient, in fp32 and in bf16."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_lab import config
from orpo_lab.config.optimizer import Lora
from orpo_lab.config.quantization import Int8, Nf4
from orpo_lab.model import adapter, quantization
from orpo_lab.model.adapter import attach
from orpo_lab.model.layers import dense_weight, fused, fusible

Load = Callable[..., config.Config]
Gradients = tuple[Tensor, dict[str, Tensor]]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Qwen2 has biases in q, k and v, Phi in every layer; Phi-3 has q, k, v in one layer
KINDS = ("llama", "qwen2", "mistral", "gemma", "phi", "phi3")
QUANTIZATIONS = {
    "nf4": Nf4(double_quantization=True),
    "int8": Int8(outlier_threshold=6.0),
}
BASES = ("nf4", "int8", "bf16", "fp32")
NUM_TOKENS = 24


def make(
    load: Load, folder: Path, kind: str, base: str, *, dtype: torch.dtype, dropout: float = 0.0
) -> Any:
    """A tiny model with random weights and biases, and adapters whose B is not zero.

    All random weights of the base are numbers of bf16, so that the base is the same in any dtype.

    Args:
        load: composes a configuration.
        folder: gets the weights, from which the quantized model is loaded.
        kind: the architecture.
        base: the way in which the base is stored.
        dtype: precision of the arithmetic.
        dropout: of the adapters.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    for name, weight in model.named_parameters():
        if weight.ndim == 2 or "bias" in name:
            weight.data = torch.empty_like(weight).normal_(0, 0.1).bfloat16().float()
    if base in QUANTIZATIONS:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=quantization.settings(QUANTIZATIONS[base], dtype),
            dtype=dtype,
            device_map={"": "cpu"},
        )
        quantization.prepare(model, dtype)
    elif base == "bf16":
        model = model.to(torch.bfloat16)
    keys = ("optimizer.r=8", "optimizer.alpha=12", f"optimizer.dropout={dropout}")
    lora = load("optimizer=lora", *keys).optimizer
    assert isinstance(lora, Lora)
    adapted = attach(model, lora).train()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.1)
    return adapted


def backward(
    model: Any,
    context: AbstractContextManager[None],
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Gradients:
    """Return the last hidden states of random tokens, and the gradients of a random sum of them."""
    torch.manual_seed(seed)
    ids = torch.randint(1, SIZES["vocab_size"], (1, NUM_TOKENS))
    weights = torch.randn(1, NUM_TOKENS, SIZES["hidden_size"])
    model.zero_grad()
    with context:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states = model.get_base_model().base_model(input_ids=ids).last_hidden_state
        (states.float() * weights).sum().backward()
    named = model.named_parameters()
    return states.detach().float(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def ours(model: Any, dtype: torch.dtype = torch.float32, seed: int = 1) -> Gradients:
    return backward(model, fused(fusible(model), dtype), dtype, seed)


def pefts(model: Any, dtype: torch.dtype = torch.float32, seed: int = 1) -> Gradients:
    return backward(model, nullcontext(), dtype, seed)


def assert_same(found: Gradients, right: Gradients) -> None:
    assert (found[0] - right[0]).abs().max() < 1e-5 * right[0].abs().max()
    assert found[1].keys() == right[1].keys()
    assert all("lora_" in name for name in right[1])
    for name, gradient in right[1].items():
        assert (found[1][name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_pefts(load: Load, tmp_path: Path, kind: str, base: str) -> None:
    model = make(load, tmp_path, kind, base, dtype=torch.float32)
    assert len(fusible(model)) == len(fusible(model.base_model.model.model.layers)) > 0
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    assert len(fusible(model)) == adapted
    # PEFT's own layers cannot compute in fp32 on 16 bits
    assert_same(ours(model), pefts(copy.deepcopy(model).float() if base == "bf16" else model))


@pytest.mark.parametrize("base", ["nf4", "fp32"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_same_masks_give_the_same_gradients(
    load: Load, tmp_path: Path, kind: str, base: str
) -> None:
    model = make(load, tmp_path, kind, base, dtype=torch.float32, dropout=0.4)
    assert_same(ours(model), pefts(model))
    with_other_masks = backward(model.eval(), nullcontext())
    assert not torch.allclose(with_other_masks[0], pefts(model.train())[0], rtol=1e-2)


def error(found: Gradients, right: Gradients) -> float:
    apart = sum((found[1][name] - value).square().sum() for name, value in right[1].items())
    whole = sum(value.square().sum() for value in right[1].values())
    return float((apart / whole) ** 0.5)


@pytest.mark.parametrize("base", ["nf4", "int8", "bf16"])
def test_in_bf16_they_are_closer_to_fp32_than_pefts(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """PEFT leaves the norms of a base in 16 bits as they are, and makes those of others fp32.

    On an 8-bit base both are as close: there bitsandbytes' backward pass is in fp32 throughout.
    """
    wide = make(load, tmp_path, "llama", base, dtype=torch.float32)
    wide = wide.float() if base == "bf16" else wide
    narrow = make(load, tmp_path, "llama", base, dtype=torch.bfloat16)
    if base == "bf16":
        monkeypatch.setattr(adapter, "widen", lambda model: None)
    theirs = make(load, tmp_path, "llama", base, dtype=torch.bfloat16)
    errors = []
    for seed in range(8):
        exact = pefts(wide, seed=seed)
        both = ours(narrow, torch.bfloat16, seed), pefts(theirs, torch.bfloat16, seed)
        errors.append([error(found, exact) for found in both])
    of_ours, of_pefts = torch.tensor(errors).mean(0).tolist()
    limit = 1.02 if base == "int8" else 1.0
    assert 1e-3 < of_ours < limit * of_pefts < 0.05


def test_what_follows_a_layer_computes_in_the_precision_of_its_input(
    load: Load, tmp_path: Path
) -> None:
    """As with PEFT's layers: rotary embedding and activation function are in fp32."""
    model = make(load, tmp_path, "llama", "nf4", dtype=torch.bfloat16)
    seen = []
    layers = model.get_base_model().model.layers
    for layer in (layers[0].self_attn.q_proj, layers[0].mlp.up_proj):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    pefts(model, torch.bfloat16)
    ours(model, torch.bfloat16)
    assert seen == [torch.float32] * 4


def test_the_gradient_of_a_wide_input_is_wide(load: Load, tmp_path: Path) -> None:
    """Three layers add their gradients of one input: rounded first, the sum would be narrow."""
    model = make(load, tmp_path, "llama", "nf4", dtype=torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    states = torch.randn(1, NUM_TOKENS, SIZES["hidden_size"], requires_grad=True)
    with fused(fusible(model), torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        output = layer(states)
    output.sum().backward()
    assert states.grad is not None
    assert not torch.equal(states.grad, states.grad.bfloat16().float())


def test_layers_with_one_input_keep_one_copy_of_it(load: Load, tmp_path: Path) -> None:
    model = make(load, tmp_path, "llama", "nf4", dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, fused(fusible(model), torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        attention = model.get_base_model().model.layers[0].self_attn
        states = torch.randn(1, NUM_TOKENS, SIZES["hidden_size"], requires_grad=True)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name)(states)
    inputs = [tensor for tensor in kept if tensor.shape == (NUM_TOKENS, SIZES["hidden_size"])]
    assert len(inputs) == 3
    assert len({tensor.data_ptr() for tensor in inputs}) == 1
    assert inputs[0].dtype == torch.bfloat16


def test_outside_the_context_layers_are_pefts_again(load: Load, tmp_path: Path) -> None:
    model = make(load, tmp_path, "llama", "fp32", dtype=torch.float32)
    layers = fusible(model)
    before = [(type(layer), set(vars(layer))) for layer in layers]
    names = set(model.state_dict())
    with fused(layers, torch.float32):
        assert all(type(layer) is not kind for layer, (kind, _) in zip(layers, before, strict=True))
        assert set(model.state_dict()) == names
    with pytest.raises(RuntimeError), fused(layers, torch.float32):
        model(input_ids=torch.zeros(3))
    assert [(type(layer), set(vars(layer))) for layer in layers] == before


def test_an_update_of_the_adapters_is_seen_by_the_next_context(load: Load, tmp_path: Path) -> None:
    model = make(load, tmp_path, "llama", "nf4", dtype=torch.float32)
    ours(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(1.5)
    assert_same(ours(model), pefts(model))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"lora_bias": True}),
        ("gpt2", {"fan_in_fan_out": True}),
    ],
)
def test_layers_that_compute_something_else_stay_pefts(kind: str, settings: dict[str, Any]) -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4} if kind == "gpt2" else SIZES
    if kind == "llama":
        sizes = {**SIZES, "attention_bias": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    targets = "c_attn" if kind == "gpt2" else "q_proj"
    adapted = get_peft_model(model, LoraConfig(target_modules=[targets], **settings))
    assert fusible(adapted) == []


def test_merged_or_disabled_adapters_stay_pefts(load: Load, tmp_path: Path) -> None:
    model = make(load, tmp_path, "llama", "fp32", dtype=torch.float32)
    assert fusible(model)
    with model.disable_adapter():
        assert fusible(model) == []
    model.merge_adapter()
    assert fusible(model) == []


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantized_weight_is_what_bitsandbytes_computes_with(
    load: Load, tmp_path: Path, base: str
) -> None:
    model = make(load, tmp_path, "llama", base, dtype=torch.float32)
    layer = fusible(model)[0].get_base_layer().train()
    states = torch.randn(5, SIZES["hidden_size"])
    output = layer(states)
    assert torch.allclose(output, states @ dense_weight(layer, torch.float32).mT, atol=1e-5)
