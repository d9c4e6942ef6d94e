"""Do exports answer like their runs? Read in a fresh process by transformers and peft alone.

    python benchmarks/export.py OUT --model SMOLLM2 --pairs PAIRS    half an hour on one core
    python benchmarks/export.py OUT --fp32 --model SMOLLM2 --pairs PAIRS    runs and exports in fp32
    python benchmarks/export.py OUT                                  the embedded model: minutes

Trains a few steps with every optimizer, each in a folder of OUT (a finished run is not trained
again), and exports the results: adapters as they are, and merged. Every export is then read in a
process that knows nothing of the lab, and compared with what the run has recorded: the
log-probabilities in scores.parquet and the answers in samples.json. An adapter is read in fp32 and,
to show what that costs, in bf16. The last line of the output is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from methods import FILES, machine
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orpo_lab import compose, train
from orpo_lab.__main__ import main as command
from orpo_lab.export.check import Replies, compare, recorded
from orpo_lab.finished import FinishedRun
from orpo_lab.model.quantization import settings
from orpo_lab.model.source import locate
from orpo_lab.records.run_folder import RunFolder, versions

# Few steps: what a merge loses is largest where training has changed little
RUN = (
    "dataset.num_train=64",
    "dataset.num_eval=10",
    "dataset.num_generations=3",
    "dataset.max_new_tokens=16",
    "train.batch_size=4",
    "train.max_steps=4",
    "train.warmup_steps=0",
    "tracker=none",
)
SMOLLM2 = ("model=smollm2_135m", "dataset=jsonl", "dataset.max_length=256")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPTIMIZERS = {"qlora": "2e-4", "lora": "2e-4", "galore": "5e-5", "adamw": "2e-5"}
# Not an export: what peft's own merge comes to
BY_PEFT = ("by peft",)
# Of each optimizer the exports, by the arguments of the command
EXPORTS: dict[str, dict[str, tuple[str, ...]]] = {
    "qlora": {
        "adapter": ("--base", NAME),
        "merged, dequantized": ("--merge",),
        "merged, 16bit": ("--merge", "--into", "16bit"),
    },
    "lora": {
        "adapter": ("--base", NAME),
        "merged": ("--merge",),
        "merged by peft": BY_PEFT,
    },
    "galore": {"model": ()},
    "adamw": {"model": ()},
}
READER = Path(__file__).with_name("export_reader.py")


def train_one(folder: Path, optimizer: str, overrides: Sequence[str]) -> None:
    """Train a run, unless it has finished."""
    if not RunFolder(folder).is_complete():
        given = [f"optimizer={optimizer}", f"optimizer.learning_rate={OPTIMIZERS[optimizer]}"]
        train(compose(*RUN, *overrides, *given), folder)


def export(run: Path, name: str, arguments: Sequence[str]) -> Path | None:
    """Export a run, unless that is done; None: the command has refused the export."""
    folder = run.with_name(f"{run.name}-{name.replace(', ', '-').replace(' ', '-')}")
    if not folder.is_dir():
        try:
            command(["export", str(run), "--to", str(folder), *arguments])
        except SystemExit as refusal:
            print(refusal)
    return folder if folder.is_dir() else None


def merge_by_peft(run: Path) -> Path:
    """Merge the adapter of a LoRA run by peft itself, into its base as it is stored."""
    folder = run.with_name(f"{run.name}-merged-by-peft")
    if not folder.is_dir():
        finished = FinishedRun(run)
        base = AutoModelForCausalLM.from_pretrained(str(locate(finished.origin.base.model)))
        PeftModel.from_pretrained(base, run / "final").merge_and_unload().save_pretrained(folder)
        finished.tokenizer.save_pretrained(folder)
    return folder


def jobs(run: Path, folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what fresh processes are to read of an export, by a name for the table."""
    finished = FinishedRun(run)
    asks, columns = finished.config.dataset, ["prompt_ids", "chosen_ids", "rejected_ids"]
    job: dict[str, Any] = {
        "folder": str(folder),
        "base": None,
        "quantization": None,
        "dtype": "auto",
        "plain": False,
        "pairs": finished.pairs.held_out.select_columns(columns).to_list(),
        "num_answers": asks.num_generations,
        "max_new_tokens": asks.max_new_tokens,
    }
    if not (folder / "adapter_config.json").is_file():
        yield name, job
        return
    base = finished.origin.base
    for dtype in ("float32", "bfloat16"):
        asked = settings(base.quantization, getattr(torch, dtype))
        quantization = None if asked is None else {**asked.to_dict()}
        place = {"base": str(locate(base.model)), "quantization": quantization, "dtype": dtype}
        yield f"{name}, read in {dtype}", job | place
        if quantization and dtype == "float32":
            yield f"{name}, read in {dtype}, plain products", job | place | {"plain": True}


def measure(run: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return how far the replies of a fresh process are from what a run has recorded."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(READER)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    found, finished = json.loads(done.stdout.splitlines()[-1]), FinishedRun(run)
    before, after = (recorded(finished, when) for when in ("before", "after"))
    none: list[list[int]] = []
    difference = compare(Replies(torch.tensor(found["logps"]), none), Replies(after, none), before)
    samples = RunFolder(run).read_json("samples.json")
    pairs = zip(samples, found["answers"], strict=True)
    equal = sum(sample["after"] == answer for sample, answer in pairs)
    kept = {"kept": difference.kept, "kept_error": difference.kept_error}
    answers = {"equal": equal, "answers": len(samples)}
    return {"largest": difference.largest, "mean": difference.mean} | kept | answers


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the measurements as a table of Markdown."""
    head = "| run, export | largest | mean | kept | answers equal |\n|---|---:|---:|---:|---:|"
    lines = [
        f"| {name} | {row['largest']:.2g} | {row['mean']:.2g} | "
        f"{row['kept']:.1%} ± {row['kept_error']:.1%} | {row['equal']} of {row['answers']} |"
        for name, row in rows.items()
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Train, export, read and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the runs and the exports")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2; none: the embedded model")
    parser.add_argument("--pairs", type=Path, help="folder of the pairs, with SmolLM2")
    parser.add_argument("--workload", choices=FILES, default="math", help="which of the pairs")
    parser.add_argument("--fp32", action="store_true", help="train in fp32, and export fp32 models")
    options = parser.parse_args()
    overrides: list[str] = []
    if options.model:
        if not options.pairs:
            parser.error("--model needs --pairs")
        train_path, eval_path = (options.pairs / name for name in FILES[options.workload])
        places = [f"model.path={options.model}", f"dataset.train_path={train_path}"]
        overrides = [*SMOLLM2, *places, f"dataset.eval_path={eval_path}"]
    if options.fp32:
        overrides.append("model.dtype=fp32")
    rows, refused = {}, []
    for optimizer, exports in EXPORTS.items():
        run = options.out / optimizer
        train_one(run, optimizer, overrides)
        for name, arguments in exports.items():
            if arguments == BY_PEFT:
                folder: Path | None = merge_by_peft(run)
            else:
                is_whole = name != "adapter"
                wide = ("--dtype", "fp32") if options.fp32 and is_whole else ()
                folder = export(run, name, [*arguments, *wide])
            if folder is None:
                refused.append(f"{optimizer}, {name}")
                continue
            for what, job in jobs(run, folder, f"{optimizer}, {name}"):
                rows[what] = measure(run, job)
                print(what, rows[what], flush=True)
    print(table(rows))
    about = {"date": str(date.today()), "machine": machine(), "versions": versions()}
    print(json.dumps(about | {"rows": rows, "refused": refused}))


if __name__ == "__main__":
    main()
