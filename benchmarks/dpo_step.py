"""A DPO step of ours against TRL's: `benchmarks/dpo_step.py --smollm2 FOLDER --pairs FOLDER`.

One optimizer step without its update, as in step.py: adapters on SmolLM2, math pairs, batches of 4
pairs, fp32, CPU seconds of one thread, all ways by turns in one process. TRL's DPOTrainer computes
the reference in every step, with the adapters off, or is given it (precompute_ref_log_probs); ours
always has it from before training. ORPO's step by both engines stands beside. About 10 minutes;
`--batches 2` for a look. The last line is one JSON object.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import datasets
import torch
from step import BETA, CASES, NUM_PAIRS, Case, compose_case, load_parts, make_engine, untrained
from trl import DPOConfig, DPOTrainer

from orpo_lab import engine
from orpo_lab.data import Data
from orpo_lab.engine import reference
from orpo_lab.engine.base import REFERENCE, Engine
from orpo_lab.records.run_folder import versions
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.loop import add_gradients, batches
from orpo_lab.training.state import State
from orpo_lab.upstream import silence

CASE = CASES["c_math_lora"]
# A function that adds up the gradients of a batch of pairs, and returns the loss
Step = Callable[[list[Any]], float]


class OnTokens(DPOTrainer):
    """TRL's trainer, for pairs that are tokenized already: their columns have TRL's names."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *rest: Any) -> datasets.Dataset:
        return dataset


def our_steps(
    parts: tuple[Any, Any, datasets.Dataset], case: Case, options: argparse.Namespace
) -> tuple[dict[str, Step], datasets.Dataset]:
    """Return ORPO's step by both engines and DPO's by ours, and the pairs with their reference."""
    network, tokenizer, pairs = parts
    devices = OneDevice(torch.device("cpu"), torch.float32)
    loaded = compose_case(case, "shared_prefix", options, "method=dpo")
    both = Data(pairs, pairs.select([0]), report={})
    found = reference.compute(loaded, network, tokenizer, both, dtype=torch.float32)
    dpo = engine.build(loaded, model=network, tokenizer=tokenizer, devices=devices)
    made: dict[str, tuple[Engine, State]] = {
        "orpo, trl": make_engine(case, "trl", parts, options),
        "orpo, ours": make_engine(case, "shared_prefix", parts, options),
        "dpo, ours": (dpo, untrained(network, devices)),
    }

    def step(name: str, batch: list[Any]) -> float:
        loss, _ = add_gradients(*made[name], batch, BETA)
        network.zero_grad()
        return loss.item()

    return {name: partial(step, name) for name in made}, reference.attach(both, found).train


def trl_steps(parts: tuple[Any, Any, datasets.Dataset], case: Case, folder: str) -> dict[str, Step]:
    """Return DPO's step by TRL, with the reference computed in each step, and with it given."""
    network, tokenizer, pairs = parts
    trainer = OnTokens(
        model=network.unload(),
        peft_config=network.peft_config["default"],
        args=DPOConfig(
            output_dir=folder,
            beta=BETA,
            max_length=case.max_length,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=case.checkpointing,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.model.train()

    def step(batch: list[Any], *, is_given: bool) -> float:
        inputs = trainer.data_collator([dict(pair) for pair in batch])
        trainer.precompute_ref_logps = is_given
        if is_given:
            sums = torch.tensor([pair[REFERENCE] for pair in batch])
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = sums.unbind(1)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.model.zero_grad()
        return loss.item()

    return {
        "dpo, trl": partial(step, is_given=False),
        "dpo, trl, reference given": partial(step, is_given=True),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A DPO step of ours against TRL's.")
    parser.add_argument("--smollm2", required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--pairs", required=True, help="folder of math_pairs")
    parser.add_argument("--batches", type=int, default=CASE.batches)
    options = parser.parse_args()
    case = replace(CASE, batches=options.batches)
    silence()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    parts = load_parts(case, options)
    parts[0].train()
    with tempfile.TemporaryDirectory() as folder:
        steps, pairs = our_steps(parts, case, options)
        steps |= trl_steps(load_parts(case, options), case, folder)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for number, batch in enumerate(
            itertools.islice(batches(pairs, NUM_PAIRS, 0, 0), case.batches)
        ):
            for name in list(steps)[:: 1 if number % 2 else -1]:
                start = time.process_time()
                losses[name].append(steps[name](batch))
                seconds[name].append(time.process_time() - start)
            print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)

    def ratio(theirs: str, ours: str) -> float:
        both = zip(seconds[theirs], seconds[ours], strict=True)
        return round(median(their / our for their, our in both), 2)

    report = {
        "orpo_ratio": ratio("orpo, trl", "orpo, ours"),
        "dpo_ratio": ratio("dpo, trl", "dpo, ours"),
        "dpo_ratio_reference_given": ratio("dpo, trl, reference given", "dpo, ours"),
        "cpu_seconds_per_pair": {
            name: round(median(values) / NUM_PAIRS, 3) for name, values in seconds.items()
        },
        "losses_of_the_first_batch": {name: values[0] for name, values in losses.items()},
        "batches": case.batches,
        "versions": versions(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
