"""Judge a model beside the held-out pairs: the config group `evaluation`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from orpo_lab import program
from orpo_lab.config.evaluation import Evaluation, Harness, NoEvaluation
from orpo_lab.errors import UserError

if TYPE_CHECKING:
    from orpo_lab.evaluation.harness import Tasks


def load(evaluation: Evaluation) -> "Tasks | None":
    """Return the tasks to judge by, with their documents; None: there are none.

    Raises:
        UserError: the harness is not installed, or a task is unknown or cannot be loaded here.
    """
    match evaluation:
        case NoEvaluation():
            return None
        case Harness():
            if find_spec("lm_eval") is None:
                raise UserError(
                    "evaluation=harness needs lm_eval, which is not installed: "
                    f"{program.install('harness')}"
                )
            from orpo_lab.evaluation.harness import Tasks  # imports torch

            return Tasks(evaluation)
    raise TypeError(f"no evaluation: {evaluation!r}")
