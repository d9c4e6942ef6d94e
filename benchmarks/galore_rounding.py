"""How exact GaLore's product has to be: `python benchmarks/galore_rounding.py MODEL PAIRS`.

Trains the model in folder MODEL with GaLore on the pairs in folder PAIRS (`train.jsonl`,
`test.jsonl`). Each projected weight gets scale * A B, where one factor is the basis and the other
one is Adam's update U in fp32. In bf16 training weight and basis are bf16, so they are rounded to
bf16 here before anything is compared (the run itself is fp32: few CPUs compute in bf16). A GPU's
tensor cores take U rounded to TF32 or to bf16. The error of that product stands beside the noise of
rounding the weight stochastically, which is known exactly: a sum that lies a fraction f between two
bf16 numbers with a gap g has the variance g^2 f (1 - f). `one_step` are figures of single steps.
`all_steps` compare the sum of a weight's errors over all steps with the noise of all steps: errors
that agree in sign from step to step would grow beside the noise. Root mean squares over a weight;
worst and median over weights. About 3 minutes for SmolLM2-135M on one CPU core. The last line is
one JSON object.
"""

import json
import sys
import tempfile
from collections import defaultdict
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from orpo_lab import compose, train
from orpo_lab.optimizer import galore
from orpo_lab.optimizer.write_back import write_back
from orpo_lab.records.run_folder import versions

NUM_STEPS = 10
# Bits of an fp32 number that the narrower format has not
NARROW = {"tf32": 13, "bf16": 16}


def narrow(wide: Tensor, bits: int) -> Tensor:
    """Round to nearest, without the last `bits` bits of fp32."""
    as_int = wide.contiguous().view(torch.int32)
    odd = (as_int >> bits) & 1
    return ((as_int + (2 ** (bits - 1) - 1) + odd) & -(2**bits)).view(torch.float32)


def rounding_variance(wide: Tensor) -> Tensor:
    """The variance of rounding fp32 numbers stochastically to bf16."""
    low = wide.view(torch.int32) & -(2**16)
    fraction = (wide.view(torch.int32) & (2**16 - 1)).double() / 2**16
    gap = (low + 2**16).view(torch.float32).double() - low.view(torch.float32).double()
    return gap.square() * fraction * (1 - fraction)


class Errors:
    """The errors of every projected weight, collected while GaLore writes it."""

    def __init__(self) -> None:
        self.steps: dict[int, list[dict[str, float]]] = defaultdict(list)
        self.sums: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def look(
        self, weight: Tensor, factors: tuple[Tensor, ...], *, keep: float, scale: float, key: int
    ) -> None:
        """Compare the products, and then let the weight be written."""
        if len(factors) == 2:
            found = compare(weight, factors, keep, scale)
            self.steps[id(weight)].append(shares(found))
            sums = self.sums[id(weight)]
            for kind, value in found.items():
                sums[kind] = sums[kind] + value if kind in sums else value
        write_back(weight, factors, keep=keep, scale=scale, key=key)

    def result(self) -> dict[str, Any]:
        """Worst and median over weights, of single steps and of all of them together."""
        single = [row for rows in self.steps.values() for row in rows]
        together = [shares(found) for found in self.sums.values()]
        return {
            when: {
                name: {
                    "worst": max(row[name] for row in rows),
                    "median": median(row[name] for row in rows),
                }
                for name in rows[0]
            }
            for when, rows in (("one_step", single), ("all_steps", together))
        }


def compare(
    weight: Tensor, factors: tuple[Tensor, ...], keep: float, scale: float
) -> dict[str, Tensor]:
    """Return the variance of rounding, the update, and the errors of narrower products."""
    tall = weight.shape[0] >= weight.shape[1]  # then the basis is the second factor
    update, basis = factors if tall else factors[::-1]
    basis = basis.bfloat16().float()

    def product(first: Tensor) -> Tensor:
        return scale * (first @ basis if tall else basis @ first)

    exact = product(update)
    found = {"noise": rounding_variance(keep * weight.bfloat16().float() + exact), "update": exact}
    for kind, bits in NARROW.items():
        # The product of the difference: a difference of products would be lost in fp32
        found[kind] = product(narrow(update, bits) - update)
    return found


def shares(found: dict[str, Tensor]) -> dict[str, float]:
    """Errors relative to the noise of rounding, and to the update itself."""
    noise = found["noise"].mean().sqrt()
    update = found["update"].double().square().mean().sqrt()
    result = {"update_over_noise": float(update / noise)}
    for kind in NARROW:
        error = found[kind].double().square().mean().sqrt()
        result[f"{kind}_over_noise"] = float(error / noise)
        result[f"{kind}_over_update"] = float(error / update)
    return result


def main(folder: str, pairs: str) -> None:
    """Train, measure and print."""
    # Found beside a script alone; the tests import this module as one of a package
    from galore_basis import real_run

    # The learning rate is four times that of the recipe for 7B. The errors are proportional to the
    # learning rate, the noise is not
    settings = [
        *real_run(folder, pairs),
        "dataset.num_eval=4",
        "dataset.num_generations=0",
        "optimizer.rank=128",
        "optimizer.update_proj_gap=5",
        "train.batch_size=2",
        "train.warmup_steps=0",
        "train.lr_scheduler_type=constant",
        f"train.max_steps={NUM_STEPS}",
    ]
    errors = Errors()
    looking = mock.patch.object(galore, "write_back", errors.look)
    with looking, tempfile.TemporaryDirectory() as scratch:
        train(compose(*settings), f"{scratch}/run")
    result = {"num_weights": len(errors.steps), "num_steps": NUM_STEPS, **errors.result()}
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} MODEL PAIRS")
    main(*sys.argv[1:])
