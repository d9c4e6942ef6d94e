"""The interface between the training loop and an optimizer: clipping, gradients, memory."""

import torch
from torch import Tensor, nn

from orpo_lab.optimizer.galore import GaLore


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

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; 0: do not scale.

        Returns:
            The norm before scaling, a scalar on the device.
        """
        if max_norm == 0:
            return nn.utils.get_total_norm(self.gradients())
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def gradient_bytes(self) -> int:
        """Return the bytes of all gradients of the weights at the end of a backward pass."""
        return sum(p.nbytes for p in self.parameters if p.requires_grad)

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

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients, and return their norm before scaling; see `Updater.clip`.

        In layer-wise mode return the norm of the projected gradients. GaLore clips them itself.
        """
        if self.optimizer.layerwise:
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
