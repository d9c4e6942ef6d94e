"""Numbers that are not finite: kept from every weight, and the run stopped or the step skipped."""

import logging
import math

import torch
from torch import Tensor

from orpo_lab.config.train import Train
from orpo_lab.errors import LIKELY_CAUSES, NonFiniteError
from orpo_lab.training.meter import Meter

log = logging.getLogger(__name__)


class FiniteCheck:
    """Keeps a non-finite loss or gradient from every weight, and stops the run or skips the step.

    To stop, what the check sees stays on the device: from the first such step on, gradients are
    zero. The device is asked, and the run stopped, at the next logging step and before anything is
    evaluated or saved. To skip a step, the device is asked at every step.

    Args:
        train: whether to stop or to skip, and how many steps may be skipped.
        meter: counts the skipped steps.
        is_scaled: whether the loss is scaled (fp16). The scaling meets infinite gradients by design
            and skips those steps; then only the loss is looked at.
    """

    def __init__(self, train: Train, meter: Meter, *, is_scaled: bool) -> None:
        self.train, self.meter, self.is_scaled = train, meter, is_scaled
        self.seen: Tensor | None = None
        """The first non-finite step, its loss and its gradient norm, [3]; zeros: none yet."""

    def look(self, step: int, loss: Tensor, norm: Tensor, gradients: list[Tensor]) -> None:
        """Look at a step before its update; zero its gradients, in place, if there is a fault.

        Args:
            step: its number, 1 for the first.
            loss: of the whole step, a scalar.
            norm: of all gradients before they are clipped, a scalar. A norm that overflows clips
                every gradient to zero, which would look like a fine step.
            gradients: those that the update takes, of any shapes.
        """
        loss = loss.float()
        norm = torch.zeros_like(loss) if self.is_scaled else norm.to(loss)
        now = torch.stack([torch.full_like(loss, step), loss, norm])
        if self.seen is None:
            self.seen = torch.zeros_like(now)
        is_first = ~torch.isfinite(now).all() & (self.seen[0] == 0)
        self.seen = torch.where(is_first, now, self.seen)
        if self.is_scaled:
            return
        for gradient in gradients:
            gradient.masked_fill_((self.seen[0] > 0).to(gradient.device), 0)

    def skips(self) -> bool:
        """Return whether the step that was looked at is to be skipped, and count the step.

        Raises:
            NonFiniteError: too many steps were skipped.
        """
        if self.train.on_nonfinite == "stop":
            return False
        fault = self._fault()
        if not fault:
            return False
        self.meter.num_skipped += 1
        limit = self.train.max_skipped_steps
        if self.meter.num_skipped > limit:
            raise NonFiniteError(
                f"{fault}; more than train.max_skipped_steps={limit} were skipped, and the run "
                f"stops. {LIKELY_CAUSES}"
            )
        log.warning("%s; skipped (%d of %d)", fault, self.meter.num_skipped, limit)
        self.seen = None
        return True

    def check(self) -> None:
        """Stop the run before a fault is logged over or saved.

        Raises:
            NonFiniteError: a step since the start had a non-finite loss or gradient.
        """
        if fault := self._fault():
            raise NonFiniteError(
                f"{fault}; the run stops, and nothing of that step or after it is kept. "
                f"{LIKELY_CAUSES}"
            )

    def _fault(self) -> str:
        """Return what was not finite, and at which step; empty: nothing yet."""
        if self.seen is None:
            return ""
        step, loss, norm = self.seen.tolist()  # device-to-host sync
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        return f"step {step:.0f}: the {what}" if step else ""


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Look at every trained weight.

    Args:
        model: its weights.
        step: the last one that was taken.

    Raises:
        NonFiniteError: a weight is not finite.
    """
    finite = [p.isfinite().all() for p in model.parameters() if p.requires_grad]
    if not torch.stack(finite).all():  # device-to-host sync
        raise NonFiniteError(
            f"step {step}: its update left weights that are not finite; the run stops, and nothing "
            f"of that step is kept. {LIKELY_CAUSES}"
        )
