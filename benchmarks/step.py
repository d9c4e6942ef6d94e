"""Our step against TRL's: `python benchmarks/step.py [--smollm2 FOLDER --pairs FOLDER] [CASE ...]`.

One optimizer step without its update, on the same weights and the same batches of 4 pairs in
random order, both engines in turn: CPU time of one thread and token slots per pair; and in a
process of its own for each engine the peak memory over the loaded model. fp32, sdpa, one
micro-batch of 4 pairs for TRL, padded to its longest row, and the default
`engine.tokens_per_microbatch` for ours.

    a       a Llama of 12 layers with a vocabulary of 2,048 (random weights), long pairs
    b       a Llama with a heavy head: 4 layers, 32,000 tokens, the same pairs
    c_math  SmolLM2-135M on math pairs, c_chat on chat pairs; FOLDERs of the weights and of
            math_pairs/train.jsonl and chat_pairs/train_prefs.jsonl
    *_checkpointing, c_math_lora: with gradient checkpointing on both sides

About 8 minutes for a and b, 40 for all. The last line is one JSON object.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import datasets
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from orpo_lab import compose, config, data, engine, memory
from orpo_lab.config.optimizer import Lora
from orpo_lab.engine.base import Engine
from orpo_lab.model.adapter import attach
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.optimizer.updater import Updater
from orpo_lab.records.run_folder import versions
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.loop import add_gradients, batches
from orpo_lab.training.state import State
from orpo_lab.upstream import silence

ROOT = Path(__file__).parents[1]
ENGINES = ("trl", "shared_prefix")
NUM_PAIRS = 4
BETA = 0.1
# UltraFeedback's mean tokens of prompt, chosen and rejected, log-normal, cut to CAP
MEANS = (157, 281, 236)
CAP = 1024
# Spread of the lengths' logarithms, for which 48 % of TRL's slots at 4 pairs are padding
SIGMA = 0.8


@dataclass(frozen=True)
class Case:
    """What is trained on what."""

    layers: int = 0
    hidden: int = 0
    vocabulary: int = 0
    pairs: str = ""
    max_length: int = CAP
    optimizer: str = "adamw"
    checkpointing: bool = False
    batches: int = 12


A = Case(layers=12, hidden=512, vocabulary=2048)
B = Case(layers=4, hidden=256, vocabulary=32000)
MATH = Case(pairs="math_pairs/train.jsonl", max_length=512, batches=8)
CHAT = Case(pairs="chat_pairs/train_prefs.jsonl", batches=8)
CASES = {
    "a": A,
    "b": B,
    "c_math": MATH,
    "c_chat": CHAT,
    "c_math_lora": replace(MATH, optimizer="lora", checkpointing=True),
    "a_checkpointing": replace(A, checkpointing=True),
    "b_checkpointing": replace(B, checkpointing=True),
    "c_math_checkpointing": replace(MATH, checkpointing=True),
    "c_chat_checkpointing": replace(CHAT, checkpointing=True),
}


def compose_case(
    case: Case, which: str, options: argparse.Namespace, *others: str
) -> config.Config:
    """Compose the run that the step is taken from."""
    overrides = [
        *others,
        f"engine={which}",
        f"optimizer={case.optimizer}",
        f"dataset.max_length={case.max_length}",
        f"dataset.max_prompt_length={case.max_length * 3 // 4}",
        "dataset.overlong=cut_completion",
        f"train.batch_size={NUM_PAIRS}",
        "model.dtype=fp32",
        "model.attention=sdpa",
    ]
    if which == "trl":
        overrides.append(f"engine.micro_batch_size={NUM_PAIRS}")
    if case.pairs:
        overrides += [
            "dataset=jsonl",
            "dataset.as_messages=false",
            f"dataset.train_path={options.pairs}/{case.pairs}",
            "dataset.num_eval=1",
            "model=local",
            f"model.path={options.smollm2}",
        ]
    return compose(*overrides).config


def random_pairs(case: Case) -> datasets.Dataset:
    """Pairs whose lengths are the quantiles of UltraFeedback's, each part in random order."""
    numbers = np.random.default_rng(0)
    num = NUM_PAIRS * case.batches
    columns = []
    for mean in MEANS:
        logarithm = NormalDist(math.log(mean) - SIGMA**2 / 2, SIGMA)
        lengths = [int(math.exp(logarithm.inv_cdf((i + 0.5) / num))) for i in range(num)]
        columns.append(numbers.permutation(lengths).tolist())
    rows = []
    for prompt, *answers in zip(*columns, strict=True):
        prompt = min(prompt, CAP * 3 // 4)
        sizes = (prompt, *(min(size, CAP - prompt) for size in answers))
        ids = [numbers.integers(3, case.vocabulary, size).tolist() for size in sizes]
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
    return datasets.Dataset.from_list(rows)


def load_parts(case: Case, options: argparse.Namespace) -> tuple[Any, Any, datasets.Dataset]:
    """Return the model, its tokenizer and enough pairs."""
    loaded = compose_case(case, "trl", options)
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    set_seed(0)
    if case.pairs:
        network: Any = load_model(loaded, tokenizer, torch.float32)
        pairs = data.load(loaded.dataset, tokenizer).train.shuffle(seed=0)
        pairs = pairs.select(range(NUM_PAIRS * case.batches))
    else:
        architecture = LlamaConfig(
            num_hidden_layers=case.layers,
            hidden_size=case.hidden,
            intermediate_size=case.hidden * 11 // 4,
            num_attention_heads=case.hidden // 64,
            vocab_size=case.vocabulary,
            max_position_embeddings=CAP,
            attn_implementation="sdpa",
        )
        network, pairs = LlamaForCausalLM(architecture), random_pairs(case)
    if isinstance(loaded.optimizer, Lora):
        network = attach(network, loaded.optimizer)
    if case.checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    return network, tokenizer, pairs


def make_engine(
    case: Case, which: str, parts: tuple[Any, Any, datasets.Dataset], options: argparse.Namespace
) -> tuple[Engine, State]:
    """Return an engine and the state whose weights get its gradients."""
    loaded = compose_case(case, which, options)
    network, tokenizer, _ = parts
    devices = OneDevice(torch.device("cpu"), torch.float32)
    built = engine.build(loaded, model=network, tokenizer=tokenizer, devices=devices)
    return built, untrained(network, devices)


def untrained(network: Any, devices: OneDevice) -> State:
    """Return the state of a model that is never updated."""
    sgd = torch.optim.SGD([p for p in network.parameters() if p.requires_grad])
    return State(network, Updater(sgd, network), devices, lambda num_updates: 1.0)


def num_slots(which: str, micro_batches: list[dict[str, Any]]) -> int:
    """Return the tokens, padding included, that the model reads."""
    if which == "trl":
        return sum(map(trl_slots, micro_batches))
    return sum(micro_batch["input_ids"].numel() for micro_batch in micro_batches)


def trl_slots(batch: dict[str, Any]) -> int:
    """Return the tokens of a batch of TRL's, whose both sides are padded to one width."""
    sides = (batch["chosen_input_ids"], batch["rejected_input_ids"])
    return 2 * len(sides[0]) * max(side.shape[1] for side in sides)


def measure_time(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Take the steps of both engines in turn, and return medians per pair."""
    parts = load_parts(case, options)
    network, _, pairs = parts
    built = {which: make_engine(case, which, parts, options) for which in ENGINES}
    network.train()
    seconds: dict[str, list[float]] = {which: [] for which in ENGINES}
    slots: dict[str, list[int]] = {which: [] for which in ENGINES}
    losses: dict[str, list[float]] = {which: [] for which in ENGINES}
    steps = itertools.islice(batches(pairs, NUM_PAIRS, 0, 0), case.batches)
    for number, batch in enumerate(steps):
        for which in ENGINES if number % 2 else ENGINES[::-1]:
            start = time.process_time()
            loss, _ = add_gradients(*built[which], batch, BETA)
            losses[which].append(loss.item())
            seconds[which].append(time.process_time() - start)
            slots[which].append(num_slots(which, built[which][0].micro_batches(batch)))
            network.zero_grad()
    ratios = [theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)]
    worst = max(abs(theirs / ours - 1) for theirs, ours in zip(*losses.values(), strict=True))
    return {
        "time_ratio": round(median(ratios), 2),
        "time_ratios": [round(ratio, 2) for ratio in sorted(ratios)],
        "cpu_seconds_per_pair": {w: round(median(seconds[w]) / NUM_PAIRS, 3) for w in ENGINES},
        "slots_per_pair": {w: round(sum(slots[w]) / len(slots[w]) / NUM_PAIRS) for w in ENGINES},
        "largest_relative_difference_of_losses": worst,
    }


def peak_over_loaded_model(name: str, which: str, options: argparse.Namespace) -> int:
    """Return bytes, from a process of its own."""
    command = [sys.executable, __file__, "--memory-of", which, name]
    command += [f"--smollm2={options.smollm2}", f"--pairs={options.pairs}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def measure_memory(case: Case, which: str, options: argparse.Namespace) -> int:
    """Return the peak of the batch with most token slots less what is loaded before it, in bytes.

    Gradients are allocated first: they are the model's, whichever engine fills them.
    """
    parts = load_parts(case, options)
    network, _, pairs = parts
    built, state = make_engine(case, which, parts, options)
    network.train()
    for p in network.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p).add_(0)
    steps = itertools.islice(batches(pairs, NUM_PAIRS, 0, 0), case.batches)
    largest = max(steps, key=lambda batch: num_slots(which, built.micro_batches(batch)))
    memory.reset_peak()
    before = memory.peak_bytes()
    add_gradients(built, state, largest, BETA)
    return memory.peak_bytes() - before


def main() -> None:
    """Measure the cases and print them."""
    parser = argparse.ArgumentParser(description="Our step against TRL's.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--smollm2", default="", help="folder of SmolLM2-135M")
    parser.add_argument("--pairs", default="", help="folder of math_pairs and chat_pairs")
    parser.add_argument("--memory-of", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if options.memory_of:
        print(measure_memory(CASES[options.cases[0]], options.memory_of, options))
        return
    given = bool(options.smollm2 and options.pairs)
    names = options.cases or [name for name, case in CASES.items() if given or not case.pairs]
    report: dict[str, Any] = {}
    for name in names:
        if CASES[name].pairs and not given:
            parser.error(f"{name} needs --smollm2 and --pairs")
        peaks = [peak_over_loaded_model(name, which, options) for which in ENGINES]
        report[name] = measure_time(CASES[name], options) | {
            "memory_ratio": round(peaks[0] / peaks[1], 2),
            "peak_mb": dict(zip(ENGINES, (round(peak / 1e6) for peak in peaks), strict=True)),
        }
        print(name, json.dumps(report[name]), flush=True)
    print(json.dumps(report | {"versions": versions()}))


if __name__ == "__main__":
    main()
