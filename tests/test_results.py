"""The model that a run leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_lab import config
from orpo_lab.records import results

Load = Callable[..., config.Config]


@pytest.mark.parametrize(
    ("base", "saved"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (None, torch.float32)],
)
def test_a_model_is_saved_in_the_precision_of_its_base(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    base: torch.dtype | None,
    saved: torch.dtype,
) -> None:
    loaded = load("optimizer=adamw")
    network = build_model(loaded)
    trained = {name: p.detach().clone() for name, p in network.named_parameters()}
    buffers = {name: one.clone() for name, one in network.named_buffers()}
    results.save_model(network, tokenizer, tmp_path, dtype=base)
    found = load_file(tmp_path / "model.safetensors")
    assert {one.dtype for one in found.values()} == {saved}
    for name, one in found.items():
        assert torch.equal(one, trained[name].to(saved))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == saved
    # What is evaluated next has the weights that were saved, in the precision of the training
    for name, weight in network.named_parameters():
        assert torch.equal(weight, trained[name].to(saved).to(trained[name].dtype))
    for name, one in network.named_buffers():
        assert torch.equal(one, buffers[name])


def test_adapters_stay_in_fp32(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    loaded = load("optimizer=lora")
    results.save_model(build_model(loaded), tokenizer, tmp_path, dtype=torch.bfloat16)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {one.dtype for one in found.values()} == {torch.float32}
