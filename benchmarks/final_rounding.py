"""What of a short training is left once its fp32 weights are rounded to bf16, as in `final/`?

    python benchmarks/final_rounding.py OUT --model SMOLLM2 --pairs PAIRS    five minutes on a core

Trains all weights of a base that is stored in bf16 (adamw, a few steps, each learning rate in a
folder of OUT), takes the fp32 weights of the last checkpoint, and rounds them to bf16: to the
nearest number, and up or down at random as `round_to` does. Printed is the share of what training
changed in the held-out log-probabilities (`export.check.compare`), read in fp32. The last line is
one JSON object.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from methods import FILES
from safetensors.torch import load_file
from torch import Tensor

from orpo_lab import compose, train
from orpo_lab.export.check import Replies, compare, of_run
from orpo_lab.finished import FinishedRun
from orpo_lab.optimizer.write_back import round_to
from orpo_lab.records.run_folder import RunFolder, versions

NUM_STEPS = 4
RUN = (
    "optimizer=adamw",
    "model=smollm2_135m",
    "model.dtype=fp32",
    "dataset=jsonl",
    "dataset.max_length=256",
    "dataset.num_train=64",
    "dataset.num_eval=10",
    "dataset.num_generations=0",
    "train.batch_size=4",
    f"train.max_steps={NUM_STEPS + 1}",
    f"train.save_steps={NUM_STEPS}",
    "train.warmup_steps=0",
    "tracker=none",
)
RATES = ("2e-6", "2e-5")
SEEDS = range(3)


def roundings() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways to round a weight to bf16, by name."""

    def at_random(seed: int) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return lambda weight: round_to(weight.clone(), torch.bfloat16, generator)

    return {
        "nearest": lambda weight: weight.bfloat16(),
        **{f"stochastic, seed {seed}": at_random(seed) for seed in SEEDS},
    }


def replies(finished: FinishedRun, network: Any, weights: dict[str, Tensor]) -> Replies:
    """Return what a network says to the held-out pairs with other weights, which are copied."""
    for name, weight in network.named_parameters():
        weight.data.copy_(weights[name])
    return of_run(network, finished, torch.float32, "score")


def main() -> None:
    """Train, round and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=Path, required=True, help="folder of the math pairs")
    options = parser.parse_args()
    given = (
        f"model.path={options.model}",
        f"dataset.train_path={options.pairs / FILES['math'][0]}",
    )
    found = {}
    for rate in RATES:
        folder = options.out / rate
        if not RunFolder(folder).is_complete():
            train(compose(*RUN, *given, f"optimizer.learning_rate={rate}"), folder)
        finished = FinishedRun(folder)
        network = FinishedRun(folder, is_trained=False).load()
        trained = load_file(
            folder / "checkpoints" / f"checkpoint-{NUM_STEPS}" / "model.safetensors"
        )
        before = of_run(network, finished, torch.float32, "before").logps
        exact = replies(finished, network, trained)
        for name, rounded in roundings().items():
            weights = {key: rounded(weight) for key, weight in trained.items()}
            found[f"{rate}, {name}"] = compare(replies(finished, network, weights), exact, before)
            print(f"{rate}, {name}: {found[f'{rate}, {name}']}", flush=True)
    figures = {name: asdict(difference) for name, difference in found.items()}
    print(json.dumps({"date": str(date.today()), "versions": versions(), "figures": figures}))


if __name__ == "__main__":
    main()
