from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_lab import config
from orpo_lab.config.optimizer import Lora
from orpo_lab.errors import UserError
from orpo_lab.model.adapter import attach
from orpo_lab.model.weights import load_model

Load = Callable[..., config.Config]


@pytest.mark.parametrize("optimizer", ["qlora", "lora"])
def test_adapters_sit_on_every_projection_and_nothing_else_is_trained(
    load: Load, build_model: Any, optimizer: str
) -> None:
    network = build_model(load(f"optimizer={optimizer}"))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * network.config.num_hidden_layers
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    assert not network.is_gradient_checkpointing


@pytest.mark.parametrize("optimizer", ["qlora", "lora"])
def test_norms_and_residual_stream_are_in_fp32_and_embeddings_as_narrow_as_they_were(
    load: Load, tokenizer: Any, optimizer: str
) -> None:
    loaded = load(f"optimizer={optimizer}")
    assert isinstance(loaded.optimizer, Lora)
    base = load_model(loaded, tokenizer, torch.bfloat16)
    network = attach(base, loaded.optimizer)
    norms = [p for name, p in network.named_parameters() if "norm" in name]
    assert norms
    assert {p.dtype for p in norms} == {torch.float32}
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    assert base.get_output_embeddings().weight.dtype == torch.bfloat16
    seen: list[torch.Tensor] = []
    for layer in base.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(input_ids=ids).logits
    assert {states.dtype for states in seen} == {torch.float32}
    # The same numbers as with embeddings and head in fp32, as peft prepares a quantized base
    for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
        embedding.weight.data = embedding.weight.data.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(input_ids=ids).logits, logits)


def test_settings_reach_the_adapter(load: Load, build_model: Any) -> None:
    network = build_model(load("optimizer.r=4", "optimizer.alpha=2", "optimizer.dropout=0.3"))
    settings = network.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 2, 0.3)


def test_adapters_depend_on_the_seed_alone(load: Load, build_model: Any) -> None:
    def first(seed: int) -> torch.Tensor:
        network = build_model(load(f"seed={seed}"))
        return next(p for name, p in network.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}


def attached(load: Load, kind: str, **settings: Any) -> Any:
    """Put adapters on a model with random weights."""
    own = AutoConfig.for_model(kind, **{**SIZES, **settings})
    lora = load("optimizer=lora").optimizer
    assert isinstance(lora, Lora)
    return attach(AutoModelForCausalLM.from_config(own), lora)


def test_gpt_2_whose_layers_are_transposed_is_adapted_and_merged(load: Load) -> None:
    network = attached(load, "gpt2", num_attention_heads=4).eval()
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    assert sum("lora_A" in name for name, _ in network.named_parameters()) == 2 * 4
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        adapted = network(input_ids=ids).logits
        with network.disable_adapter():
            assert not torch.allclose(adapted, network(input_ids=ids).logits, atol=1e-3)
        merged = network.merge_and_unload()(input_ids=ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)


def test_layers_that_peft_cannot_adapt_are_refused_in_one_line(load: Load) -> None:
    with pytest.raises(UserError, match="adapters cannot be put on MambaForCausalLM") as refusal:
        attached(load, "mamba", state_size=2)
    assert "\n" not in str(refusal.value)


def test_only_the_language_model_is_adapted(load: Load) -> None:
    """A tower that sees has layers of the same names."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97}
    vision = {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    network = attached(
        load,
        "gemma3",
        text_config=sizes | text,
        vision_config=sizes | vision,
        mm_tokens_per_image=4,
        image_token_index=96,
    )
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all(".language_model.layers." in name for name in trained)
