"""The model that a run leaves."""

import dataclasses
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_lab import config
from orpo_lab.data import Data
from orpo_lab.errors import UserError
from orpo_lab.evaluate import Evaluation, Generation, Scores
from orpo_lab.records import card, results
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.tracker.base import Untracked
from orpo_lab.training.checkpoint import MANIFEST, METRICS
from orpo_lab.training.files import Files
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
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    results.save_model(network, tokenizer, Files(tmp_path), dtype=base)
    found = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {saved}
    for name, weight in found.items():
        # Both of the numbers beside the trained one are right
        step = torch.finfo(saved).eps * trained[name].abs()
        assert ((weight.float() - trained[name]).abs() <= step * (saved != torch.float32)).all()
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (read.dtype, read.config.use_cache) == (saved, True)
    # What is evaluated next has the weights that were saved, in the precision of the training
    for name, weight in network.named_parameters():
        assert torch.equal(weight, found[name].float())
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_changes_smaller_than_half_a_step_of_the_base_are_kept(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    network = build_model(load("optimizer=adamw"))
    base = {name: p.detach().bfloat16() for name, p in network.named_parameters()}
    saved = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        for name, weight in network.named_parameters():
            weight.data = base[name].float() * (1 + 2**-11)
        results.save_model(network, tokenizer, Files(folder), dtype=torch.bfloat16)
        saved.append(load_file(folder / "model.safetensors"))
    # The steps of bf16 are 2**-8 to 2**-7 of a number
    sizes = [sum(w.double().abs().sum() for w in each.values()) for each in (saved[0], base)]
    assert float(sizes[0] / sizes[1]) - 1 == pytest.approx(2**-11, rel=0.05)
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in base)


def test_adapters_stay_in_fp32(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    loaded = load("optimizer=lora")
    results.save_model(build_model(loaded), tokenizer, Files(tmp_path), dtype=torch.bfloat16)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.float32}


def evaluation(quality: float, answer: str, seconds: float) -> Evaluation:
    logps = torch.tensor([quality - 1, -2.0])
    scores = Scores(logps, logps - 1, torch.tensor([3.0, 4.0]))
    given = Generation(
        prompt="ask",
        chosen="right",
        answer=answer,
        num_tokens=2,
        repetition=0.0,
        correct=None,
        asked="why?",
    )
    return Evaluation({"preference_accuracy": quality, "num_pairs": 2}, scores, [given], seconds)


BEFORE, AFTER = evaluation(0.25, "no", 3.0), evaluation(0.75, "yes", 5.0)


@pytest.fixture
def place(tmp_path: Path) -> RunFolder:
    """A run folder whose run has begun twice, the second time with another beta."""
    folder = RunFolder(tmp_path / "run")
    starts = [
        {"config_hash": "first", "changes": {}},
        {"config_hash": "second", "changes": {"beta": [0.1, 0.2]}},
    ]
    folder.write_json("segments.json", starts)
    folder.append_metrics(1, {"loss": 0.5})
    return folder


def test_samples_say_which_answers_are_right_where_answers_are_checked() -> None:
    def judged(whole: Evaluation, *, correct: bool, is_cut: bool) -> Evaluation:
        one = dataclasses.replace(whole.generations[0], correct=correct, is_cut=is_cut)
        return dataclasses.replace(whole, metrics={"num_checked": 1}, generations=[one])

    before = judged(BEFORE, correct=False, is_cut=True)
    after = judged(AFTER, correct=True, is_cut=False)
    text = results.samples_text(results._samples(before, after))
    assert "before (wrong: cut at max_new_tokens):\n```text\nno\n" in text
    assert "after (right):\n```text\nyes\n" in text
    assert "(" not in results.samples_text(results._samples(BEFORE, AFTER))


def leave(load: Load, place: RunFolder, *overrides: str) -> dict[str, Any]:
    """Leave the results of a run of one step whose trained model is an empty file."""
    trained = place.file("checkpoints/trained-1")
    trained.mkdir(parents=True)
    for name in (MANIFEST, METRICS, "README.md", "model.safetensors"):
        (trained / name).write_text("of the trained model")
    report: Any = {split: {"fingerprint": split} for split in ("train", "held_out")}
    return results.leave(
        load(*overrides),
        place,
        Untracked(),
        trained=trained,
        before=BEFORE,
        after=AFTER,
        stats=TrainStats(1, 2.0, 3.0, 4.0, 5, 0, "cpu", None),
        data=Data(None, None, report),
        missing=results.Missing(place),
    )


def test_what_was_before_and_what_came_after_are_not_swapped(load: Load, place: RunFolder) -> None:
    summary = leave(load, place)
    assert summary == place.read_json("summary.json")
    assert summary["evaluation_seconds"] == {"before": 3.0, "after": 5.0}
    assert (summary["before"], summary["after"]) == (BEFORE.metrics, AFTER.metrics)
    assert summary["changes"] == [{}, {"beta": [0.1, 0.2]}]
    assert summary["dataset_fingerprint"] == {"train": "train", "held_out": "held_out"}
    (sample,) = results._samples(BEFORE, AFTER)
    shown = {"prompt": "ask", "chosen": "right", "before": "no", "after": "yes"}
    assert sample == shown | {"asked": "why?"}
    row = card.table(summary).splitlines()[2]
    assert row.index("0.250") < row.index("0.750")
    rows = pq.read_table(place.file("scores.parquet")).to_pylist()
    assert [(score["pair"], score["when"], score["chosen_logp"]) for score in rows] == [
        (0, "before", -0.75),
        (1, "before", -2.0),
        (0, "after", -0.25),
        (1, "after", -2.0),
    ]


def test_a_measured_run_says_how_much_of_its_gradient_was_preference(
    load: Load, place: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    caplog.set_level(logging.INFO)
    for step, share in ((2, 0.05), (4, 0.07), (6, 0.15)):
        place.append_metrics(step, {"meter/preference_share": share})
    assert leave(load, place)["train"]["preference_share"] == pytest.approx(0.09)
    assert (
        "Of the steps' gradient, 9.0% is preference (mean of 3 measured steps; 5.0% at step 2 and "
        "15.0% at step 6)" in caplog.text
    )


def test_a_run_without_a_meter_says_nothing_of_it(
    load: Load, place: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    caplog.set_level(logging.INFO)
    assert "preference_share" not in leave(load, place)["train"]
    assert "gradient" not in caplog.text


def test_final_is_the_trained_model_with_a_card_and_nothing_of_the_checkpoint(
    load: Load, place: RunFolder
) -> None:
    leave(load, place, "optimizer=galore")
    assert {file.name for file in place.file("final").iterdir()} == {
        "model.safetensors",
        "README.md",
    }
    text = place.file("final/README.md").read_text()
    assert "model = AutoModelForCausalLM.from_pretrained" in text


def test_a_card_says_how_beta_went_and_what_a_step_was_of(load: Load, place: RunFolder) -> None:
    rows = ("dataset=unpaired", "dataset.train_path=rows.jsonl")
    leave(load, place, "method=kto", "beta_schedule=cosine", "beta=0.3", *rows)
    text = place.file("final/README.md").read_text()
    assert "\nbeta 0.3 to 0 (cosine), 1 steps of 16 completions, seed\n" in text


def test_results_are_put_down_to_the_last_start_before_the_first_is_written(
    load: Load, place: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("the disk went away")

    monkeypatch.setattr(results, "save_final", fail)
    with pytest.raises(UserError, match="went away"):
        leave(load, place)
    assert place.status()["results"] == "second"


def test_what_cannot_be_made_is_missing_and_a_disk_in_trouble_is_no_such_thing(
    place: RunFolder,
) -> None:
    missing = results.Missing(place)
    for name in ("samples.md", "summary.json"):
        place.write(name, "of an earlier model")
    with missing.noted("samples.md"):
        raise ValueError("no words")
    assert missing == {"samples.md": "ValueError: no words"}
    assert not place.file("samples.md").exists()
    full = OSError(errno.ENOSPC, "No space left", str(place.file("summary.json")))
    with pytest.raises(OSError, match="No space left"), missing.noted("summary.json"):
        raise full
    assert place.file("summary.json").exists()
