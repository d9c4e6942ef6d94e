"""What an evaluation takes: `python benchmarks/evaluation.py FOLDER PAIRS`, 30 minutes.

Held-out pairs of a file are scored with a real model, in fp32 and with one thread, in both ways by
turns: as padded sequences, as `engine=trl` does, and in packed rows, as `engine=shared_prefix`
does. Then prompts are answered twice: ended answers leave their batch, or stay to its end. CPU
seconds, tokens that the model reads, seconds of matrix products alone (of one more pass under
torch's profiler), and for each way of scoring, in a process of its own, the bytes that the process
grows by beyond the loaded model. `--small`: the embedded model and its pairs, 1 minute. The last
line is one JSON object.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import datasets
import torch
from torch.profiler import ProfilerActivity, profile

from orpo_lab import compose, config, data, engine, evaluate, memory
from orpo_lab.engine.scoring import Scorer
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.records.run_folder import versions
from orpo_lab.upstream import silence

# The engine that reads pairs in each way
WAYS = {"sequences": "trl", "rows": "shared_prefix"}
# The share of a batch's answers that must have ended before they leave it
ANSWERS = {"stay": math.inf, "leave": evaluate.LEAVING}


def overrides(options: argparse.Namespace) -> list[str]:
    """Return what is composed: a model, and pairs of which all but one are held out."""
    num = [f"dataset.num_eval={options.num_pairs}", "model.dtype=fp32", "optimizer=lora"]
    if options.small:
        return [*num, "dataset.num_train=1"]
    return [
        *num,
        "model=local",
        f"model.path={options.folder}",
        "dataset=jsonl",
        "dataset.as_messages=false",
        f"dataset.train_path={options.pairs}",
        "dataset.num_train=1",
        "dataset.max_length=1024",
        "dataset.max_prompt_length=512",
    ]


def load(options: argparse.Namespace) -> tuple[Any, Any, datasets.Dataset, dict[str, Scorer]]:
    """Return the model, its tokenizer, held-out pairs and both ways to score them."""
    composed: dict[str, config.Config] = {
        way: compose(*overrides(options), f"engine={which}").config for way, which in WAYS.items()
    }
    one = composed["rows"]
    tokenizer = load_tokenizer(one.model, load_config(one.model))
    pairs = data.load(one.dataset, tokenizer).held_out
    network: Any = load_model(one, tokenizer, torch.float32).eval()
    engine.check(one, network, torch.float32)
    scorers = {
        way: engine.scorer(each, model=network, tokenizer=tokenizer, dtype=torch.float32)
        for way, each in composed.items()
    }
    return network, tokenizer, pairs, scorers


def by_turns(
    network: Any, functions: Mapping[str, Callable[[], Any]], num_rounds: int
) -> dict[str, dict[str, Any]]:
    """Call all functions in turn, and return what each took; the results stand under `result`."""
    found: dict[str, dict[str, Any]] = {name: {"all_seconds": []} for name in functions}
    for number in range(num_rounds):
        for name in list(functions)[:: 1 if number % 2 else -1]:
            read: list[int] = []
            counting = network.get_input_embeddings().register_forward_pre_hook(
                lambda module, inputs, read=read: read.append(inputs[0].numel())
            )
            start = time.process_time()
            found[name]["result"] = functions[name]()
            found[name]["all_seconds"].append(round(time.process_time() - start, 2))
            counting.remove()
            found[name]["tokens_read"] = sum(read)
            print(name, json.dumps(found[name]["all_seconds"]), flush=True)
    for each in found.values():
        each["cpu_seconds"] = median(each["all_seconds"])
    return found


def seconds_of_products(function: Callable[[], Any]) -> float:
    """Return the CPU seconds that a function spends in matrix products alone."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    times = {each.key: each.self_cpu_time_total for each in profiled.key_averages()}
    return round(sum(times.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm")) / 1e6, 2)


def largest_difference(results: list[evaluate.Scores]) -> float:
    """Return by how much two ways score a completion differently at most, in nats a token."""
    one, other = results
    return max(
        float((one.chosen_logps - other.chosen_logps).abs().max()),
        float((one.rejected_logps - other.rejected_logps).abs().max()),
    )


def measure_scoring(options: argparse.Namespace, parts: Any) -> dict[str, Any]:
    """Score all pairs in both ways by turns."""
    network, _, pairs, scorers = parts
    ways = {way: partial(evaluate.score, scorer, pairs, way) for way, scorer in scorers.items()}
    found = by_turns(network, ways, options.num_rounds)
    results = [each.pop("result") for each in found.values()]
    for way, each in found.items():
        each["seconds_of_products"] = seconds_of_products(ways[way])
        each["bytes_beyond_the_model"] = bytes_beyond_the_model(way)
    sequences, rows = found["sequences"], found["rows"]
    ratios = {
        f"{name}_ratio": round(sequences[name] / rows[name], 2)
        for name in ("cpu_seconds", "seconds_of_products", "bytes_beyond_the_model", "tokens_read")
    }
    figures = evaluate.preference_metrics(results[1])
    return found | ratios | {"largest_difference": largest_difference(results), "figures": figures}


def measure_answers(options: argparse.Namespace, parts: Any) -> dict[str, Any]:
    """Answer prompts by turns: ended answers stay in their batch, or leave it."""
    network, tokenizer, pairs, _ = parts
    asked = pairs.select(range(min(options.num_answers, len(pairs))))

    def answer(leaving: float) -> list[evaluate.Generation]:
        with mock.patch.object(evaluate, "LEAVING", leaving), torch.no_grad():
            return evaluate.generate(
                network, tokenizer, asked, options.max_new_tokens, desc="answer"
            )

    ways = {name: partial(answer, leaving) for name, leaving in ANSWERS.items()}
    found = by_turns(network, ways, options.num_rounds)
    stay, leave = (each.pop("result") for each in found.values())
    return found | {"num_answers": len(leave), "answers_are_the_same": stay == leave}


def bytes_beyond_the_model(way: str) -> int:
    """Return what a process of its own grows by as it scores the pairs, in bytes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def growth(parts: Any, way: str) -> int:
    """Score all pairs in one way, and return by how much this process grows, in bytes."""
    _, _, pairs, scorers = parts
    memory.reset_peak()
    before = memory.peak_bytes()
    evaluate.score(scorers[way], pairs, way)
    return memory.peak_bytes() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What an evaluation takes.")
    parser.add_argument("folder", nargs="?", help="folder of a model")
    parser.add_argument("pairs", nargs="?", help="file of pairs")
    parser.add_argument("--small", action="store_true", help="the embedded model and its pairs")
    parser.add_argument("--num-pairs", type=int, help="32; with --small 400")
    parser.add_argument("--num-answers", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if bool(options.folder and options.pairs) == options.small:
        parser.error("either FOLDER and PAIRS, or --small")
    options.num_pairs = options.num_pairs or (400 if options.small else 32)
    silence()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    parts = load(options)
    if options.memory_of:
        print(growth(parts, options.memory_of))
        return
    report = {
        "scoring": measure_scoring(options, parts),
        "answers": measure_answers(options, parts),
        "num_pairs": len(parts[2]),
        "versions": versions(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
