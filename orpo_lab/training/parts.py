"""Parts of tensors that several processes share: each holds a part (torch's `DTensor`).

A tensor that is not shared is its own only part.
"""

from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orpo_lab.model.causal import without_adapters


def is_sharded(model: Any) -> bool:
    """Return whether the processes share the weights of a model, or of the base under adapters."""
    return isinstance(without_adapters(model), FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts; all processes must call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
