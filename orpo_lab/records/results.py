"""The results of a run: `final/`, `summary.json`, plots, samples, the closing table.

The trained model is saved before any result is made. A result that cannot be made is missing: the
log and `status.json` say so. The other results are made all the same.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Config
from orpo_lab.config.model import BASE
from orpo_lab.data import Data
from orpo_lab.errors import NonFiniteError, UserError, one_line
from orpo_lab.evaluate import Evaluation
from orpo_lab.metrics import PREFERENCE_SHARE
from orpo_lab.optimizer.write_back import round_to
from orpo_lab.records.card import model_card, table
from orpo_lab.records.markdown import fenced
from orpo_lab.records.plot import draw_training
from orpo_lab.records.run_folder import RunFolder, git_commit, put_in_place, versions
from orpo_lab.tracker.base import Run
from orpo_lab.training.checkpoint import MANIFEST, METRICS
from orpo_lab.training.files import Files, link
from orpo_lab.training.parts import local
from orpo_lab.training.tensors import save_pretrained
from orpo_lab.training.trainer import TrainStats

log = logging.getLogger(__name__)

# How many answers are shown before and after, and what of each; `samples.json` has all of them
NUM_SAMPLES = 8
SHOWN = ("prompt", "chosen", "before", "before_is", "after", "after_is")

# A row for every held-out pair, before and after training; docs/configuration.md explains each
# column
SCORES = pa.schema(
    [
        ("pair", pa.int64()),
        ("when", pa.string()),
        ("chosen_logp", pa.float64()),
        ("rejected_logp", pa.float64()),
        ("length_guess", pa.float64()),
        ("chosen_tokens", pa.int64()),
        ("correct", pa.bool_()),
        ("generated_tokens", pa.int64()),
        ("repetition", pa.float64()),
    ]
)

# Files of results, besides `final/`
FILES = ("summary.json", "scores.parquet", "plots/training.png", "samples.md", "samples.json")


class Missing(dict[str, str]):
    """What could not be made after the last step, by name, and why.

    Args:
        place: the run folder.
    """

    def __init__(self, place: RunFolder) -> None:
        super().__init__()
        self.place = place

    @contextmanager
    def noted(self, name: str, let_through: type[UserError] = NonFiniteError) -> Iterator[None]:
        """Inside this context, note a result that cannot be made, and go on.

        An earlier file of results with that name is deleted: it belongs to another model.

        Args:
            name: a file of the run folder, or another name of the result.
            let_through: errors of this type are raised, and so end the run.

        Raises:
            UserError: the error is of the type `let_through`.
            OSError: the run folder cannot be written to; the next start makes the results.
        """
        try:
            yield
        except let_through:
            raise
        except Exception as error:
            if isinstance(error, OSError) and self.place.is_in_trouble(error):
                raise
            self.add(name, one_line(f"{type(error).__name__}: {error}")[:200])
            log.debug("", exc_info=True)

    def add(self, name: str, why: str) -> None:
        """Note and log that a result is missing; delete an earlier file of that name."""
        self[name] = why
        if name in FILES:
            self.place.remove(name)
        log.warning("warning: %s is missing (%s); the model is not touched by it", name, why)

    def __str__(self) -> str:
        return "without " + "; ".join(f"{name} ({why})" for name, why in self.items())


def leave(
    config: Config,
    place: RunFolder,
    run: Run,
    *,
    trained: Path,
    before: Evaluation,
    after: Evaluation | None,
    stats: TrainStats,
    data: Data,
    missing: Missing,
    judge: Callable[[list[dict[str, str]]], dict[str, Any]] = lambda samples: {},
    start: str = "",
    planned: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the model into `final/`, write the other results, and log a table of the figures.

    Args:
        config: the run's configuration.
        place: the run folder.
        run: the tracked run, which gets the results.
        trained: the folder of the trained model.
        before: the evaluation of the untrained model.
        after: the evaluation of the trained model; None: it failed, as `missing` says.
        stats: the cost of training.
        data: the tokenized pairs.
        missing: notes the results that cannot be made.
        judge: returns figures about the answers of `samples.json`, or none.
        start: what the run started from, in words; empty: from `model.path` alone.
        planned: what the run was planned to take; None: there is no plan.

    Returns:
        The content of `summary.json`.
    """
    # From now on, files with the names of results belong to this run
    config_hash = place.segments()[-1]["config_hash"]
    place.set_status("running", results=config_hash)
    summary = summarize(config_hash, before, after, stats, data, place)
    if planned:
        summary["plan"] = beside_measured(planned, stats)
    with missing.noted("versions"):
        summary |= {"versions": versions(), "git_commit": git_commit()}
    card = ""
    with missing.noted("final/README.md"):
        has_base = (trained / BASE).is_dir()
        card = model_card(place, config, summary, start=start, has_base=has_base)
    save_final(place, trained, card)
    plot, samples = place.file("plots/training.png"), _samples(before, after)
    shown = [
        {key: sample[key] for key in SHOWN if key in sample} for sample in samples[:NUM_SAMPLES]
    ]
    title = place.path.resolve().name
    make: dict[str, Callable[[], None]] = {
        "summary.json": lambda: place.write_json("summary.json", summary),
        "scores.parquet": lambda: save_scores(place, before, after),  # type: ignore[arg-type]
        "plots/training.png": lambda: draw_training(place.metrics(), title, plot),
        "samples.md": lambda: place.write("samples.md", samples_text(shown)),
        "samples.json": lambda: place.write("samples.json", json.dumps(samples, indent=2) + "\n"),
    }
    if after is None:
        for name in ("scores.parquet", "samples.md", "samples.json"):
            missing.add(name, "there is no evaluation after training")
            del make[name]
    for name, make_result in make.items():
        with missing.noted(name):
            make_result()
    # Last, since a judge may be slow, and a tracker too
    if judged := judge(samples):
        summary |= judged
        with missing.noted("summary.json"):
            place.write_json("summary.json", summary)
    with missing.noted("tracker"):
        run.log_results(summary, [plot] if plot.exists() else [], shown)
    log.info("\n%s\n", table(summary))
    if said := preference_said(place.metrics()):
        log.info("%s\n", said)
    for name, file in {"run folder": "", "model": "final", "plot": "plots/training.png"}.items():
        if file not in missing:
            log.info("%-10s  %s", name, place.file(file))
    return summary


def summarize(
    config_hash: str,
    before: Evaluation,
    after: Evaluation | None,
    stats: TrainStats,
    data: Data,
    place: RunFolder,
) -> dict[str, Any]:
    """Return the content of `summary.json`, without the versions and the commit."""
    shares = [share for _, share in preference_shares(place.metrics())]
    measured = {"preference_share": sum(shares) / len(shares)} if shares else {}
    checked = data.report["held_out"].get("right_answers")
    return {
        "config_hash": config_hash,
        "before": before.metrics,
        "after": after.metrics if after else {},
        "train": dataclasses.asdict(stats) | measured,
        "evaluation_seconds": {
            "before": before.seconds,
            **({"after": after.seconds} if after else {}),
        },
        "dataset_fingerprint": {
            "train": data.report["train"]["fingerprint"],
            "held_out": data.report["held_out"]["fingerprint"],
        },
        # How answers were checked; see `data.right_answers.fingerprint`
        **({"right_answers": checked} if checked else {}),
        # What was changed at each start of this run, in order; {} for an unchanged start
        "changes": [segment["changes"] for segment in place.segments()],
    }


def beside_measured(planned: dict[str, Any], stats: TrainStats) -> dict[str, Any]:
    """Return a plan with what was measured beside it.

    Args:
        planned: what `plan.check.record` returns.
        stats: the cost of training. On a CPU its peak is that of the process, libraries included.
    """
    return {
        "planned": planned,
        "measured": {
            "peak_bytes": stats.peak_memory_bytes,
            "seconds_of_steps": stats.wall_seconds,
        },
    }


def preference_shares(lines: list[dict[str, float]]) -> list[tuple[int, float]]:
    """Return the steps that the meter of preference has measured, and the share at each of them.

    Args:
        lines: the lines of `metrics.jsonl`.
    """
    return [
        (int(line["step"]), line[PREFERENCE_SHARE]) for line in lines if PREFERENCE_SHARE in line
    ]


def preference_said(lines: list[dict[str, float]]) -> str:
    """Return a sentence that says how much of the gradient was preference; empty: not measured.

    Args:
        lines: the lines of `metrics.jsonl`.
    """
    shares = preference_shares(lines)
    if not shares:
        return ""
    (first, share), (last, share_of_last) = shares[0], shares[-1]
    if first == last:
        return f"Of the gradient of step {first}, {share:.1%} is preference"
    mean = sum(share for _, share in shares) / len(shares)
    return (
        f"Of the steps' gradient, {mean:.1%} is preference (mean of {len(shares)} measured steps; "
        f"{share:.1%} at step {first} and {share_of_last:.1%} at step {last})"
    )


def save_scores(place: RunFolder, before: Evaluation, after: Evaluation) -> None:
    """Write `scores.parquet`: the scores of every held-out pair, which a comparison needs."""
    tables = []
    for when, evaluation in (("before", before), ("after", after)):
        columns = evaluation.by_pair()
        num = len(columns["chosen_logp"])
        columns = {"pair": list(range(num)), "when": [when] * num, **columns}
        tables.append(pa.table(columns, schema=SCORES))
    part = place.file("scores.parquet.part")
    pq.write_table(pa.concat_tables(tables), part)
    put_in_place(part, place.file("scores.parquet"))


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    files: Files,
    *,
    dtype: torch.dtype | None,
) -> None:
    """Save the adapter or the whole model, and its tokenizer.

    Args:
        model: with its trained weights.
        tokenizer: saved in the same folder.
        files: the files to write, of a checkpoint.
        dtype: precision of the weights in the base's folder. If a whole model was trained in a
            wider precision, its weights are rounded to `dtype` in place, as `round_to` does. So the
            model that is measured after this is the model that is saved.
    """
    model.config.get_text_config().use_cache = True
    for adapter in getattr(model, "peft_config", {}).values():
        base = Path(adapter.base_model_name_or_path)
        if base.is_dir():  # a relative path would be valid in this working directory only
            adapter.base_model_name_or_path = str(base.absolute())
    is_adapter = hasattr(model, "peft_config")
    with contextlib.nullcontext() if is_adapter else _rounded(model, dtype):
        save_pretrained(model, files)
    tokenizer.save_pretrained(files.folder)


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype | None) -> None:
    """Round the weights of a model that was trained whole to a dtype, if that is narrower.

    The weights keep their own dtype, and saving rounds them no further. So the model that is
    measured is the model that is saved.
    """
    if dtype is None or hasattr(model, "peft_config"):
        return
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for weight in map(local, model.parameters()):
        if dtype.itemsize < weight.dtype.itemsize:
            weight.copy_(round_to(weight, dtype, generator))


@contextmanager
def _rounded(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside this context, hold a model's weights in `dtype`, if that is narrower.

    Afterwards the weights have their own dtype again, but their values stay rounded.
    """
    wide = model.dtype
    if dtype is None or dtype.itemsize >= wide.itemsize:
        yield
        return
    log.info("the model is saved in %s, as its base is; checkpoints keep %s", dtype, wide)
    round_weights(model, dtype)
    # Not `model.to`: it would also round the buffers, some of which are not saved in the folder
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight in model.parameters():
            weight.data = weight.data.to(wide)


def save_final(place: RunFolder, trained: Path, card: str) -> None:
    """Put the trained model into `final/`, with a card.

    Files are hard links to those of the trained model if the file system allows this, so that the
    model takes no room twice.
    """
    part = place.file("final.part")
    shutil.rmtree(part, ignore_errors=True)
    # peft writes a README.md too, which our card replaces
    ours = shutil.ignore_patterns(MANIFEST, METRICS, "README.md")
    shutil.copytree(trained, part, ignore=ours, copy_function=link)
    if card:
        (part / "README.md").write_text(card, encoding="utf-8")
    put_in_place(part, place.file("final"))


def _samples(before: Evaluation, after: Evaluation | None) -> list[dict[str, str]]:
    """Return the answers before and after training to every prompt that was answered."""
    if after is None:
        return []
    samples = []
    is_checked = "num_checked" in before.metrics
    for old, new in zip(before.generations, after.generations, strict=True):
        sample = {"prompt": old.prompt, "asked": old.asked, "chosen": old.chosen}
        for when, one in (("before", old), ("after", new)):
            sample |= {when: one.answer} | ({f"{when}_is": one.judged} if is_checked else {})
        samples.append(sample)
    return samples


def samples_text(samples: list[dict[str, str]]) -> str:
    """Return the samples as Markdown."""
    parts = ["# Samples\n\nGreedy answers to held-out prompts, before and after training.\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"\n## {number}\n")
        for key in ("prompt", "chosen", "before", "after"):
            said = f" ({sample[f'{key}_is']})" if f"{key}_is" in sample else ""
            parts.append(f"\n{key}{said}:\n{fenced(sample[key])}")
    return "".join(parts)
