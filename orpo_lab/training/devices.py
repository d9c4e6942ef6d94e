"""The device and the processes of a run. No other module asks torch how many processes train.

Today a run has one process and one device. Several processes will need another class with the same
methods. That class will average totals and gradients, wrap the model, and let one process write the
files.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def num_processes() -> int:
    """Return how many processes train together, by torch.distributed; 1 without it."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


class OneDevice:
    """One process on one device.

    Args:
        device: the device that the model is on.
        dtype: precision of the arithmetic. In fp16 the loss is scaled, so that small gradients do
            not vanish. If scaled gradients overflow, the step is skipped and the scale lowered.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        is_scaled = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type) if is_scaled else None

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes of a tensor of any shape."""
        return tensor

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors on the device.

        The copy to a GPU can run while the GPU still computes the step before.
        """
        return {
            name: self._moved(value) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def precision(self) -> torch.autocast:
        """Return a context manager, inside which a model computes in the run's precision."""
        is_narrow = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(
            self.device.type, self.dtype if is_narrow else None, enabled=is_narrow
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to the gradients of the weights.

        In fp16 the added gradients are multiplied by the loss scale.
        """
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def gradients(self, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of a scalar loss, one for each weight; `weight.grad` is not touched.

        In fp16 the gradients are computed at the loss scale, as in `backward`, and then divided by
        it. None: the loss does not depend on the weight.
        """
        if self.scaler is None:
            return [*torch.autograd.grad(loss, weights, allow_unused=True)]
        scale = self.scaler.get_scale()
        found = torch.autograd.grad(loss * scale, weights, allow_unused=True)
        return [None if gradient is None else gradient / scale for gradient in found]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of a step by the loss scale, in place; called before they are read.

        Without a loss scale nothing is done.
        """
        if self.scaler:
            self.scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let an optimizer take its step; return False if loss scaling skipped the step."""
        if self.scaler is None:
            optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def skip_update(self) -> None:
        """Leave out the optimizer's step; only the loss scale is updated."""
        if self.scaler:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the state of the loss scale; empty without a scale."""
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.scaler and state:
            self.scaler.load_state_dict(state)
