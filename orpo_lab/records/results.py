"""What a run leaves when it ends: `final/`, `summary.json`, plots, samples, the closing table.

The model is saved before anything else is made. What cannot be made then is missing, and said to
be, in the log and in `status.json`; it takes nothing else away.
"""

import contextlib
import dataclasses
import logging
import os
import re
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
from orpo_lab.config.model import EMBEDDED, local_path
from orpo_lab.config.optimizer import Lora
from orpo_lab.data import Data
from orpo_lab.errors import NonFiniteError, UserError, one_line
from orpo_lab.evaluate import Evaluation
from orpo_lab.metrics import HELD_OUT
from orpo_lab.records.plot import draw_training
from orpo_lab.records.run_folder import RunFolder, git_commit, put_in_place, versions
from orpo_lab.redaction import redact
from orpo_lab.tracker.base import Run
from orpo_lab.training.checkpoint import MANIFEST, METRICS
from orpo_lab.training.trainer import TrainStats

log = logging.getLogger(__name__)

# Generations shown side by side; the metrics are over all of them
NUM_SAMPLES = 8

# A row for every held-out pair, before and after; docs/configuration.md says what each column is
SCORES = pa.schema(
    [
        ("pair", pa.int64()),
        ("when", pa.string()),
        ("chosen_logp", pa.float64()),
        ("rejected_logp", pa.float64()),
        ("chosen_tokens", pa.int64()),
        ("correct", pa.bool_()),
        ("generated_tokens", pa.int64()),
        ("repetition", pa.float64()),
    ]
)

# Files of results, besides `final/`
FILES = ("summary.json", "scores.parquet", "plots/training.png", "samples.md")


class Missing(dict[str, str]):
    """What could not be made after the last step, and why."""

    def __init__(self, place: RunFolder) -> None:
        super().__init__()
        self.place = place

    @contextmanager
    def noted(self, name: str, let_through: type[UserError] = NonFiniteError) -> Iterator[None]:
        """Go on where something cannot be made; what lay under its name is of another model.

        Args:
            name: a file of the run folder, or what people call it.
            let_through: what ends the run all the same.

        Raises:
            UserError: the error is of the kind to let through.
            OSError: the run folder takes no more; the next start makes up for it.
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
        """Say that something is missing."""
        self[name] = why
        if name in FILES:
            self.place.file(name).unlink(missing_ok=True)
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
) -> dict[str, Any]:
    """Put the model in place, write the results beside it, and close with a table.

    Args:
        config: the run.
        place: its folder.
        run: the tracked run, which gets the results.
        trained: the folder of the trained model.
        before: the evaluation of the untrained model.
        after: that of the trained model; None: it could not be made, which `missing` says.
        stats: what training cost.
        data: the tokenized pairs.
        missing: gets what cannot be made.

    Returns:
        What stands in `summary.json`.
    """
    # From now on what lies under the results' names is this run's
    config_hash = place.segments()[-1]["config_hash"]
    place.set_status("running", results=config_hash)
    summary = summarize(config_hash, before, after, stats, data, place)
    with missing.noted("versions"):
        summary |= {"versions": versions(), "git_commit": git_commit()}
    card = ""
    with missing.noted("final/README.md"):
        card = model_card(place, config, summary)
    save_final(place, trained, card)
    plot, samples = place.file("plots/training.png"), _samples(before, after)
    title = place.path.resolve().name
    make: dict[str, Callable[[], None]] = {
        "summary.json": lambda: place.write_json("summary.json", summary),
        "scores.parquet": lambda: save_scores(place, before, after),  # type: ignore[arg-type]
        "plots/training.png": lambda: draw_training(place.metrics(), title, plot),
        "samples.md": lambda: place.write("samples.md", samples_text(samples)),
        "tracker": lambda: run.log_results(summary, [plot] if plot.exists() else [], samples),
    }
    if after is None:
        for name in ("scores.parquet", "samples.md"):
            missing.add(name, "there is no evaluation after training")
            del make[name]
    for name, make_result in make.items():
        with missing.noted(name):
            make_result()
    log.info("\n%s\n", _table(summary))
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
    """Return what stands in `summary.json`, but for what made it."""
    return {
        "config_hash": config_hash,
        "before": before.metrics,
        "after": after.metrics if after else {},
        "train": dataclasses.asdict(stats),
        "evaluation_seconds": {
            "before": before.seconds,
            **({"after": after.seconds} if after else {}),
        },
        "dataset_fingerprint": {
            "train": data.report["train"]["fingerprint"],
            "held_out": data.report["held_out"]["fingerprint"],
        },
        # What was changed between the starts of this run, in their order; a plain run has one: {}
        "changes": [segment["changes"] for segment in place.segments()],
    }


def save_scores(place: RunFolder, before: Evaluation, after: Evaluation) -> None:
    """Write `scores.parquet`: every held-out pair's scores, which a comparison of runs rests on."""
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
    folder: Path,
    *,
    dtype: torch.dtype | None,
) -> None:
    """Save the adapter or the whole model, and its tokenizer.

    Args:
        model: with its trained weights.
        tokenizer: saved beside it.
        folder: the one to write to.
        dtype: precision of the base's folder. A whole model that was trained in a wider one is
            rounded to this one in place, so that what is measured is what is saved.
    """
    model.config.get_text_config().use_cache = True
    for adapter in getattr(model, "peft_config", {}).values():
        base = Path(adapter.base_model_name_or_path)
        if base.is_dir():  # or it would be found from this working directory alone
            adapter.base_model_name_or_path = str(base.absolute())
    is_adapter = hasattr(model, "peft_config")
    with contextlib.nullcontext() if is_adapter else _rounded(model, dtype):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _rounded(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Keep a model's weights in `dtype` meanwhile, if that is narrower; the rounding stays."""
    wide = model.dtype
    if dtype is None or dtype.itemsize >= wide.itemsize:
        yield
        return
    log.info("the model is saved in %s, as its base is; checkpoints keep %s", dtype, wide)
    # Not `model.to`: it would round the buffers too, of which some have no copy in the folder
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight in model.parameters():
            weight.data = weight.data.to(wide)


def save_final(place: RunFolder, trained: Path, card: str) -> None:
    """Put the trained model into `final/`, with a card; it takes no room twice where it can."""
    part = place.file("final.part")
    shutil.rmtree(part, ignore_errors=True)
    # peft writes a card too
    ours = shutil.ignore_patterns(MANIFEST, METRICS, "README.md")
    shutil.copytree(trained, part, ignore=ours, copy_function=_link)
    if card:
        (part / "README.md").write_text(card, encoding="utf-8")
    put_in_place(part, place.file("final"))


def _link(source: str, target: str) -> None:
    """Give a file a second name; copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def model_card(place: RunFolder, config: Config, summary: dict[str, Any]) -> str:
    """Return a model card in the hub's format: what was trained, how, and what was measured."""
    is_adapter = isinstance(config.optimizer, Lora)
    is_local = config.model.path != EMBEDDED and local_path(config.model.path).is_dir()
    library = "peft" if is_adapter else "transformers"
    loader = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    # Where a folder lies on this machine is nobody's business: cards are published
    base = local_path(config.model.path).resolve().name if is_local else config.model.path
    base, name = redact([base, config.name or place.path.resolve().name])
    from_where = f"base_model: {base}\n" if not is_local else ""
    moved = (
        f" `adapter_config.json` names the folder of {base}; put its name on the hub there before "
        "you publish this."
        if is_local and is_adapter
        else ""
    )
    code = " Code that comes with it was run." if config.model.trust_remote_code else ""
    figures = (
        f"Measured on {summary['after']['num_pairs']} held-out pairs:\n\n{_table(summary)}"
        if summary["after"]
        else "It was not measured after training."
    )
    return f"""---
{from_where}library_name: {library}
tags: [orpo, orpo_lab]
---
# {name}

{base}, aligned with ORPO (Hong, Lee and Thorne 2024, arXiv:2403.07691) by orpo_lab:
beta {config.beta:g}, {summary["train"]["steps"]} steps of {config.train.batch_size} pairs, seed
{config.seed}. The whole configuration stands in `config.yaml` of the run folder.{code}{moved}

{figures}

```python
from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("final")
tokenizer = AutoTokenizer.from_pretrained("final")
```
"""


def _samples(before: Evaluation, after: Evaluation | None) -> list[dict[str, str]]:
    """Return answers before and after side by side."""
    if after is None:
        return []
    return [
        {"prompt": old.prompt, "chosen": old.chosen, "before": old.answer, "after": new.answer}
        for old, new in zip(before.generations, after.generations, strict=True)
    ][:NUM_SAMPLES]


def samples_text(samples: list[dict[str, str]]) -> str:
    """Return the samples as Markdown."""
    parts = ["# Samples\n\nGreedy answers to held-out prompts, before and after training.\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"\n## {number}\n")
        parts += [f"\n{key}:\n{_fenced(text)}" for key, text in sample.items()]
    return "".join(parts)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def _table(summary: dict[str, Any]) -> str:
    rows = [("held out", "before", "after", "")]
    for metric in HELD_OUT:
        if metric.is_tabled and metric.name in summary["after"]:
            before, after = (f"{summary[when][metric.name]:.3f}" for when in ("before", "after"))
            rows.append((metric.name, before, after, metric.said))
    lines = [f"| {name:19} | {old:>8} | {new:>8} | {about} |" for name, old, new, about in rows]
    return "\n".join([lines[0], f"|{'-' * 21}|{'-' * 9}:|{'-' * 9}:|---|", *lines[1:]])
