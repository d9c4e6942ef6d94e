"""What several processes of one run change in its plan: memory that they share, bytes they send.

Every process holds the whole model, or with `train.sharding=full` its part (`training.sharded`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lab.config import Config
from orpo_lab.config.optimizer import Galore, Lora
from orpo_lab.config.quantization import Nf4
from orpo_lab.model.projections import projections
from orpo_lab.optimizer import rank_and_gap
from orpo_lab.plan.memory import Memory
from orpo_lab.plan.shapes import Sizes, frozen_bytes, quantized_bytes, trained
from orpo_lab.training.devices import dealt
from orpo_lab.training.sharded import is_asked


def hand(pairs: Sequence[Sizes], processes: int) -> list[Sizes]:
    """Return the pairs of a step that the process with the most tokens takes."""
    sizes = [sum(each) for each in pairs]
    most = max(dealt(sizes, processes), key=lambda taken: sum(sizes[i] for i in taken))
    return [pairs[i] for i in most]


def share(memory: Memory, config: Config, model: Any, processes: int) -> Memory:
    """Return what a process takes whose weights are sharded; an estimate for what is gathered.

    At its peak a process has gathered the embeddings with the head, one decoder layer, and the next
    one, which torch fetches early. Gradients are whole until they are averaged.

    Args:
        memory: of a run of one process.
        config: the run's configuration.
        model: what `shapes.skeleton` returns.
        processes: number of processes.
    """
    outer, layer, kept = _groups(config, memory, model)
    gathered = outer + 2 * layer

    def part(size: int) -> int:
        return -(-size // processes)

    if isinstance(config.optimizer, Lora):
        frozen = kept + part(memory.frozen - kept)
        return replace(memory, frozen=frozen, working=memory.working + gathered)
    return replace(
        memory,
        trained=part(memory.trained),
        gradients=part(memory.gradients),
        moments=part(memory.moments),
        working=memory.working + gathered + max(outer, layer),
    )


def _groups(config: Config, memory: Memory, model: Any) -> tuple[int, int, int]:
    """Return the bytes outside of decoder layers, those of a layer, and those never shared.

    Never shared are the constants of 4-bit weights.
    """
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    outer = sum(weight.nbytes for weight in model.parameters() if id(weight) not in inside)
    kept = 0
    if isinstance(config.quantization, Nf4):
        weights = [layer.weight for layer in projections(model).values()]
        sizes = (quantized_bytes(each, config.quantization) for each in weights)
        kept = sum(sizes) - sum(-(-each.numel() // 2) for each in weights)
    whole = memory.frozen if isinstance(config.optimizer, Lora) else memory.trained
    return outer, (whole - outer - kept) // len(layers), kept


def gradient_bytes(config: Config, model: Any, num_steps: int) -> float:
    """Return how many bytes of gradients a process gives to the others in a step, on average.

    Of a matrix [m, n], m <= n, GaLore gives r / m of the gradient in fp32, and the gradient itself
    in the first step and then once in `update_proj_gap` steps.

    Args:
        config: the run's configuration, without sharding.
        model: what `shapes.skeleton` returns.
        num_steps: number of optimizer steps.
    """
    if not isinstance(config.optimizer, Galore):
        return sum(weight.nbytes for weight in trained(config, model))
    rank, gap = rank_and_gap(config.optimizer, model.config, num_steps)
    turns = (1 + (num_steps - 1) / gap) / num_steps
    layers = {id(layer.weight) for layer in projections(model).values()}
    given = 0.0
    for weight in model.parameters():
        share = rank / min(weight.shape) if id(weight) in layers else 1.0
        given += 4 * weight.numel() * min(1.0, share)
        given += weight.nbytes * turns if share < 1 else 0
    return given


@dataclass(frozen=True)
class Exchange:
    """The seconds in which several processes wait for each other's bytes."""

    of_step: float
    """The mean of the gradients, once a step."""
    of_pass: float
    """Sharded weights, once a pass of the model; gradients of sharded weights count as a pass."""


def exchange(
    config: Config, model: Any, link_gbps: float, processes: int, num_steps: int
) -> Exchange:
    """Return what a run's processes send, as seconds; nothing overlaps with the arithmetic.

    In a ring of n processes each sends 2 (n - 1) / n of the bytes that are averaged (Patarasuk and
    Yuan 2009), and (n - 1) / n of those that are gathered.

    Args:
        config: the run's configuration.
        model: what `shapes.skeleton` returns.
        link_gbps: GB/s between two devices, each way.
        processes: number of processes.
        num_steps: number of optimizer steps.
    """
    ring = (processes - 1) / processes / link_gbps / 1e9
    averaged = 2 * ring * gradient_bytes(config, model, num_steps)
    if not is_asked(config, processes):
        return Exchange(averaged, 0.0)
    if isinstance(config.optimizer, Lora):
        return Exchange(averaged, ring * frozen_bytes(model, config.quantization))
    return Exchange(0.0, ring * sum(weight.nbytes for weight in model.parameters()))
