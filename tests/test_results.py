"""The model that a run leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_lab import config
from orpo_lab.data import Data
from orpo_lab.evaluate import Evaluation, Generation, Scores
from orpo_lab.records import results
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.training.trainer import TrainStats

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


def evaluation(quality: float, answer: str, seconds: float) -> Evaluation:
    scores = Scores(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([3.0]))
    given = Generation(
        prompt="ask", chosen="right", answer=answer, num_tokens=2, repetition=0.0, correct=None
    )
    return Evaluation({"preference_accuracy": quality, "num_pairs": 1}, scores, [given], seconds)


def test_what_was_before_and_what_came_after_are_not_swapped(tmp_path: Path) -> None:
    before, after = evaluation(0.25, "no", 3.0), evaluation(0.75, "yes", 5.0)
    stats = TrainStats(1, 2.0, 3.0, 4.0, 5, 0, "cpu", None)
    report: Any = {split: {"fingerprint": split} for split in ("train", "held_out")}
    pairs = Data(None, None, report, checkable=False)
    place = RunFolder(tmp_path)
    place.write_json("segments.json", [{"changes": {}}, {"changes": {"beta": [0.1, 0.2]}}])
    summary = results.summarize("hash", before, after, stats, pairs, place)
    assert summary["evaluation_seconds"] == {"before": 3.0, "after": 5.0}
    assert summary["before"]["preference_accuracy"] == 0.25
    assert summary["after"]["preference_accuracy"] == 0.75
    assert summary["changes"] == [{}, {"beta": [0.1, 0.2]}]
    assert summary["dataset_fingerprint"] == {"train": "train", "held_out": "held_out"}
    (sample,) = results._samples(before, after)
    assert sample == {"prompt": "ask", "chosen": "right", "before": "no", "after": "yes"}
    row = results._table(summary).splitlines()[2]
    assert row.index("0.250") < row.index("0.750")
