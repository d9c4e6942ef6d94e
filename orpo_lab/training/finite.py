"""Keep numbers that are not finite from every weight: stop the run, or skip the step."""

import logging
import math

import torch
from torch import Tensor

from orpo_lab.config.train import Train
from orpo_lab.errors import LIKELY_CAUSES, NonFiniteError
from orpo_lab.training.meter import Meter
from orpo_lab.training.parts import local

log = logging.getLogger(__name__)


class FiniteCheck:
    """Keeps a non-finite loss or gradient from every weight, and stops the run or skips the step.

    To stop the run, the result of the check stays on the device at first. From the first non-finite
    step on, all gradients are set to zero (not in fp16, see `look`). The result is read from the
    device, and the run stopped, at the next logging step, before each evaluation and checkpoint,
    and after the last step. To skip steps, the result is read from the device at every step.

    Args:
        train: whether to stop or to skip, and how many steps may be skipped.
        meter: counts the skipped steps.
        is_scaled: whether the loss is scaled (fp16). Infinite gradients are normal then, and loss
            scaling itself skips their steps; so only the loss is checked.
    """

    def __init__(self, train: Train, meter: Meter, *, is_scaled: bool) -> None:
        self.train, self.meter, self.is_scaled = train, meter, is_scaled
        self.seen: Tensor | None = None
        """Number, loss and gradient norm of the first non-finite step, [3]; zeros: none yet."""

    def look(self, step: int, loss: Tensor, norm: Tensor, gradients: list[Tensor]) -> None:
        """Check a step before its update.

        If this step or an earlier one is not finite, the gradients are set to zero in place. In
        fp16 they stay: there loss scaling skips an update with non-finite gradients.

        Args:
            step: the number of the step, 1 for the first.
            loss: loss of the whole step, a scalar.
            norm: norm of all gradients before they are clipped, a scalar. A norm that overflows
                clips every gradient to zero, so the gradients alone would look fine.
            gradients: the gradients that the update uses, of any shapes.
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
            local(gradient).masked_fill_((self.seen[0] > 0).to(gradient.device), 0)

    def skips(self) -> bool:
        """Return whether to skip the step that `look` checked; count a step that is skipped.

        Raises:
            NonFiniteError: more than `train.max_skipped_steps` steps were skipped.
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
        """Stop the run if a step was not finite; called before metrics or weights are saved.

        Raises:
            NonFiniteError: a step since the start had a non-finite loss or gradient.
        """
        if fault := self._fault():
            raise NonFiniteError(
                f"{fault}; the run stops, and nothing of that step or after it is kept. "
                f"{LIKELY_CAUSES}"
            )

    def _fault(self) -> str:
        """Return a text that says what was not finite, and at which step; empty: nothing yet."""
        if self.seen is None:
            return ""
        step, loss, norm = self.seen.tolist()  # device-to-host sync
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        return f"step {step:.0f}: the {what}" if step else ""


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Check that every trained weight is finite.

    Args:
        model: the model that is trained.
        step: the number of the last step; the error names it.

    Raises:
        NonFiniteError: a weight is not finite.
    """
    finite = [local(p).isfinite().all() for p in model.parameters() if p.requires_grad]
    if not torch.stack(finite).all():  # device-to-host sync
        raise NonFiniteError(
            f"step {step}: its update left weights that are not finite; the run stops, and nothing "
            f"of that step is kept. {LIKELY_CAUSES}"
        )
