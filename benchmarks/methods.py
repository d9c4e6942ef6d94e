"""Roads to an aligned model: what each costs, and what it reaches.

    python benchmarks/methods.py OUT --small              every road, a few steps: 3 minutes
    python benchmarks/methods.py OUT --grid --curves      the embedded default: hours on two cores
    python benchmarks/methods.py OUT --workload math --model SMOLLM2 --pairs PAIRS --seeds 1
    python benchmarks/methods.py --table OUT/methods.json the tables of docs/rivals.md

A road is a chain of stages (`ROADS`). Each stage is a process of its own: a run of `launch.py` that
starts from the stage before, or `rlhf.py`. Every stage of every road has the same pairs, batch and
number of optimizer steps. A stage that two roads share is trained once and counted in both. A
finished stage in OUT is not trained again, so the same command goes on after an interruption.

`--grid` trains the last stage of each road with the learning rates that are FACTORS times the
method's own, then with the chosen rate and each other beta of `BETAS`. The seed is GRID_SEED, which
the table does not use. Of the settings whose qualities are within their margins of the road's best
ones, the setting with the highest preference accuracy is chosen. Without `--grid` and without an
earlier `OUT/grid.json` every stage has the lab's defaults.

`--curves` trains all roads, or those that are named after it, on fewer pairs (`SIZES`) for as many
optimizer steps as on all pairs: the compute stays the same, and pairs come again.

Cost: sums over a road's stages; the peak memory is that of the largest stage. The seconds of
training include those of the reference. Preference accuracy and qualities have the intervals of a
comparison, over pairs and seeds. The last line of the output is one JSON object, which is also
written to OUT/methods.json.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from orpo_lab import compose
from orpo_lab.compare.evidence import Comparison, Setting, weigh
from orpo_lab.compare.read import read_run
from orpo_lab.compare.verdict import Interval, share_interval
from orpo_lab.compare.words import interval_text, verdict_text
from orpo_lab.metrics import HELD_OUT, MARGINS, PREFERENCE, qualities_among

ROOT = Path(__file__).parents[1]
RLHF = "rlhf"
# The methods of each road's stages, in order
ROADS: dict[str, tuple[str, ...]] = {
    "ORPO": ("orpo",),
    "CPO": ("cpo",),
    "SFT": ("sft",),
    "DPO": ("dpo",),
    "SimPO": ("simpo",),
    "ORPO, then ORPO": ("orpo", "orpo"),
    "SFT, then DPO": ("sft", "dpo"),
    "SFT, then IPO": ("sft", "ipo"),
    "SFT, then KTO": ("sft", "kto"),
    "SFT, then SimPO": ("sft", "simpo"),
    "SFT, then CPO": ("sft", "cpo"),
    "SFT, reward model, RLOO": ("sft", RLHF),
}
# Pairs with a verdict of their own
DUELS = (
    ("SFT, then DPO", "ORPO"),
    ("SFT, then DPO", "ORPO, then ORPO"),
    ("ORPO", "SFT"),
    ("SFT, then DPO", "SFT"),
    ("SFT, then DPO", "SFT, then IPO"),
    ("SFT, reward model, RLOO", "SFT"),
)
# What `--grid` tries
FACTORS = (0.1, 0.3, 1.0)
# By method, the default first
BETAS: dict[str, tuple[float, ...]] = {
    "orpo": (0.1, 0.5),
    "cpo": (0.1, 0.5),
    "sft": (0.0,),
    "dpo": (0.1, 0.5),
    "ipo": (0.1, 1.0),
    "kto": (0.1, 0.5),
    "simpo": (2.0, 10.0),
    RLHF: (0.05,),
}
GRID_SEED = 0
# Training pairs of the embedded default in `--curves`, besides all of them
SIZES = (120, 480)
SMALL = (
    "train.max_steps=4",
    "dataset.num_train=64",
    "dataset.num_eval=16",
    "dataset.num_generations=8",
)
# SmolLM2: as many steps as a CPU takes in minutes
SMOLLM2 = (
    "model=smollm2_135m",
    "dataset=jsonl",
    "dataset.as_messages=false",
    "dataset.max_length=512",
    "dataset.max_prompt_length=256",
    "dataset.overlong=cut_completion",
    "dataset.num_eval=64",
    "dataset.num_generations=4",
    "dataset.max_new_tokens=48",
    "train.max_steps=24",
    "train.batch_size=4",
)
FILES = {"math": ("train.jsonl", "test.jsonl"), "chat": ("train_prefs.jsonl", "test_prefs.jsonl")}
# Answers to the math pairs can be checked; most of them end within so many tokens
CHECKED = {
    "math": (
        "dataset.checker=last_number",
        "dataset.num_generations=32",
        "dataset.max_new_tokens=192",
    )
}
COSTS = {
    "stages": "trained models",
    "passes": "passes forward and backward",
    "forward_passes": "passes forward only",
    "tokens": "tokens, forward and backward",
    "forward_tokens": "tokens, forward only",
    "wall_seconds": "training (s)",
    "cpu_seconds": "CPU of the processes (s)",
    "peak_memory_bytes": "peak memory (MB)",
    "disk_bytes": "weights to keep (MB)",
}

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One training on a road, and the stages before it."""

    methods: tuple[str, ...]
    settings: tuple[Overrides, ...]
    """The overrides of each stage alone."""
    common: Overrides
    """The overrides of all stages."""
    seed: int

    @property
    def before(self) -> "Stage | None":
        """The stage that this one starts from; None: this is the first one."""
        if len(self.methods) == 1:
            return None
        return Stage(self.methods[:-1], self.settings[:-1], self.common, self.seed)

    @property
    def overrides(self) -> Overrides:
        """The overrides of this stage, without those that say where it begins and ends."""
        method = () if self.methods[-1] == RLHF else (f"method={self.methods[-1]}",)
        return (*method, *self.common, *self.settings[-1], f"seed={self.seed}", "tracker=none")

    @property
    def name(self) -> str:
        """The name of the stage's folder; another one for other overrides of any stage."""
        read = json.dumps([self.methods, self.settings, self.common])
        digest = hashlib.sha256(read.encode()).hexdigest()[:8]
        return f"{'-'.join(self.methods)}-seed{self.seed}-{digest}"

    def command(self, out: Path) -> list[str]:
        """Return the command that trains this stage."""
        folder, start = out / self.name, self.before and out / self.before.name
        if self.methods[-1] == RLHF:
            script = str(ROOT / "benchmarks" / "rlhf.py")
            return [sys.executable, script, str(folder), str(start), *self.overrides]
        given = [f"hydra.run.dir={folder}", *([f"start_from={start}"] if start else [])]
        return [sys.executable, str(ROOT / "launch.py"), *self.overrides, *given]


@dataclass(frozen=True)
class Bench:
    """What all stages share, and where they are trained."""

    out: Path
    common: Overrides
    chosen: dict[str, Overrides]
    """By the methods of a chain, joined by spaces: the settings of its last stage."""

    def stage(self, methods: tuple[str, ...], seed: int, size: int | None = None) -> Stage:
        """Return the last stage of a chain with the chosen settings.

        Args:
            methods: of each stage.
            seed: of all stages.
            size: number of training pairs; None: as many as `common` says.
        """
        chains = [" ".join(methods[: end + 1]) for end in range(len(methods))]
        settings = tuple(self.chosen.get(chain, ()) for chain in chains)
        more = () if size is None else (f"dataset.num_train={size}",)
        return Stage(methods, settings, (*self.common, *more), seed)

    def train(self, stage: Stage) -> None:
        """Train a stage and those before it, each unless it has been trained already."""
        if stage.before:
            self.train(stage.before)
        record = self.out / f"{stage.name}.json"
        if record.exists():
            return
        shutil.rmtree(self.out / stage.name, ignore_errors=True)
        begin = time.perf_counter()
        with (self.out / f"{stage.name}.log").open("w") as log:
            process = subprocess.Popen(stage.command(self.out), stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{stage.name} has failed; see {log.name}")
        took = time.perf_counter() - begin
        cost = {"overrides": stage.overrides, "cpu_seconds": used.ru_utime + used.ru_stime}
        record.write_text(json.dumps(cost | {"process_seconds": took}))
        print(f"{stage.name}: {took:.0f} s, {json.dumps(self.after(stage))}", flush=True)

    def summary(self, stage: Stage) -> dict[str, Any]:
        """Return the content of a stage's `summary.json`."""
        return json.loads((self.out / stage.name / "summary.json").read_text())

    def after(self, stage: Stage) -> dict[str, float]:
        """Return what a stage has reached: preference accuracy and the qualities."""
        return brief(self.summary(stage)["after"])

    def cost(self, stage: Stage) -> dict[str, float]:
        """Return the cost of a stage and those before it; the keys are those of `COSTS`."""
        record = json.loads((self.out / f"{stage.name}.json").read_text())
        train = self.summary(stage)["train"]
        own = {
            **(train.get("reads") or self._reads(stage, train)),
            # Runs of before the reference was measured have no seconds of it
            "wall_seconds": train["wall_seconds"] + train.get("reference_seconds", 0.0),
            "cpu_seconds": record["cpu_seconds"],
            "disk_bytes": _weights(self.out / stage.name),
        }
        before = self.cost(stage.before) if stage.before else {}
        peak = max(before.get("peak_memory_bytes", 0), train["peak_memory_bytes"])
        summed = {key: value + before.get(key, 0) for key, value in own.items()}
        return summed | {"peak_memory_bytes": peak}

    def _reads(self, stage: Stage, train: dict[str, Any]) -> dict[str, float]:
        """Return how often a run of the lab has read its pairs, and their tokens.

        Args:
            stage: the run.
            train: the key of that name in the run's summary.
        """
        from orpo_lab import methods  # imports torch

        data = json.loads((self.out / stage.name / "data_report.json").read_text())
        num_train = data["train"]["num_kept"]
        pairs = train["pairs_per_second"] * train["wall_seconds"]
        tokens = train["tokens_per_second"] * train["wall_seconds"]
        method = methods.build(compose(*stage.overrides).config)
        # KTO also reads every prompt with the completions of another one: for the reference, and
        # in every step
        forward = float(method.needs_reference)
        forward += method.needs_divergence * (1 + pairs / num_train)
        return {
            "stages": 1,
            "passes": pairs / num_train,
            "tokens": tokens,
            "forward_passes": forward,
            "forward_tokens": tokens / pairs * num_train * forward,
        }


def brief(figures: dict[str, Any]) -> dict[str, float]:
    """Return preference accuracy and the qualities among held-out figures."""
    names = [PREFERENCE, *(metric.name for metric in HELD_OUT if metric.name in MARGINS)]
    return {name: round(figures[name], 4) for name in names if figures.get(name) is not None}


def _weights(folder: Path) -> int:
    """Return the bytes of all weights that a stage leaves for later stages or for use."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def choose(bench: Bench, methods: tuple[str, ...]) -> dict[str, Any]:
    """Train a chain's last stage with every setting of the grid; return the tries and the choice.

    Args:
        bench: with the choices of all stages before.
        methods: of each stage.
    """
    method = () if methods[-1] == RLHF else (f"method={methods[-1]}",)
    own = compose(*method, *bench.common).config.optimizer.learning_rate
    beta, *others = BETAS[methods[-1]]
    tried = [_try(bench, methods, factor * own, beta) for factor in FACTORS]
    rate = _best(tried)["rate"]
    tried += [_try(bench, methods, rate, other) for other in others]
    return {"tried": tried, "chosen": _best(tried)["overrides"]}


def _try(bench: Bench, methods: tuple[str, ...], rate: float, beta: float) -> dict[str, Any]:
    """Train a chain's last stage with a learning rate and a beta; return what came of it."""
    given = (f"optimizer.learning_rate={rate:g}", f"beta={beta:g}")
    trial = replace(bench, chosen=bench.chosen | {" ".join(methods): given})
    stage = trial.stage(methods, GRID_SEED)
    trial.train(stage)
    return {"rate": rate, "overrides": given, "after": trial.after(stage)}


def _best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the try with the highest preference accuracy among those of good quality."""
    qualities = qualities_among(tried[0]["after"])
    best = {
        quality.name: max(quality.sign * one["after"][quality.name] for one in tried)
        for quality in qualities
    }
    good = [
        one
        for one in tried
        if all(
            quality.sign * one["after"][quality.name] >= best[quality.name] - MARGINS[quality.name]
            for quality in qualities
        )
    ]
    # If no setting is good in all qualities, the first quality decides
    first = qualities[0]
    return max(good, key=lambda one: one["after"][PREFERENCE], default=None) or max(
        tried, key=lambda one: first.sign * one["after"][first.name]
    )


def search(bench: Bench, roads: Sequence[str]) -> Bench:
    """Choose the settings of every stage of some roads; write them to `OUT/grid.json`."""
    file = bench.out / "grid.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for chain in dict.fromkeys(_chains(roads)):
        key = " ".join(chain)
        found[key] = choose(bench, chain)
        bench = replace(bench, chosen=bench.chosen | {key: tuple(found[key]["chosen"])})
        file.write_text(json.dumps(found))
        print(f"chosen for {key}: {' '.join(found[key]['chosen'])}", flush=True)
    return bench


def _chains(roads: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for road in roads:
        for end in range(len(ROADS[road])):
            yield ROADS[road][: end + 1]


def trained(
    bench: Bench, roads: Sequence[str], seeds: Sequence[int], size: int | None = None
) -> list[Setting]:
    """Train roads; return each as a setting of a comparison, named by the road."""
    found = []
    for road in roads:
        stages = [bench.stage(ROADS[road], seed, size) for seed in seeds]
        for stage in stages:
            bench.train(stage)
        runs = [read_run(bench.out / stage.name) for stage in stages]
        found.append(Setting(road, runs[0].values, runs))
    return found


def compared(among: Sequence[Setting]) -> Comparison:
    """Compare roads by the rules of `python -m orpo_lab compare`."""
    return weigh([run for setting in among for run in setting.runs], among, MARGINS)


def figures(comparison: Comparison) -> dict[str, dict[str, list[float | None]]]:
    """Return estimate, low and high end of every figure of every road; None: one seed."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for number, setting in enumerate(comparison.settings):
        found[setting.name] = {PREFERENCE: _numbers(comparison.verdict.accuracies[number])}
        standing = comparison.verdict.qualities[number]
        for quality, interval in zip(comparison.qualities, standing.intervals, strict=True):
            found[setting.name][quality.name] = _numbers(interval, quality.sign)
        nll = [run.summary["after"]["chosen_nll"] for run in setting.runs if run.summary]
        found[setting.name].setdefault("chosen_nll", [round(mean(nll), 4), None, None])
    return found


def _numbers(interval: Interval, sign: int = 1) -> list[float | None]:
    ends = sorted((sign * interval.low, sign * interval.high))
    values = [sign * interval.estimate, *ends]
    return [None if math.isnan(value) else round(value, 4) for value in values]


def measure(
    bench: Bench, roads: Sequence[str], seeds: Sequence[int], curves: Sequence[str]
) -> dict[str, Any]:
    """Train roads and return the report.

    Args:
        bench: with the chosen settings.
        roads: names in `ROADS`.
        seeds: of every road.
        curves: the roads to train on fewer pairs, too.
    """
    all_roads = trained(bench, roads, seeds)
    whole = compared(all_roads)
    costs = {}
    for road in roads:
        of_seeds = [bench.cost(bench.stage(ROADS[road], seed)) for seed in seeds]
        costs[road] = {key: mean(cost[key] for cost in of_seeds) for key in COSTS}
    by_size = {
        size: figures(compared(trained(bench, curves, seeds, size)))
        for size in (SIZES if curves else ())
    }
    by_name = {setting.name: setting for setting in all_roads}
    duels = {
        " against ".join(duel): verdict_text(compared([by_name[road] for road in duel]))
        for duel in DUELS
        if by_name.keys() >= set(duel)
    }
    summary = whole.runs[0].summary or {}
    return {
        "date": str(date.today()),
        "machine": machine(),
        "versions": summary.get("versions"),
        "common": [text for text in bench.common if "path=" not in text],
        "seeds": list(seeds),
        "num_pairs": whole.accuracy.num_pairs,
        "chosen": {key: list(given) for key, given in bench.chosen.items()},
        "before": brief(summary["before"]),
        "costs": costs,
        "figures": figures(whole),
        "verdict": [*verdict_text(whole), *whole.warnings],
        "duels": duels,
        "curves": by_size,
    }


def machine() -> str:
    """Return how many cores there are, and which."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} cores, {names[0] if names else platform.processor()}"


def tables(report: dict[str, Any]) -> str:
    """Return a report's tables as Markdown."""
    names = list(dict.fromkeys(name for row in report["figures"].values() for name in row))
    num_seeds = len(report["seeds"])
    parts = [
        f"Measured on {report['date']} on {report['machine']}, {num_seeds} seeds, "
        f"{report['num_pairs']} held-out pairs.",
        _table(
            ["road", *COSTS.values()],
            [
                [road, *(_cost_text(key, cost[key]) for key in COSTS)]
                for road, cost in report["costs"].items()
            ],
        ),
        _table(
            ["road", "settings of the last stage", *names],
            [
                [
                    "untrained",
                    "",
                    *(_figure(name, [report["before"].get(name)], report) for name in names),
                ],
                *(
                    [
                        road,
                        _settings_text(report["chosen"].get(" ".join(ROADS[road]))),
                        *(_figure(name, row.get(name), report) for name in names),
                    ]
                    for road, row in report["figures"].items()
                ),
            ],
        ),
        "\n".join(f"> {line}" for line in report["verdict"]),
    ]
    for duel, said in report["duels"].items():
        parts.append(f"- {duel}: {' '.join(said)}")
    if report["grid"]:
        parts += [
            f"What the grid tried, seed {GRID_SEED}:",
            _table(
                ["stages", "settings of the last stage", *names],
                [
                    [
                        ", ".join(key.split()),
                        _settings_text(one["overrides"]) + _mark(one, entry),
                        *(_text([one["after"].get(name)]) for name in names),
                    ]
                    for key, entry in report["grid"].items()
                    for one in entry["tried"]
                ],
            ),
        ]
    by_size = report["curves"] and {**report["curves"], "all": report["figures"]}
    for name in names if by_size else ():
        parts += [
            f"{name}, by number of training pairs:",
            _table(
                ["road", *map(str, by_size)],
                [
                    [road, *(_text(of_size[road].get(name)) for of_size in by_size.values())]
                    for road in next(iter(report["curves"].values()))
                ],
            ),
        ]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _cost_text(key: str, value: float) -> str:
    if key.endswith("bytes"):
        return f"{value / 1e6:,.1f}" if value < 1e7 else f"{value / 1e6:,.0f}"
    return f"{value:,.0f}" if value > 10 else f"{value:.3g}"


def _settings_text(given: Sequence[str] | None) -> str:
    return ", ".join(item.replace("optimizer.", "") for item in given) if given else "defaults"


def _mark(one: dict[str, Any], entry: dict[str, Any]) -> str:
    return " (chosen)" if one["overrides"] == entry["chosen"] else ""


def _figure(name: str, numbers: Sequence[float | None] | None, report: dict[str, Any]) -> str:
    """Return a figure of the table of roads; of one seed, accuracy has an interval over pairs."""
    estimate, low = [*(numbers or [None]), None][:2]
    if name != PREFERENCE or estimate is None or low is not None:
        return _text(numbers)
    num_pairs = report["num_pairs"]
    return interval_text(share_interval(round(estimate * num_pairs), num_pairs))


def _text(numbers: Sequence[float | None] | None) -> str:
    """Return an estimate with the ends of its interval, which are None where there are none."""
    if numbers is None or numbers[0] is None:
        return ""
    estimate, low, high = [math.nan if one is None else one for one in [*numbers, None, None][:3]]
    return interval_text(Interval(estimate, low, high))


def main() -> None:
    """Train what has not been trained, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder of all stages")
    parser.add_argument("--workload", choices=["embedded", *FILES], default="embedded")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2, for math and chat")
    parser.add_argument("--pairs", type=Path, help="folder of the pairs, for math and chat")
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(ROADS), metavar="ROAD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--grid", action="store_true", help="choose learning rates and betas")
    parser.add_argument(
        "--curves", nargs="*", choices=ROADS, metavar="ROAD", help="train on fewer pairs, too"
    )
    parser.add_argument("--small", action="store_true", help="a few steps, to see that all works")
    parser.add_argument("--override", nargs="+", default=[], help="for every stage of every road")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a report as Markdown")
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return
    if options.out is None or (options.workload in FILES and not (options.model and options.pairs)):
        parser.error("OUT is needed, and for math and chat --model and --pairs")
    common: Overrides = ()
    if options.workload in FILES:
        train, test = (options.pairs / name for name in FILES[options.workload])
        files = (f"dataset.train_path={train}", f"dataset.eval_path={test}")
        checked = CHECKED.get(options.workload, ())
        common = (*SMOLLM2, *checked, f"model.path={options.model}", *files)
    if options.small:
        common = (*common, *SMALL)
    options.out.mkdir(parents=True, exist_ok=True)
    grid = options.out / "grid.json"
    found = json.loads(grid.read_text()) if grid.exists() else {}
    chosen = {key: tuple(entry["chosen"]) for key, entry in found.items()}
    bench = Bench(options.out.resolve(), (*common, *options.override), chosen)
    if options.grid:
        bench = search(bench, options.roads)
    curves = [] if options.curves is None else options.curves or options.roads
    report = measure(bench, options.roads, options.seeds, curves)
    found = json.loads(grid.read_text()) if grid.exists() else {}
    chains = dict.fromkeys(" ".join(chain) for chain in _chains(options.roads))
    report["grid"] = {chain: found[chain] for chain in chains if chain in found}
    (options.out / "methods.json").write_text(json.dumps(report))
    print(tables(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
