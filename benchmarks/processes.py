"""Several processes against one: `python benchmarks/processes.py FOLDER [--num 2 4]`.

Trains the embedded model 10 steps in fp32 with every optimizer: in one process, then in several
under torchrun, on this machine (gloo). Compares the trained weights with those of one process, and
counts the bytes that a process gives to the others in a step. The last line is one JSON object: for
each optimizer and number of processes the relative difference of all weights, ||w_n - w_1|| /
||w_1||, the mean bytes of gradients in a step, and the seconds of training.

The ranks are small here. With GaLore's default rank the basis of a gradient is not determined by
its numbers in fp32: singular values lie so close together that rounding turns the basis. With 8-bit
moments, rounding moves a few numbers by a step of their quantization.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed

from orpo_lab import compose, train

SHORT = (
    *("tracker=none", "train.max_steps=10", "train.logging_steps=1", "train.warmup_steps=0"),
    *("dataset.num_train=256", "dataset.num_eval=32", "dataset.num_generations=4"),
    # One micro-batch in each process: a basis is taken from the first one
    "engine.tokens_per_microbatch=16384",
)
LORA = ("optimizer.dropout=0", "optimizer.r=4")
RUNS = {
    "qlora": LORA,
    "lora": ("optimizer=lora", *LORA),
    # Of the projected gradients the norm is another one, and clips differently
    "galore": ("optimizer=galore", "optimizer.rank=4", "train.max_grad_norm=0"),
    "galore layerwise 8 bits": (
        *("optimizer=galore", "optimizer.rank=4", "optimizer.layerwise=true", "optimizer.bits=8"),
    ),
    "adamw": ("optimizer=adamw",),
    # It has a reference, exchanges numbers inside its passes, and in its last part of 17 held-out
    # pairs some process has none
    "kto": (
        *("optimizer=adamw", "method=kto", "train.eval_steps=5", "train.meter_steps=3"),
        "dataset.num_eval=17",
    ),
}


class Sent:
    """Counts the bytes of gradients that this process gives to `all_reduce`, tensor by tensor.

    Only gradients are given without waiting; counts, metrics and flags are left out.
    """

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self._all_reduce = distributed.all_reduce
        distributed.all_reduce = self._counted

    def _counted(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("async_op"):
            self.bytes.append(tensor.nbytes)
        return self._all_reduce(tensor, *arguments, **options)


def work(place: Path, overrides: list[str]) -> None:
    """Train a run in this process, which may be one of several."""
    torch.set_num_threads(1)
    sent = Sent()
    result = train(compose(*overrides), place)
    if result.summary:
        (place / "sent.json").write_text(json.dumps(sent.bytes))


def run(place: Path, num: int, *overrides: str) -> None:
    """Train a run in `num` processes.

    Raises:
        CalledProcessError: the run has failed.
    """
    command = [sys.executable]
    if num > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, __file__, "work", str(place), *SHORT, *overrides],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def weights(run: Path) -> dict[str, Tensor]:
    """Return the trained weights of a run, in fp64, by their names."""
    (file,) = Path(run, "final").glob("*model.safetensors")
    return {name: weight.double() for name, weight in load_file(file).items()}


def difference(one: Path, several: Path) -> float:
    """Return the relative difference of all weights of two runs."""
    ours, theirs = weights(one), weights(several)
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    return (apart / sum(float(weight.square().sum()) for weight in ours.values())) ** 0.5


def sent(run: Path) -> list[int]:
    """Return the bytes of the tensors that the first process gave to the others, in order."""
    found: list[int] = json.loads(Path(run, "sent.json").read_text())
    return found


def main() -> None:
    """Train all runs in one process and in several, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, nargs="+", default=[2, 4])
    asked = parser.parse_args()
    found: dict[str, dict[str, Any]] = {name: {} for name in RUNS}
    for num in (1, *asked.num):
        for name, overrides in RUNS.items():
            place = asked.folder / str(num) / name
            run(place, num, *overrides)
            summary = json.loads((place / "summary.json").read_text())
            row = {"seconds": round(summary["train"]["wall_seconds"], 2)}
            if num > 1:
                row["difference"] = difference(asked.folder / "1" / name, place)
                row["bytes_per_step"] = sum(sent(place)) // summary["train"]["steps"]
            found[name][str(num)] = row
            print(name, num, row, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        with contextlib.redirect_stdout(io.StringIO()):
            work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
