"""Add an update to a weight: `weight = keep * weight + scale * update`.

The update [m, n] is given whole, or as two factors [m, r] and [r, n]. A bf16 weight is added to in
fp32 and rounded stochastically: the result is one of the two bf16 numbers next to the sum, and its
mean is the sum. On a GPU one kernel (`kernel.py`) reads the factors and the weight, computes the
sum and the random numbers, and writes the weight. Elsewhere torch's operators do the same.

The random numbers depend on the key and on the place in the weight alone. The kernel draws other
numbers than torch's generators.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Torch's operators round about so many numbers of a weight at a time. The temporary tensors of one
# part stay small, and mostly in a CPU's cache.
PART = 2**20
# A kernel that could not be compiled once is not tried again
_kernel_failed = False


def write_back(
    weight: Tensor, factors: tuple[Tensor, ...], *, keep: float, scale: float, key: int
) -> None:
    """Change a weight to `keep * weight + scale * update`, in place.

    Args:
        weight: bf16, or of the factors' precision.
        factors: the update, of the weight's shape; or a pair [m, r], [r, n], whose product is the
            update of a weight [m, n]. An update is fp32 or fp64. The other factor of a pair has any
            precision.
        keep: 1 minus the weight decay of this step.
        scale: factor of the update.
        key: 0 to 2**63 - 1, decides the random numbers of the rounding.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == wide:
        _add(weight, factors, keep, scale)
    elif not _add_by_kernel(weight, factors, keep, scale, key):
        _add_rounded(weight, factors, keep, scale, key)


def _add(wide: Tensor, factors: tuple[Tensor, ...], keep: float, scale: float) -> Tensor:
    """Add an update to a tensor of fp32 or fp64, in place, and return the tensor."""
    if len(factors) == 1:
        return wide.mul_(keep).add_(factors[0], alpha=scale)
    left, right = (factor.to(wide.dtype) for factor in factors)
    return wide.addmm_(left, right, beta=keep, alpha=scale)


def _add_rounded(
    weight: Tensor, factors: tuple[Tensor, ...], keep: float, scale: float, key: int
) -> None:
    """Add an update to a bf16 weight by torch's operators, part by part."""
    parts = _parts(weight)
    sums: Iterable[Tensor]
    if len(factors) == 1:
        updates = zip(parts, _parts(factors[0]), strict=True)
        sums = (_add(part.float(), (update,), keep, scale) for part, update in updates)
    else:
        sums = _parts(_add(weight.float(), factors, keep, scale))
    generator = torch.Generator(weight.device).manual_seed(key)
    for part, wide in zip(parts, sums, strict=True):
        part.copy_(stochastic_round(wide, generator))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor along its first dimension into parts of about PART numbers."""
    tensor = torch.atleast_1d(tensor)
    return tensor.split(max(1, PART * len(tensor) // max(1, tensor.numel())))


def stochastic_round(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 numbers to bf16 values, up or down at random so that the mean is kept, in place.

    A bf16 number is the upper 16 bits of an fp32 number. A uniform random number of 16 bits is
    added to the lower 16 bits, and then the lower bits are set to zero. In infinity the lower bits
    are zero, so infinity does not change. Nothing is added to NaN: all bits of a GPU's NaN are 1,
    and a sum would run over into the sign.
    """
    bits = wide.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 2**16, generator=generator)
    noise.masked_fill_(wide.isnan(), 0)
    return bits.add_(noise).bitwise_and_(-(2**16)).view(torch.float32)


def round_to(wide: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return fp32 numbers in another precision: in bf16 as `stochastic_round` does, in place.

    The nearest bf16 number would undo every change that is smaller than half a step of bf16.
    """
    if dtype == torch.bfloat16:
        wide = stochastic_round(wide, generator)
    return wide.to(dtype)


def _add_by_kernel(
    weight: Tensor, factors: tuple[Tensor, ...], keep: float, scale: float, key: int
) -> bool:
    """Add an update to a bf16 weight by the kernel, and return True; False: it cannot be used.

    A kernel that does not compile leaves the weight unchanged.
    """
    global _kernel_failed
    if _kernel_failed or not _fits_kernel(weight):
        return False
    try:
        from orpo_lab.optimizer import kernel

        kernel.add_rounded(weight, factors, keep, scale, key)
    except Exception as error:  # whatever a compiler, a driver or an incomplete install may raise
        _kernel_failed = True
        log.warning(
            "galore: the kernel that writes bf16 weights cannot be used (%s: %s); torch's "
            "operators do the same, slower and with other random numbers",
            type(error).__name__,
            str(error).split("\n")[0],
        )
        return False
    return True


def _fits_kernel(weight: Tensor) -> bool:
    return weight.is_cuda and weight.is_contiguous()
