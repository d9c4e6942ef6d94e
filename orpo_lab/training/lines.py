"""Write a run's lines of metrics to its file, to the tracker, and to the terminal."""

import logging
import math

from orpo_lab import progress
from orpo_lab.metrics import TRAINING
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.tracker.base import Run

log = logging.getLogger(__name__)

SAID = [metric.name for metric in TRAINING if metric.is_said]
# A few metrics with short names: 80 columns have room for them and a bar, even in a long run
IN_BAR = {metric.name: metric.bar for metric in TRAINING if metric.bar}


class Lines:
    """Writes every line of metrics, and shows the progress of the run.

    Args:
        place: the run folder; its `metrics.jsonl` gets every line.
        log_to: the tracked run, which gets the same lines.
        step: number of steps that have been taken.
        num_steps: number of steps of the whole run.
        untrained: figures of the untrained model. A run that begins with its first step writes
            them as the line of step 0, in front of its first line: no line stands in the folder of
            a run that has come to no step.
    """

    def __init__(
        self,
        place: RunFolder,
        log_to: Run,
        step: int,
        num_steps: int,
        *,
        untrained: dict[str, float] | None = None,
    ) -> None:
        self.place, self.log_to, self.num_steps = place, log_to, num_steps
        self.untrained = untrained if step == 0 else None
        self.work = progress.Work("train", num_steps, done=step)
        self.work.begin()

    def move(self) -> None:
        """Show that a step was taken."""
        self.work.done += 1

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the finite metrics of a step, and show some of them on the terminal."""
        if self.untrained:
            untrained, self.untrained = self.untrained, None
            self.write(0, untrained)
        metrics = _finite(step, metrics)
        self.place.append_metrics(step, metrics)
        self.log_to.log(step, metrics)
        shown = {key: f"{metrics[key]:.3f}" for key in SAID if key in metrics}
        if not shown:
            return
        in_bar = {name: f"{metrics[key]:.2f}" for key, name in IN_BAR.items() if key in shown}
        self.work.note = ", ".join(f"{name}={value}" for name, value in in_bar.items())
        if not progress.on_terminal():
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            at = f"{progress.title()}step {step}/{self.num_steps}"
            log.info("%s  %s  %s", at, text, self.work.times())
            self.work.say_later()

    def close(self) -> None:
        """Show no progress any more."""
        self.work.end()


def _finite(step: int, metrics: dict[str, float]) -> dict[str, float]:
    """Return the finite metrics, and log which other metrics are left out.

    Neither JSON nor a curve can hold the others. For example, the gradient norm is infinite in a
    step that fp16's loss scaling skips.
    """
    others = {key: value for key, value in metrics.items() if not math.isfinite(value)}
    if others:
        said = ", ".join(f"{key} is {value}" for key, value in others.items())
        log.warning("step %d: %s, left out of this step's metrics", step, said)
    return {key: value for key, value in metrics.items() if key not in others}
