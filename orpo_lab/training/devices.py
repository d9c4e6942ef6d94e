"""Where a run computes. The only module that may ask how many processes train, and on which device.

Today a run has one process and one device. Several processes will be another class with the same
methods: it averages totals and gradients, wraps the model, and lets one process write the files.
"""

from typing import Any

import torch
from torch import Tensor


class OneDevice:
    """One process on one device.

    Args:
        device: where the model is.
        dtype: precision of the arithmetic. In fp16 the loss is scaled, so that small gradients do
            not vanish; a step whose scaled gradients overflow is skipped, and the scale lowered.
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

        To a GPU the tensors travel while the GPU still computes the step before.
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
        """Return a context in which a model computes in the run's precision."""
        is_narrow = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(
            self.device.type, self.dtype if is_narrow else None, enabled=is_narrow
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those of the weights."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradients of a step their own size, before anybody looks at them."""
        if self.scaler:
            self.scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let an optimizer take its step; return whether the loss's scaling allowed the step."""
        if self.scaler is None:
            optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def skip_update(self) -> None:
        """Go on to the next step without the update of this step."""
        if self.scaler:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what is to go on after a resume: the loss's scale, where there is one."""
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if self.scaler and state:
            self.scaler.load_state_dict(state)
