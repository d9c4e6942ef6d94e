"""The interface between the training loop and an optimizer: clipping, gradients, memory."""

import torch
from torch import Tensor, nn

from orpo_lab.optimizer.galore import GaLore
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.parts import local, whole


class Updater:
    """An optimizer, with the methods that the training loop calls.

    Args:
        optimizer: of the model's trainable parameters.
        model: all its gradients together are clipped by one norm.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer, self.parameters = optimizer, list(model.parameters())

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the next update uses."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def average(self, devices: OneDevice) -> None:
        """Average the gradients of a step over all processes, before they are clipped."""
        devices.average_gradients([p for p in self.parameters if p.requires_grad])

    @property
    def sends_in_backward(self) -> bool:
        """Whether the processes exchange gradients inside a backward pass."""
        return False

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; 0: do not scale.

        Returns:
            The norm before scaling, a scalar on the device.
        """
        norm = whole(nn.utils.get_total_norm(self.gradients()))
        if max_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm

    def gradient_bytes(self) -> int:
        """Return the bytes of all gradients of the weights at the end of a backward pass."""
        return sum(local(p).nbytes for p in self.parameters if p.requires_grad)

    def drop_gradients(self) -> None:
        """Drop the gradients of a step that begins again."""
        self.optimizer.zero_grad()

    def memory(self) -> dict[str, dict[str, int]] | None:
        """Return bytes by kind of weight and by use; None: the optimizer does not count them."""
        return None


class GaLoreUpdater(Updater):
    """The GaLore optimizer; in layer-wise mode GaLore itself holds and clips the gradients."""

    optimizer: GaLore

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the next update uses; in layer-wise mode, projected ones."""
        return self.optimizer.gradients()

    def average(self, devices: OneDevice) -> None:
        """Average the projected gradients; see `GaLore.average`."""
        self.optimizer.average()

    @property
    def sends_in_backward(self) -> bool:
        """Whether the processes exchange gradients inside a backward pass."""
        return self.optimizer.layerwise and self.optimizer.processes is not None

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients, and return their norm before scaling; see `Updater.clip`.

        Where GaLore projects gradients before they are clipped, return the norm of the projected
        gradients. GaLore clips them itself.
        """
        if self.optimizer.clips:
            return nn.utils.get_total_norm(self.gradients())
        return super().clip(max_norm)

    def gradient_bytes(self) -> int:
        """Return what `Updater.gradient_bytes` returns, without the gradients that are freed.

        The projected gradients always exist, and are not counted.
        """
        return super().gradient_bytes() - sum(p.nbytes for p in self.optimizer.freed())

    def drop_gradients(self) -> None:
        """Drop the gradients of a step that begins again, but keep the bases taken from them."""
        self.optimizer.drop_gradients()

    def memory(self) -> dict[str, dict[str, int]]:
        """Return bytes by kind of weight and by use; see `GaLore.memory`."""
        return self.optimizer.memory()
