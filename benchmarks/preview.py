"""What a preview costs beside training's tokenizing: `python benchmarks/preview.py PAIRS [MODEL]`.

Makes 50,000 rows out of the rows of PAIRS (such as math_pairs/train.jsonl): every row again and
again, each time with another number before its prompt. Loads them as training does, and previews
them, in turns, each time in a process of its own. MODEL is a folder with the tokenizer; without it,
the embedded model's. The last line is one JSON object: medians of wall time and of CPU time in
seconds, imports not counted, what a preview adds to loading, and the highest peak of memory in MiB.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from orpo_lab import compose, data
from orpo_lab.preview import command
from orpo_lab.upstream import silence

KINDS = ("load", "preview")


def write(pairs: Path, num: int, file: Path) -> None:
    """Write `num` rows, made of the rows of a file."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    with file.open("w", encoding="utf-8") as out:
        for number in range(num):
            row = rows[number % len(rows)]
            out.write(json.dumps(row | {"prompt": f"Problem {number}. {row['prompt']}"}) + "\n")


def measure(kind: str, overrides: list[str], folder: str) -> None:
    """Load or preview in this process, and print what that took."""
    silence()
    from orpo_lab.model.source import load_config
    from orpo_lab.model.tokenizer import load_tokenizer
    from orpo_lab.preview import figures, page, rows  # noqa: F401  (imports are not counted)

    loaded = compose(*overrides).config
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    if kind == "load":
        data.load(loaded.dataset, tokenizer)
    else:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        with contextlib.redirect_stdout(io.StringIO()):
            command.run(parser.parse_args([*overrides, "--out", folder]))
    took = {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }
    print(json.dumps(took))


def main() -> None:
    """Measure both kinds in turns, each time in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", type=Path)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--num-rows", type=int, default=50_000)
    parser.add_argument("--num-rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        write(asked.pairs, asked.num_rows, file)
        overrides = ["dataset=file", f"dataset.train_path={file}", "dataset.max_length=512"]
        if asked.model:
            overrides += ["model=local", f"model.path={asked.model}"]
        for _ in range(asked.num_rounds):
            for kind in KINDS:
                arguments = [sys.executable, __file__, "measure", kind, folder, *overrides]
                done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
                found[kind].append(json.loads(done.stdout))
                print(kind, done.stdout.strip(), flush=True)
    result: dict[str, object] = {"rows": asked.num_rows, "rounds": asked.num_rounds}
    for kind, took in found.items():
        result[kind] = {
            "wall_seconds": round(statistics.median(one["wall_seconds"] for one in took), 1),
            "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in took), 1),
            "peak_mib": max(one["peak_mib"] for one in took),
        }
    pairs = zip(found["load"], found["preview"], strict=True)
    more = [other["cpu_seconds"] / one["cpu_seconds"] - 1 for one, other in pairs]
    result["added_cpu_share"] = round(statistics.median(more), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[4:], sys.argv[3])
    else:
        main()
