"""What scoring held-out pairs takes: `python benchmarks/evaluation.py FOLDER PAIRS`, 2 minutes.

Scores 32 pairs of a file with a real model, in fp32, and prints one JSON object: the seconds, the
bytes that the process grew by beyond the loaded model, and the figures.
"""

import json
import sys
import time
from typing import Any

import torch

from orpo_lab import config, data, memory
from orpo_lab.evaluate import preference_metrics, score
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from tests.conftest import compose_config

NUM_PAIRS = 32


def main() -> None:
    """Load, score, print."""
    folder, pairs = sys.argv[1:]
    loaded = config.load(
        compose_config(
            "model=local",
            f"model.path={folder}",
            "model.dtype=fp32",
            "optimizer=lora",
            "dataset=jsonl",
            f"dataset.train_path={pairs}",
            "dataset.num_train=1",
            f"dataset.num_eval={NUM_PAIRS}",
            "dataset.max_length=1024",
            "dataset.max_prompt_length=512",
        )
    )
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    held_out = data.load(loaded.dataset, tokenizer).held_out
    network: Any = load_model(loaded, tokenizer, torch.float32).eval()
    memory.reset_peak()
    before, start = memory.peak_bytes(), time.perf_counter()
    with torch.no_grad():
        metrics = preference_metrics(score(network, tokenizer, held_out, "benchmark"))
    report = {
        "seconds": round(time.perf_counter() - start, 1),
        "bytes_beyond_the_model": memory.peak_bytes() - before,
        "vocabulary": network.config.vocab_size,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report | metrics))


if __name__ == "__main__":
    main()
