"""Our step against TRL's on a GPU: `python benchmarks/gpu_step.py`, about 15 minutes on 80 GB.

The architectures of Mistral 7B and Llama 3 8B with random weights, nf4, adapters of rank 16, bf16;
a step of 8 pairs with UltraFeedback-like lengths, without its update. For both engines at several
sizes of a micro-batch, with and without gradient checkpointing: wall time per pair and peak memory.
Then, of each engine, the fastest size, and the largest that stays below 24 GB. `--small` runs the
same code on any device, for checking it. The last line is one JSON object.
"""

import itertools
import json
from statistics import median
from typing import Any

import torch
from gpu_arguments import device_and_size, name_of
from gpu_galore import SMALL, make_qlora, peak_gb, seconds
from step import CAP, Case, num_slots, random_pairs, untrained
from transformers import LlamaConfig, MistralConfig

from orpo_lab import compose, config, engine
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.records.run_folder import versions
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.loop import add_gradients, batches
from orpo_lab.upstream import silence

NUM_PAIRS = 8
NUM_STEPS = 6
LIMIT_GB = 24.0
SIZES = {
    "trl": [f"engine.micro_batch_size={pairs}" for pairs in (1, 2, 4, 8)],
    "shared_prefix": [f"engine.tokens_per_microbatch={num}" for num in (2048, 4096, 8192)],
}
ARCHITECTURES: dict[str, Any] = {
    "mistral_7b": MistralConfig(sliding_window=None),
    "llama3_8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}


def compose_case(which: str, size: str, checkpointing: bool) -> config.Config:
    """Compose the run that the step is taken from."""
    overrides = [
        f"engine={which}",
        size,
        "optimizer=qlora",
        f"dataset.max_length={CAP}",
        f"dataset.max_prompt_length={CAP * 3 // 4}",
        f"train.batch_size={NUM_PAIRS}",
        f"train.gradient_checkpointing={checkpointing}",
        "model.dtype=bf16",
    ]
    return compose(*overrides).config


def measure(network: Any, pairs: Any, loaded: config.Config, device: str) -> dict[str, Any] | None:
    """Return time and memory of a step; None: it does not fit."""
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    which = config.kind(loaded.engine)
    devices = OneDevice(torch.device(device), torch.bfloat16)
    built = engine.build(loaded, model=network, tokenizer=tokenizer, devices=devices)
    state = untrained(network, devices)
    network.train()
    steps = list(itertools.islice(batches(pairs, NUM_PAIRS, 0, 0), len(pairs) // NUM_PAIRS))

    def take(step: list[Any]) -> None:
        add_gradients(built, state, step, loaded.beta)

    try:
        take(steps[0])  # compiles
        peak_gb(device)
        times = [seconds(lambda step=step: take(step), device) for step in steps]
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        network.zero_grad()
        if device == "cuda":
            torch.cuda.empty_cache()
    slots = [num_slots(which, built.micro_batches(step)) for step in steps]
    return {
        "seconds_per_pair": round(median(times) / NUM_PAIRS, 4),
        "peak_gb": round(peak_gb(device), 2),
        "slots_per_pair": round(sum(slots) / len(pairs)),
    }


def compare(network: Any, pairs: Any, checkpointing: bool, device: str) -> dict[str, Any]:
    """Measure both engines at every size."""
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    else:
        network.activation_checkpointing_disable()
    report: dict[str, Any] = {}
    for which, sizes in SIZES.items():
        report[which] = {
            size.split(".")[1]: measure(
                network, pairs, compose_case(which, size, checkpointing), device
            )
            for size in sizes
        }
        fits = {size: figures for size, figures in report[which].items() if figures}
        below = [size for size, figures in fits.items() if figures["peak_gb"] < LIMIT_GB]
        best = min(fits.values(), key=lambda figures: figures["seconds_per_pair"], default=None)
        report[which] |= {"fastest": best, "largest_below_24_gb": below[-1] if below else None}
    theirs, ours = (report[which]["fastest"] for which in SIZES)
    if theirs and ours:
        report["time_ratio"] = round(theirs["seconds_per_pair"] / ours["seconds_per_pair"], 2)
        report["memory_ratio"] = round(theirs["peak_gb"] / max(ours["peak_gb"], 0.01), 2)
    return report


def main() -> None:
    """Measure the architectures and print them."""
    device, small = device_and_size("Our step against TRL's on a GPU.")
    silence()
    report: dict[str, Any] = {}
    for name, architecture in ARCHITECTURES.items():
        if small:
            architecture.update(SMALL)
        # Twice, since a case counts batches of 4
        num_batches = 2 * (1 if small else NUM_STEPS)
        pairs = random_pairs(Case(vocabulary=architecture.vocab_size, batches=num_batches))
        if small:
            pairs = pairs.map(lambda row: {side: ids[:32] for side, ids in row.items()})
        network = make_qlora(architecture, device)
        for checkpointing in (True, False):
            key = f"{name}{'_checkpointing' if checkpointing else ''}"
            report[key] = compare(network, pairs, checkpointing, device)
            print(key, json.dumps(report[key]), flush=True)
        del network
    print(json.dumps(report | {"device": name_of(device), "versions": versions()}))


if __name__ == "__main__":
    main()
