"""The state of training: all that an optimizer step changes, and that a checkpoint holds."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from orpo_lab.errors import UserError, one_line
from orpo_lab.model.adapter import load_adapter
from orpo_lab.model.weights import check_loaded
from orpo_lab.optimizer.updater import Updater
from orpo_lab.training import sharded, tensors
from orpo_lab.training.checkpoint import STATE
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.files import Files
from orpo_lab.training.meter import Since
from orpo_lab.training.sharded import PARTS, has_parts, part_like

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RandomState:
    """The state of torch's random number generators, from which dropout draws."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """Return the present state of the generators."""
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.gpu)


class State:
    """Everything that an optimizer step changes.

    Settings (learning rate, weight decay, schedule) are not part of the state. A run that goes on
    from a checkpoint uses its own settings; the run that wrote the checkpoint may have had others.

    Args:
        model: the model whose trained weights change.
        updater: of these weights; the learning rate of each parameter group is its peak rate.
        devices: the device that the model computes on.
        share_of_peak: see `optimizer.share_of_peak`.
        may_checkpoint: whether gradient checkpointing may be switched on where memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        updater: Updater,
        devices: OneDevice,
        share_of_peak: Callable[[int], float],
        *,
        may_checkpoint: bool = False,
    ) -> None:
        self.model, self.updater, self.devices = model, updater, devices
        self.share_of_peak, self.may_checkpoint = share_of_peak, may_checkpoint
        self.step = 0
        """Number of optimizer steps that have been taken."""
        self.num_updates = 0
        """Position in the learning rate schedule: all steps but those that fp16's loss scaling
        skipped."""
        self.since = Since()
        """What was summed since the last line of metrics."""
        self.margin: float | None = None
        """Average of the batches' margins, for an adaptive beta; None: there is none."""
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in updater.optimizer.param_groups
        ]

    def enable_checkpointing(self) -> None:
        """Let the model recompute its activations in the backward pass, layer by layer."""
        model: Any = self.model
        # Older versions of transformers have only the second method
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        self.may_checkpoint = False

    def checkpoint_activations(self, step: int) -> bool:
        """Switch gradient checkpointing on, if that may be done and it is off; log a warning.

        Args:
            step: the number of the step that ran out of memory, 1 for the first.

        Returns:
            Whether gradient checkpointing was switched on.
        """
        if not self.may_checkpoint or not self.model.supports_gradient_checkpointing:
            return False
        self.enable_checkpointing()
        log.warning(
            "step %d: out of memory; taken again with gradient checkpointing, which the run keeps: "
            "the same gradient, and more time (train.gradient_checkpointing)",
            step,
        )
        return True

    def set_rate(self) -> float:
        """Set the learning rates of the next update; return the rate of the first group."""
        share = self.share_of_peak(self.num_updates)
        groups = self.updater.optimizer.param_groups
        for group, settings in zip(groups, self._settings, strict=True):
            group["lr"] = settings["lr"] * share
        return groups[0]["lr"]

    def update(self) -> None:
        """Update the weights by their gradients, and count the step."""
        if self.devices.update(self.updater.optimizer):
            self.num_updates += 1
        self._finish_step()

    def skip_update(self) -> None:
        """Count the step, but leave every weight and every moment of the optimizer as it is."""
        self.updater.optimizer.zero_grad()
        self.devices.skip_update()
        self.num_updates += 1
        self._finish_step()

    def _finish_step(self) -> None:
        self.model.zero_grad()
        self.step += 1

    def trained_weights(self) -> list[Tensor]:
        """Return the weights that the optimizer changes."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def rest(self) -> dict[str, Any]:
        """Return the state without weights; what the processes have summed is averaged.

        All processes must call this method. Random numbers are those of this process.
        """
        random, since = RandomState.now(), dict(vars(self.since))
        for name in ("sums", "total_loss"):
            if isinstance(since[name], Tensor):
                since[name] = self.devices.average(since[name])
        return {
            "step": self.step,
            "num_updates": self.num_updates,
            "optimizer": {} if has_parts(self.model) else self.updater.optimizer.state_dict(),
            "devices": self.devices.state_dict(),
            "random": {"cpu": random.cpu, "gpu": random.gpu},
            "since": since,
            "margin": self.margin,
        }

    def save(self, files: Files, rest: dict[str, Any]) -> None:
        """Write weights by `save_pretrained`, and what `rest` returned to the file STATE.

        The first process alone calls this method; all others call `save_parts`.
        """
        if has_parts(self.model):
            self.save_parts(files.folder)
        else:
            tensors.save_pretrained(self.model, files)
        tensors.save(rest, files, STATE)

    def save_parts(self, folder: Path) -> None:
        """Write this process's parts of weights and moments; nothing where they are not shared.

        Raises:
            UserError: a process cannot write its parts.
        """
        if has_parts(self.model):
            sharded.save(self.model, self.updater.optimizer, folder / PARTS)

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote, with any number of processes, sharded or not.

        Raises:
            UserError: the folder holds weights of another model, or the file STATE holds more than
                tensors and plain values.
        """
        try:
            rest = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        except UnpicklingError as error:  # torch reads nothing but tensors and plain values
            raise UserError(
                f"{folder} holds more than a checkpoint of ours does, and nothing of that was run "
                f"({one_line(error)[:100]}); do not trust this folder"
            ) from error
        optimizer = self.updater.optimizer
        if (folder / PARTS).is_dir():
            sharded.load(self.model, folder / PARTS, optimizer)
        else:
            self.load_weights(folder)
            optimizer.load_state_dict(self._parts_of(rest["optimizer"]))
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group |= settings
        self.devices.load_state_dict(rest["devices"])
        self.step, self.num_updates = rest["step"], rest["num_updates"]
        self.margin = rest.get("margin")
        RandomState(**rest["random"]).restore()
        # An earlier version of orpo_lab wrote a line with every checkpoint, and kept no sums
        self.since = Since(**self.devices.place(rest.get("since", {})))

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint or of a trained model, and nothing else.

        Raises:
            UserError: the weights are those of another model.
        """
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, folder)
            return
        if (folder / PARTS).is_dir():
            sharded.load(self.model, folder / PARTS)
            return
        # The names in the file may differ from the model's: the experts of a mixture, for example,
        # are saved one by one. `from_pretrained` puts them together
        loaded, told = type(self.model).from_pretrained(  # type: ignore[attr-defined]
            folder, dtype=self.model.dtype, output_loading_info=True
        )
        check_loaded(self.model, told["missing_keys"], told["unexpected_keys"])
        own = self.model.state_dict()
        found = {name: part_like(value, own[name]) for name, value in loaded.state_dict().items()}
        self.model.load_state_dict(found)

    def _parts_of(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with this process's parts of the moments."""
        groups = self.updater.optimizer.param_groups
        weights = [weight for group in groups for weight in group["params"]]
        return optimizer | {
            "state": {
                index: {key: part_like(value, weights[index]) for key, value in moments.items()}
                for index, moments in optimizer["state"].items()
            }
        }
