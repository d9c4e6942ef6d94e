"""Where does a recipe's wall time go? `python benchmarks/gpu_recipes.py`, on a GPU of 80 GB.

The recipes mistral_qlora and mistral_galore end to end, with fewer steps: Mistral 7B's architecture
with random weights and the embedded model's tokenizer, random pairs with UltraFeedback-like
lengths. Seconds of loading, both evaluations, training, saving and writing the results, and the
peak of memory. `--small` runs a small model on any device, for checking the script. The last line
is one JSON object.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_arguments import device_and_size, name_of
from gpu_galore import SMALL, make_model
from step import Case, random_pairs
from transformers import MistralConfig

import orpo_lab
from orpo_lab import evaluate, run
from orpo_lab.model import weights
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.records import results
from orpo_lab.records.run_folder import versions
from orpo_lab.training import checkpoint, trainer

RECIPES = ("mistral_qlora", "mistral_galore")
NUM_STEPS = 20
NUM_EVAL = 128
NUM_GENERATIONS = 32
# Overrides of a run that only checks the script
SHORT = (
    "train.max_steps=2",
    "train.eval_steps=1",
    "dataset.num_eval=4",
    "dataset.num_generations=2",
    "dataset.max_new_tokens=4",
    "dataset.max_length=128",
)
# Where a run spends its time: the name of a part -> the function that does that part
PARTS: dict[str, tuple[Any, str]] = {
    "load": (weights, "load_model"),
    "evaluate": (evaluate, "evaluate"),
    "train": (trainer, "fit"),
    "save": (checkpoint, "keep_trained"),
    "results": (results, "leave"),
}


@contextmanager
def timed(seconds: dict[str, list[float]]) -> Iterator[None]:
    """Inside this context, note how long each call of the functions in PARTS takes."""

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.setdefault(name, []).append(time.perf_counter() - begin)

        return call

    patches = [
        mock.patch.object(module, function, noting(name, getattr(module, function)))
        for name, (module, function) in PARTS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def write_base(folder: Path, architecture: MistralConfig, device: str) -> None:
    """Write a model with random weights, and the embedded model's tokenizer, to a folder."""
    make_model(architecture, device).save_pretrained(folder)
    own = orpo_lab.compose().config.model
    load_tokenizer(own, load_config(own)).save_pretrained(folder)


def write_pairs(file: Path, num: int) -> None:
    """Write pairs of random words, about a token each, with UltraFeedback-like lengths."""
    words, numbers = ["sum", "of", "and", "is", "the"], random.Random(0)
    lines = []
    for pair in random_pairs(Case(vocabulary=100, batches=-(-num // 4))):
        texts = {
            name: " ".join(numbers.choices(words, k=len(pair[f"{name}_ids"]) // 2 + 1))
            for name in ("prompt", "chosen", "rejected")
        }
        lines.append(json.dumps(texts))
    file.write_text("\n".join(lines[:num]))


def take(recipe: str, base: Path, pairs: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a recipe, and return where its wall time went."""
    composed = orpo_lab.compose(
        f"experiment={recipe}",
        "model=local",
        f"model.path={base}",
        "dataset=jsonl",
        "dataset.as_messages=false",
        f"dataset.train_path={pairs}",
        f"dataset.num_eval={NUM_EVAL}",
        f"dataset.num_generations={NUM_GENERATIONS}",
        "dataset.overlong=cut_completion",
        f"train.max_steps={NUM_STEPS}",
        f"train.eval_steps={NUM_STEPS // 2}",
        "train.save_steps=null",
        "tracker=none",
        *overrides,
    )
    seconds: dict[str, list[float]] = {}
    begin = time.perf_counter()
    with timed(seconds):
        result = run.train(composed.config, folder, choices=composed.choices, overrides=[])
    total = time.perf_counter() - begin
    before, after = seconds.pop("evaluate")
    parts = {name: sum(spent) for name, spent in seconds.items()} | {"before": before}
    parts["after"] = after
    parts["other"] = total - sum(parts.values())
    figures = result.summary["train"]
    return {
        "seconds": {name: round(spent, 1) for name, spent in parts.items()},
        "total_seconds": round(total, 1),
        "evaluation_share": round((before + after) / total, 3),
        "seconds_per_pair": round(1 / figures["pairs_per_second"], 4),
        "peak_gb": round(figures["peak_memory_bytes"] / 1e9, 2),
    }


def main() -> None:
    """Run the recipes and print them."""
    device, small = device_and_size("Where does a recipe's wall time go?")
    sizes = SMALL | {"vocab_size": 4096, "max_position_embeddings": 1024} if small else {}
    overrides = SHORT if small else ()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base, pairs = Path(scratch) / "base", Path(scratch) / "pairs.jsonl"
        write_base(base, MistralConfig(sliding_window=None, **sizes), device)
        write_pairs(pairs, 40 if small else NUM_STEPS * 16 + NUM_EVAL)
        for recipe in RECIPES:
            report[recipe] = take(recipe, base, pairs, Path(scratch) / recipe, *overrides)
            print(recipe, json.dumps(report[recipe]), flush=True)
    print(json.dumps(report | {"device": name_of(device), "versions": versions()}))


if __name__ == "__main__":
    main()
