"""The meter of preference: how much of a step's gradient comes from the preference term."""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from orpo_lab import memory
from orpo_lab.engine.base import Engine, MicroBatch, Pair
from orpo_lab.methods.base import LIKELIHOOD, PREFERENCE
from orpo_lab.metrics import PREFERENCE_SHARE
from orpo_lab.training.state import RandomState, State

log = logging.getLogger(__name__)

# For two terms, the product of their gradients; of one term twice: the square of its norm
Products = dict[tuple[str, str], Tensor]

# The largest number of parts in which weights are measured. Each part takes passes of its own
MAX_PARTS = 16
# How many numbers of a gradient are widened to fp64 at once
CHUNK = 2**22


@dataclass
class PreferenceMeter:
    """Measures the gradients of a step's likelihood term and of its preference term.

    Each term gets a forward and a backward pass of its own over the step's pairs, with the random
    numbers of the step itself, so with its dropout. The two gradients add up to the gradient of the
    step. The passes change nothing: neither the weights' `grad`, nor random numbers, nor a state of
    the optimizer. So the step is the same bit for bit as without a meter.

    The sums of two gradients and the gradients of a micro-batch need memory, each as much as the
    trained weights. If memory runs out, half of the weights are measured at a time, then a quarter,
    and so on.
    """

    interval: int | None
    """Number of steps from one measurement to the next; None: there are no measurements."""
    num_parts: int = 1
    """Number of parts of the weights that are measured one after another."""

    def is_due(self, step: int) -> bool:
        """Return whether to measure a step, 1 for the first.

        The first step is never measured: its peak of memory decides on `engine.fit_budget`.
        """
        return self.interval is not None and step > 1 and step % self.interval == 0

    def measure(
        self, engine: Engine, state: State, pairs: Sequence[Pair], beta: float, random: RandomState
    ) -> dict[str, float]:
        """Return norms, cosine and share of the gradients of a step's two terms, before clipping.

        A figure that does not exist is left out: the norm of a term that the method does not have,
        and the cosine if a gradient is zero. If memory runs out even for small parts of the
        weights, a warning says so, and this and all later measurements are left out.

        Args:
            engine: as it has computed the gradient of the step.
            state: before the update of the step.
            pairs: all pairs of the step.
            beta: the method's beta in this step.
            random: the state of the random numbers when the step began.
        """
        after = RandomState.now()
        try:
            while self.interval is not None:
                try:
                    return figures(self._products(engine, state, pairs, beta, random))
                except Exception as error:
                    if not memory.ran_out(error):
                        raise
                # Only after the except block, since the error's traceback keeps all activations
                memory.give_back()
                self._take_smaller_parts(state.step + 1)
        finally:
            after.restore()
        return {}

    def _take_smaller_parts(self, step: int) -> None:
        self.num_parts *= 2
        if self.num_parts <= MAX_PARTS:
            log.info("step %d: the meter measures weights in %d parts now", step, self.num_parts)
            return
        self.interval = None
        log.warning(
            "step %d: out of memory in the meter of preference, which is left out from now on; the "
            "step itself is not touched by that (engine.tokens_per_microbatch lower, or "
            "train.meter_steps=null)",
            step,
        )

    def _products(
        self, engine: Engine, state: State, pairs: Sequence[Pair], beta: float, random: RandomState
    ) -> Products:
        weights = [p for p in state.model.parameters() if p.requires_grad]
        micro_batches, found = engine.micro_batches(pairs), Products()
        for part in split(weights, self.num_parts):
            gradients, has_room = {}, True
            try:
                for term in (LIKELIHOOD, PREFERENCE):
                    random.restore()
                    gradient = _gradient(engine, state, micro_batches, beta, term, part)
                    if gradient is not None:
                        gradients[term] = gradient
            except Exception as error:
                if not memory.ran_out(error):
                    raise
                has_room = False
            if state.devices.any(not has_room):
                raise torch.OutOfMemoryError("in this process or in another")
            for gradient in gradients.values():
                state.devices.average_(gradient)
            for both in combinations_with_replacement(gradients, 2):
                product = dot(*(gradients[term] for term in both))
                found[both] = found[both] + product if both in found else product
        return found


def _gradient(
    engine: Engine,
    state: State,
    micro_batches: Sequence[MicroBatch],
    beta: float,
    term: str,
    weights: Sequence[Tensor],
) -> list[Tensor] | None:
    """Return a term's gradients, one for each weight; None: the method has no such term.

    The micro-batches are added up in the precision of the weights, as the step adds them up.
    """
    sums = [torch.zeros_like(weight) for weight in weights]
    with engine.reading():
        for micro_batch in micro_batches:
            share = engine.score(micro_batch, beta).parts.get(term)
            if share is None:
                return None
            for total, gradient in zip(sums, state.devices.gradients(share, weights), strict=True):
                if gradient is not None:
                    total += gradient
    return sums


def figures(products: Products) -> dict[str, float]:
    """Return the metrics of the meter; see `PreferenceMeter.measure`."""
    norms = {a: math.sqrt(product) for (a, b), product in products.items() if a == b}
    found = {f"meter/{term}_norm": norm for term, norm in norms.items()}
    if total := sum(norms.values()):
        found[PREFERENCE_SHARE] = norms.get(PREFERENCE, 0.0) / total
    if scale := norms.get(LIKELIHOOD, 0.0) * norms.get(PREFERENCE, 0.0):
        found["meter/cosine"] = float(products[LIKELIHOOD, PREFERENCE]) / scale
    return found


def split(weights: Sequence[Tensor], num_parts: int) -> list[list[Tensor]]:
    """Return the weights in their order, in at most `num_parts` parts of about equal bytes."""
    total, before, parts = sum(weight.nbytes for weight in weights), 0, defaultdict(list)
    for weight in weights:
        parts[before * num_parts // total].append(weight)
        before += weight.nbytes
    return list(parts.values())


def dot(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return the sum of the products of all numbers of two lists of tensors, a scalar in fp64."""
    return torch.stack(
        [
            torch.dot(some.double(), others.double())
            for a, b in zip(ours, theirs, strict=True)
            for some, others in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True)
        ]
    ).sum()
