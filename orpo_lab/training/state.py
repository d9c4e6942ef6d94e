"""All that a step changes: what a checkpoint holds, and what a fork starts from."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from orpo_lab.errors import UserError, one_line
from orpo_lab.optimizer.updater import Updater
from orpo_lab.training.checkpoint import STATE
from orpo_lab.training.devices import OneDevice

# What peft calls an adapter's weights
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class RandomState:
    """Where torch's random numbers are, from which dropout takes its own."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """Return where the random numbers are now."""
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Let the random numbers go on from here."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.gpu)


class State:
    """Everything that an optimizer step changes.

    Settings (learning rate, weight decay, schedule) are no state: a run that goes on from a
    checkpoint has its own, which may be others than those of the run that wrote the checkpoint.

    Args:
        model: its trained weights change.
        updater: of these weights; the rates of its parameter groups are their peaks.
        devices: where the model computes.
        share_of_peak: see `optimizer.share_of_peak`.
    """

    def __init__(
        self,
        model: nn.Module,
        updater: Updater,
        devices: OneDevice,
        share_of_peak: Callable[[int], float],
    ) -> None:
        self.model, self.updater, self.devices = model, updater, devices
        self.share_of_peak = share_of_peak
        self.step = 0
        """Optimizer steps that have been taken."""
        self.num_updates = 0
        """Steps of the learning rate's schedule: all but those that fp16's scaling skipped."""
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in updater.optimizer.param_groups
        ]

    def set_rate(self) -> float:
        """Set the learning rate of the next update, and return that of the first group."""
        share = self.share_of_peak(self.num_updates)
        groups = self.updater.optimizer.param_groups
        for group, settings in zip(groups, self._settings, strict=True):
            group["lr"] = settings["lr"] * share
        return groups[0]["lr"]

    def update(self) -> None:
        """Take the step whose gradients there are."""
        if self.devices.update(self.updater.optimizer):
            self.num_updates += 1
        self._finish_step()

    def skip_update(self) -> None:
        """Leave every weight and moment as it is, and count the step."""
        self.updater.optimizer.zero_grad()
        self.devices.skip_update()
        self.num_updates += 1
        self._finish_step()

    def _finish_step(self) -> None:
        self.model.zero_grad()
        self.step += 1

    def save(self, folder: Path) -> None:
        """Write a checkpoint: the weights as their library does, and the rest to one file."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        random = RandomState.now()
        rest = {
            "step": self.step,
            "num_updates": self.num_updates,
            "optimizer": self.updater.optimizer.state_dict(),
            "devices": self.devices.state_dict(),
            "random": {"cpu": random.cpu, "gpu": random.gpu},
        }
        torch.save(rest, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on where `save` was called.

        Raises:
            UserError: the folder holds another model's weights, or more than a checkpoint of ours.
        """
        self.load_weights(folder)
        try:
            rest = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        except UnpicklingError as error:  # torch reads nothing but tensors and plain values
            raise UserError(
                f"{folder} holds more than a checkpoint of ours does, and nothing of that was run "
                f"({one_line(error)[:100]}); do not trust this folder"
            ) from error
        optimizer = self.updater.optimizer
        optimizer.load_state_dict(rest["optimizer"])
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group |= settings
        self.devices.load_state_dict(rest["devices"])
        self.step, self.num_updates = rest["step"], rest["num_updates"]
        RandomState(**rest["random"]).restore()

    def load_weights(self, folder: Path) -> None:
        """Take the weights of a checkpoint or of a trained model, and no more.

        Raises:
            UserError: the weights are those of another model.
        """
        if isinstance(self.model, PeftModel):
            weights, adapter = load_file(folder / ADAPTER), self.model.active_adapter
            result: Any = set_peft_model_state_dict(self.model, weights, adapter_name=adapter)
            check_loaded(self.model, result.missing_keys, result.unexpected_keys)
            return
        # Not by their names: experts of a mixture, for example, are saved one by one
        loaded, told = type(self.model).from_pretrained(  # type: ignore[attr-defined]
            folder, dtype=self.model.dtype, output_loading_info=True
        )
        check_loaded(self.model, told["missing_keys"], told["unexpected_keys"])
        self.model.load_state_dict(loaded.state_dict())


def check_loaded(model: nn.Module, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Check that every trained weight was loaded; libraries name also weights that are tied.

    Args:
        model: the weights are for.
        missing: names that had no weight.
        unexpected: names of weights that nothing has.

    Raises:
        UserError: a weight is missing, or there are others.
    """
    weights = {
        name: weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    lost = [name for name, weight in weights.items() if id(weight) not in loaded]
    if lost or unexpected:
        names = ", ".join([*lost, *unexpected][:3])
        raise UserError(f"the checkpoint's weights are not this model's ({names}); start a new run")
