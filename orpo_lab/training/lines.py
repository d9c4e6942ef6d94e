"""Write a run's lines of metrics to its file, to the tracker, and to the terminal."""

import logging
import math
from typing import Any

from tqdm import tqdm

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
    """

    def __init__(self, place: RunFolder, log_to: Run, step: int, num_steps: int) -> None:
        self.place, self.log_to, self.num_steps = place, log_to, num_steps
        # With disable=None the bar is hidden where there is no terminal
        self.bar: Any = tqdm(
            total=num_steps,
            initial=step,
            desc="train",
            disable=None,
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
        )

    def move(self) -> None:
        """Show that a step was taken."""
        self.bar.update(1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the finite metrics of a step, and show some of them on the terminal."""
        metrics = _finite(step, metrics)
        self.place.append_metrics(step, metrics)
        self.log_to.log(step, metrics)
        shown = {key: f"{metrics[key]:.3f}" for key in SAID if key in metrics}
        if not shown:
            return
        in_bar = {name: f"{metrics[key]:.2f}" for key, name in IN_BAR.items() if key in shown}
        self.bar.set_postfix(in_bar)
        if self.bar.disable:
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            log.info("step %d/%d  %s", step, self.num_steps, text)

    def close(self) -> None:
        """Close the progress bar; its last state stays on the terminal."""
        self.bar.close()


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
