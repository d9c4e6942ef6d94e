"""What a run leaves of the model that it trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_lab import config, report

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
    network = build_model(load("optimizer=adamw"))
    trained = {name: p.detach().clone() for name, p in network.named_parameters()}
    report.save_model(network, tokenizer, tmp_path, dtype=base)
    found = load_file(tmp_path / "model.safetensors")
    assert {one.dtype for one in found.values()} == {saved}
    for name, one in found.items():
        assert torch.equal(one, trained[name].to(saved))
        # What is measured afterwards is what was saved
        assert torch.equal(network.get_parameter(name), one.float())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == saved


def test_adapters_stay_in_fp32(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    report.save_model(
        build_model(load("optimizer=lora")), tokenizer, tmp_path, dtype=torch.bfloat16
    )
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {one.dtype for one in found.values()} == {torch.float32}
