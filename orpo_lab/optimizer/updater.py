"""What a training loop needs to know of an optimizer: who clips, who has the gradients, memory."""

import torch
from torch import Tensor, nn

from orpo_lab.optimizer.galore import GaLore


class Updater:
    """An optimizer, and what a training loop needs to know of it.

    Args:
        optimizer: of the model's trainable parameters.
        model: its gradients are clipped together.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer, self.parameters = optimizer, list(model.parameters())

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the next update takes."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`; 0: leave them.

        Returns:
            The norm before, a scalar on the device.
        """
        if max_norm == 0:
            return nn.utils.get_total_norm(self.gradients())
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def drop_gradients(self) -> None:
        """Drop the gradients of a step that is taken again."""
        self.optimizer.zero_grad()

    def memory(self) -> dict[str, dict[str, int]] | None:
        """Return bytes by kind of weight; None: the optimizer keeps no account."""
        return None


class GaLoreUpdater(Updater):
    """GaLore, which layer-wise has the gradients itself, and clips them."""

    optimizer: GaLore

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the next update takes; layer-wise, projected ones."""
        return self.optimizer.gradients()

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients; layer-wise return their projected norm, and leave them to GaLore."""
        if self.optimizer.layerwise:
            return nn.utils.get_total_norm(self.gradients())
        return super().clip(max_norm)

    def drop_gradients(self) -> None:
        """Drop the gradients of a step that is taken again, and keep a basis taken from them."""
        self.optimizer.drop_gradients()

    def memory(self) -> dict[str, dict[str, int]]:
        """Return bytes by kind of weight, see `GaLore.memory`."""
        return self.optimizer.memory()
