"""Keys of `evaluation`: what a model is judged by beside the held-out pairs.

All keys are free: they change no weight, and a run may be resumed with others.
"""

from dataclasses import dataclass

from orpo_lab.config.checks import at_least, check
from orpo_lab.config.policy import free


@dataclass(kw_only=True)
class Evaluation:
    """Base class: what a model is judged by beside the held-out pairs."""


@dataclass(kw_only=True)
class NoEvaluation(Evaluation):
    """The held-out pairs only."""


@dataclass(kw_only=True)
class Harness(Evaluation):
    """Tasks of lm-evaluation-harness."""

    tasks: list[str] = free()
    task_path: str | None = free()
    trust_task_code: bool = free()
    num_fewshot: int | None = free()
    num_documents: int | None = free()
    apply_chat_template: bool = free()
    batch_size: int = free()
    before: bool = free()

    def __post_init__(self) -> None:
        check(bool(self.tasks), "evaluation.tasks is empty; name a task, or use evaluation=none")
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        check(not twice, f"evaluation.tasks names {', '.join(twice)} twice; name each task once")
        at_least(0, evaluation__num_fewshot=self.num_fewshot)
        at_least(
            1,
            evaluation__num_documents=self.num_documents,
            evaluation__batch_size=self.batch_size,
        )
        check(
            self.task_path is None or self.trust_task_code,
            f"evaluation.task_path={self.task_path}: a task file may run code, with all your "
            "rights; read what is there, then say evaluation.trust_task_code=true",
        )
