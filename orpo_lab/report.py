"""What a run leaves when it ends: `final/`, `summary.json`, plots, samples, the closing table."""

import dataclasses
import logging
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Config, Lora
from orpo_lab.data import Data
from orpo_lab.errors import UserError, one_line
from orpo_lab.evaluate import Evaluation
from orpo_lab.masking import mask
from orpo_lab.plot import draw_training
from orpo_lab.run_folder import RunFolder, git_commit, put_in_place, versions
from orpo_lab.tracker import Run
from orpo_lab.trainer import TrainStats

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

# Metric, what it is, which way is better
SHOWN = (
    ("preference_accuracy", "higher is better"),
    ("logp_margin", "nats, higher is better"),
    ("log_odds", "higher is better"),
    ("chosen_nll", "nats, lower is better"),
    ("chosen_perplexity", "lower is better"),
    ("exact_match", "higher is better"),
    ("generated_tokens", "mean length"),
    ("repetition", "lower is better"),
)


def summarize(
    before: Evaluation, after: Evaluation, stats: TrainStats, data: Data, place: RunFolder
) -> dict[str, Any]:
    """Write `summary.json` and return what stands in it."""
    summary = {
        "before": before.metrics,
        "after": after.metrics,
        "train": dataclasses.asdict(stats),
        "evaluation_seconds": {"before": before.seconds, "after": after.seconds},
        "dataset_fingerprint": {
            "train": data.report["train"]["fingerprint"],
            "held_out": data.report["held_out"]["fingerprint"],
        },
        # What was changed between the starts of this run, in their order; a plain run has one: {}
        "changes": [one["changes"] for one in place.segments()],
        "versions": versions(),
        "git_commit": git_commit(),
    }
    place.write_json("summary.json", summary)
    return summary


def save_scores(place: RunFolder, before: Evaluation, after: Evaluation) -> None:
    """Write `scores.parquet`: every held-out pair's scores, which a comparison of runs rests on."""
    tables = []
    for when, evaluation in (("before", before), ("after", after)):
        columns = evaluation.by_pair()
        num = len(columns["chosen_logp"])
        columns = {"pair": list(range(num)), "when": [when] * num, **columns}
        tables.append(pa.table(columns, schema=SCORES))
    part = place.path / "scores.parquet.part"
    pq.write_table(pa.concat_tables(tables), part)
    put_in_place(part, place.path / "scores.parquet")


def save_final(
    place: RunFolder,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    summary: dict[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """Save the adapter or the model, its tokenizer and a model card to `final/`.

    A model is saved in `dtype`, the precision of the base's folder, where that is narrower than the
    one that it was trained in. Its weights are rounded in place.
    """
    part = place.path / "final.part"
    model.config.get_text_config().use_cache = True
    is_adapter = isinstance(config.optimizer, Lora)
    if not is_adapter and dtype is not None and dtype.itemsize < model.dtype.itemsize:
        log.info("final/ is in %s, as the base is; checkpoints keep %s", dtype, model.dtype)
        model.to(dtype)
    try:
        model.save_pretrained(part)
    except SafetensorError as error:  # its own, for what the operating system says
        raise UserError(f"{part} cannot be written: {one_line(error)}") from error
    tokenizer.save_pretrained(part)
    (part / "README.md").write_text(model_card(place, config, summary), encoding="utf-8")
    put_in_place(part, place.path / "final")


def model_card(place: RunFolder, config: Config, summary: dict[str, Any]) -> str:
    """Return a model card in the hub's format: what was trained, how, and what was measured."""
    is_adapter = isinstance(config.optimizer, Lora)
    library = "peft" if is_adapter else "transformers"
    loader = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    base, name = mask([config.model.path, config.name or place.path.name])
    code = " Code that comes with it was run." if config.model.trust_remote_code else ""
    return f"""---
base_model: {base}
library_name: {library}
tags: [orpo, orpo_lab]
---
# {name}

{base}, aligned with ORPO (Hong, Lee and Thorne 2024, arXiv:2403.07691) by orpo_lab:
beta {config.beta:g}, {summary["train"]["steps"]} steps of {config.train.batch_size} pairs, seed
{config.seed}. The whole configuration stands in `config.yaml` of the run folder.{code}

Measured on {summary["after"]["num_pairs"]} held-out pairs:

{_table(summary)}

```python
from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("final")
tokenizer = AutoTokenizer.from_pretrained("final")
```
"""


def publish(
    place: RunFolder, run: Run, before: Evaluation, after: Evaluation, summary: dict[str, Any]
) -> None:
    """Draw the plot, write the samples, send both to the tracker and close with a table."""
    plot = place.path / "plots" / "training.png"
    draw_training(place.metrics(), place.path.name, plot)
    samples = [
        {"prompt": old.prompt, "chosen": old.chosen, "before": old.answer, "after": new.answer}
        for old, new in zip(before.generations, after.generations, strict=True)
    ][:NUM_SAMPLES]
    place.write("samples.md", samples_text(samples))
    run.report(summary, [plot], samples)
    log.info(
        "\n%s\n\nrun folder  %s\nmodel       %s\nplot        %s",
        _table(summary),
        place.path,
        place.path / "final",
        plot,
    )


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
    for key, about in SHOWN:
        if key in summary["after"]:
            before, after = (f"{summary[when][key]:.3f}" for when in ("before", "after"))
            rows.append((key, before, after, about))
    lines = [f"| {name:19} | {old:>8} | {new:>8} | {about} |" for name, old, new, about in rows]
    return "\n".join([lines[0], f"|{'-' * 21}|{'-' * 9}:|{'-' * 9}:|---|", *lines[1:]])
