"""What a run leaves in `final/`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_lab import config, report
from orpo_lab.run_folder import RunFolder

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
    monkeypatch: pytest.MonkeyPatch,
    base: torch.dtype | None,
    saved: torch.dtype,
) -> None:
    monkeypatch.setattr(report, "model_card", lambda *_: "")
    loaded = load("optimizer=adamw")
    network = build_model(loaded)
    trained = {name: p.detach().clone() for name, p in network.named_parameters()}
    report.save_final(RunFolder(tmp_path), network, tokenizer, loaded, {}, base)
    found = load_file(tmp_path / "final" / "model.safetensors")
    assert {one.dtype for one in found.values()} == {saved}
    for name, one in found.items():
        assert torch.equal(one, trained[name].to(saved))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").dtype == saved


def test_adapters_stay_in_fp32(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "model_card", lambda *_: "")
    loaded = load("optimizer=lora")
    report.save_final(
        RunFolder(tmp_path), build_model(loaded), tokenizer, loaded, {}, torch.bfloat16
    )
    found = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert {one.dtype for one in found.values()} == {torch.float32}
