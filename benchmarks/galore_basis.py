"""What a basis captures of real gradients: `python benchmarks/galore_basis.py MODEL PAIRS`.

Trains the model in folder MODEL with GaLore for 20 steps on the pairs in folder PAIRS
(`train.jsonl`, `test.jsonl`), and keeps the gradients of steps 0, 1 and 20. A basis captures the
energy ||G Q||^2 of a gradient G; every figure is a share of what the exact singular vectors
capture. `stale` is the basis of step 0, `warm` one refreshed from it, `randomized` one from random
directions. About 15 minutes for SmolLM2-135M on two CPU cores. The last line is one JSON object.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from orpo_lab import compose, data
from orpo_lab.model.projections import projections
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.optimizer import galore
from orpo_lab.records.run_folder import RunFolder, versions
from orpo_lab.stop import Stop
from orpo_lab.tracker.base import Untracked
from orpo_lab.training import trainer
from orpo_lab.training.checkpoint import Made

ROOT = Path(__file__).parents[1]
STEPS = (0, 1, 20)
RANKS = (128, 32)
LEAST = 0.99


def real_run(folder: str, pairs: str) -> list[str]:
    """Return the overrides of a GaLore run of a real model on real pairs, in fp32."""
    return [
        "model=local",
        f"model.path={folder}",
        "model.dtype=fp32",
        "dataset=jsonl",
        "dataset.as_messages=false",
        f"dataset.train_path={pairs}/train.jsonl",
        f"dataset.eval_path={pairs}/test.jsonl",
        "dataset.max_length=256",
        "dataset.max_prompt_length=128",
        "optimizer=galore",
        "optimizer.learning_rate=2e-4",
        "tracker=none",
    ]


def gradients(folder: str, pairs: str) -> dict[str, dict[int, Tensor]]:
    """Return every projected weight's gradient at STEPS, as a refresh would see it."""
    settings = [
        *real_run(folder, pairs),
        "dataset.num_eval=8",
        "train.batch_size=4",
        "engine=trl",
        "engine.micro_batch_size=4",
        f"train.max_steps={STEPS[-1] + 1}",
    ]
    loaded = compose(*settings).config
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    network = load_model(loaded, tokenizer, torch.float32)
    kept: dict[str, dict[int, Tensor]] = defaultdict(dict)
    calls: dict[str, int] = defaultdict(int)
    for name, layer in projections(network).items():

        def keep(weight: Tensor, name: str = name) -> None:
            assert weight.grad is not None
            if calls[name] in STEPS:
                kept[name][calls[name]] = weight.grad.clone()
            calls[name] += 1

        layer.weight.register_post_accumulate_grad_hook(keep)
    with tempfile.TemporaryDirectory() as scratch:
        trainer.fit(
            loaded,
            model=network,
            tokenizer=tokenizer,
            data=data.load(loaded.dataset, tokenizer),
            dtype=torch.float32,
            place=RunFolder(Path(scratch)),
            log_to=Untracked(),
            made=Made("", "", ""),
            start=None,
            stop=Stop(),
        )
    return kept


def captured(kept: dict[int, Tensor], rank: int) -> dict[str, float]:
    """Return the shares of one weight."""
    generator = torch.Generator().manual_seed(0)
    tall = kept[0].shape[0] >= kept[0].shape[1]
    matrices = {step: g if tall else g.mT for step, g in kept.items()}
    old = galore.iterated_basis(matrices[0], rank, None, generator)
    shares = {}
    for step in STEPS[1:]:
        matrix = matrices[step]
        best = torch.linalg.svdvals(matrix)[:rank].square().sum()
        bases = {
            "stale": old,
            "warm": galore.iterated_basis(matrix, rank, old, generator),
            "randomized": galore.iterated_basis(matrix, rank, None, generator),
        }
        for name, basis in bases.items():
            shares[f"{name}_after_{step}"] = float((matrix @ basis).square().sum() / best)
    return shares


def main(folder: str, pairs: str) -> None:
    """Measure and print."""
    kept = gradients(folder, pairs)
    result: dict[str, Any] = {"num_weights": len(kept)}
    for rank in RANKS:
        shares = [captured(grads, rank) for grads in kept.values() if rank < min(grads[0].shape)]
        for name in shares[0]:
            values = [row[name] for row in shares]
            result[f"rank_{rank}_{name}"] = {"worst": min(values), "median": median(values)}
            print(f"rank {rank:3} {name:20} worst {min(values):.4f} median {median(values):.4f}")
    worst = [v["worst"] for k, v in result.items() if "warm" in k]
    result["warm_is_at_least_0.99"] = min(worst) >= LEAST
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} MODEL PAIRS")
    main(*sys.argv[1:])
