"""Judge the model in memory by tasks of lm-evaluation-harness, and leave the model as it was.

The harness's own code makes the prompts, scores the answers and computes the figures. Its packages
are imported only inside the functions.
"""

import contextlib
import difflib
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from orpo_lab import memory, program, progress, upstream
from orpo_lab.config import Config
from orpo_lab.config.evaluation import Harness
from orpo_lab.config.identity import hash_of
from orpo_lab.errors import UserError, one_line
from orpo_lab.evaluation.reached import AllReached, Reached
from orpo_lab.metrics import (
    HARNESS,
    NUM_DOCUMENTS,
    STDERR,
    Better,
    harness_figures,
    harness_name,
    harness_said,
)
from orpo_lab.model.causal import CausalModel, without_adapters
from orpo_lab.training.state import RandomState

log = logging.getLogger(__name__)

# The seeds of the harness's own command line, so that both come to the same figures
PYTHON_SEED, OTHER_SEED = 0, 1234
# Where this variable is set, the harness draws its bootstrap samples in this process
ALONE = "DISABLE_MULTIPROC"


class Tasks:
    """Tasks of the harness, with their documents.

    Args:
        asked: which tasks, and how they are asked.

    Raises:
        UserError: the harness is not installed, or a task is unknown or cannot be loaded here.
    """

    def __init__(self, asked: Harness) -> None:
        self.asked = asked
        upstream.quiet_harness()
        manager = _manager(asked)
        self.loaded = {name: _load(manager, name) for name in asked.tasks}
        for name, loaded in self.loaded.items():
            for task in loaded["tasks"].values():
                _check(name, task)
                _set_fewshot(task, asked.num_fewshot)

    def key(self, name: str, which: str) -> str:
        """Return a hash of all that a model's figures on a task depend on.

        Args:
            name: one of the names in `evaluation.tasks`.
            which: says which model is judged; the same text stands for the same model.
        """
        return _hash({"model": which, **self._parts(name)})

    def asked_as(self, name: str) -> str:
        """Return a hash of how a task is asked: of all in `key` but the model.

        Two models' figures may be compared where it is the same.
        """
        return _hash(self._parts(name))

    def _parts(self, name: str) -> dict[str, Any]:
        tasks = self.loaded[name]["tasks"].values()
        return {
            "version": version("lm_eval"),
            "template": self.asked.apply_chat_template,
            "tasks": [task.dump_config() for task in tasks],
            "documents": [list(islice(task.eval_docs, self.asked.num_documents)) for task in tasks],
        }

    def judge(
        self,
        name: str,
        model: CausalModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        template_kwargs: Mapping[str, Any],
        which: str,
    ) -> Reached:
        """Return what a model reaches on one of the tasks.

        Args:
            name: one of the names in `evaluation.tasks`.
            model: on its device, with adapters if it has any; is left as it was.
            tokenizer: with a pad token; is left as it was.
            dtype: precision of the arithmetic, as in training.
            template_kwargs: `dataset.template_kwargs`.
            which: see `key`.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        start, asked = time.perf_counter(), self.asked
        with _left_as_it_was(model, tokenizer):
            judged = HFLM(
                pretrained=without_adapters(model),
                tokenizer=tokenizer,
                batch_size=asked.batch_size,
                mixed_precision_dtype=None if dtype == torch.float32 else dtype,
                # In bf16 a sum of log-probabilities would be known to three digits
                softmax_dtype="float32",
                chat_template_args=dict(template_kwargs),
            )
            for task in self.loaded[name]["tasks"].values():
                task.set_fewshot_seed(OTHER_SEED)
            found: Any = evaluate(
                judged,
                self.loaded[name],
                limit=asked.num_documents,
                apply_chat_template=asked.apply_chat_template,
                fewshot_as_multiturn=asked.apply_chat_template,
            )
        figures, better = _figures(found)
        return Reached(
            key=self.key(name, which),
            figures=figures,
            better=better,
            documents=[row for task, rows in found["samples"].items() for row in _rows(task, rows)],
            seconds=time.perf_counter() - start,
            asked=self.asked_as(name),
        )


def judge_all(
    tasks: Tasks | None,
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    dtype: torch.dtype,
    which: str,
    when: str,
    kept: AllReached = MappingProxyType({}),
    say: Callable[[str], None] = log.info,
) -> dict[str, Reached]:
    """Return what a model reaches on each task, by the task's name, and say it.

    Args:
        tasks: the tasks; None: there are none.
        model: on its device, with adapters if it has any; is left as it was.
        tokenizer: with a pad token; is left as it was.
        config: the run's configuration.
        dtype: precision of the arithmetic, as in training.
        which: see `Tasks.key`.
        when: before or after, for people.
        kept: what was reached earlier. What has the same key is not computed again.
        say: shows a line to the user.

    Raises:
        UserError: memory ran out, or the harness failed on a task.
    """
    found: dict[str, Reached] = {}
    if tasks is None:
        return found
    for name in tasks.loaded:
        if name in kept and kept[name].key == tasks.key(name, which):
            found[name] = kept[name]
            if kept[name].asked is None:  # an earlier version of orpo_lab has written it
                found[name] = replace(kept[name], asked=tasks.asked_as(name))
            continue
        try:
            with progress.Work(f"{when}: {name}", has_bar=True):
                found[name] = tasks.judge(
                    name,
                    model,
                    tokenizer,
                    dtype=dtype,
                    template_kwargs=config.dataset.template_kwargs,
                    which=which,
                )
        # The harness and a task's own code may raise anything
        except Exception as error:
            lower = f"lower evaluation.batch_size={tasks.asked.batch_size}, or "
            raise UserError(
                f"evaluation.tasks: {name} failed {when} training "
                f"({one_line(_said(error))[:200]}); {lower if memory.ran_out(error) else ''}leave "
                "the task out"
            ) from error
        number = f"task {len(found)} of {len(tasks.loaded)}"
        said = f"{found[name].seconds:.0f} s: {_said_of(found[name])}"
        say(f"harness, {when} training, {number}, {said}")
    return found


def _hash(parts: dict[str, Any]) -> str:
    # A function without a source is written with its address, another one in every process
    return hash_of(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(parts, default=str)))


def _said_of(one: Reached) -> str:
    return ", ".join(
        f"{name.removeprefix(HARNESS)} {one.figures[name]:.3f} ({harness_said(name, one.figures)})"
        for name in harness_figures(one.figures)
    )


def _manager(asked: Harness) -> Any:
    """Return the harness's index of tasks: of its own tasks only where one is asked for.

    Raises:
        UserError: a name is in no index, or there is no folder `evaluation.task_path`.
    """
    from lm_eval.tasks import TaskManager

    folder = None
    if asked.task_path is not None:
        folder = Path(asked.task_path).expanduser()
        if not folder.is_dir():
            raise UserError(f"evaluation.task_path={asked.task_path}: there is no such folder")
        log.warning("THE TASKS IN %s MAY RUN CODE OF THEIR OWN", folder)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if manager.task_index.keys() >= set(asked.tasks):
            return manager
    # The harness reads ten thousand files for this index: eight seconds
    manager = TaskManager(include_path=folder and str(folder))
    for name in asked.tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "see lm_eval ls tasks"
            raise UserError(f"evaluation.tasks: the harness has no task {name}; {hint}")
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Return a task, group or tag with its documents, as the harness's `evaluate` takes it.

    Raises:
        UserError: its documents, a package or one of its parts cannot be found here.
    """
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluation.tasks: {name} needs {error.name}, which is not installed: "
            f"{program.install('harness')}, or what the task itself asks for"
        ) from error
    # A task's files are the user's or the harness's, and may raise anything
    except Exception as error:
        raise UserError(
            f"evaluation.tasks: {name} cannot be loaded ({one_line(_said(error))[:200]}); without "
            "a network its documents must be on this machine: load it once with a network, or "
            "leave it out"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check(name: str, task: Any) -> None:
    """Refuse a task that the harness would refuse after training.

    Raises:
        UserError: the task runs code that the model writes, shows pictures, or has no documents.
    """
    why = ""
    if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
        why = "runs code that the model writes"
    elif getattr(task, "MULTIMODAL", False):
        why = "asks about pictures or sounds"
    elif not len(task.eval_docs):
        why = "has no documents"
    if why:
        raise UserError(f"evaluation.tasks: {name} {why}; leave it out")


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of solved examples as the harness's command does: a task's own 0 stays."""
    own = task.get_config("num_fewshot")
    if own is None:
        task.set_config("num_fewshot", num_fewshot or 0)
    elif own != 0 and num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)


@contextlib.contextmanager
def _left_as_it_was(model: Any, tokenizer: Any) -> Iterator[None]:
    """Inside this context, seed all random numbers; afterwards, put back what the harness changes.

    These are the random states, the mode of every module, and the side of padding. Inside, the
    harness starts no processes: a fork of a process with a GPU and threads may hang.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = RandomState.now(), random.getstate(), np.random.get_state()
    side, alone = tokenizer.padding_side, os.environ.get(ALONE)
    os.environ[ALONE] = "1"
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    try:
        yield
    finally:
        of_torch, of_python, of_numpy = states
        of_torch.restore()
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        tokenizer.padding_side = side
        if alone is None:
            del os.environ[ALONE]
        for module, was_training in modes:
            module.training = was_training


def _figures(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, Better]]:
    """Return the finite figures of the harness's results under our names, and their directions."""
    figures: dict[str, float] = {}
    better: dict[str, Better] = {}
    for task, results in found["results"].items():
        figures[harness_name(task, NUM_DOCUMENTS)] = results["sample_len"]
        higher = found["higher_is_better"].get(task, {})
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            # A standard error that does not exist is the text N/A
            if not kind or not isinstance(value, int | float):
                continue
            of_error = metric.endswith(STDERR)
            metric = metric.removesuffix(STDERR)
            name = harness_name(task, metric, kind) + (STDERR if of_error else "")
            if not math.isfinite(value):
                log.warning("%s is %s, and is left out", name, value)
                continue
            figures[name] = float(value)
            if higher.get(metric) is not None and not of_error:
                better[name] = "higher" if higher[metric] else "lower"
    return figures, better


def _rows(task: str, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for every document; see `Reached.documents`."""
    for sample in samples:
        values = {metric: sample[metric] for metric in sample["metrics"]}
        yield {
            "task": task,
            "filter": sample["filter"],
            "document": sample["doc_id"],
            "hash": sample["doc_hash"],
            "prompt": str(sample["arguments"][0][0]),
            "target": str(sample["target"]),
            "answers": json.loads(json.dumps(sample["filtered_resps"], default=str)),
            # Some metrics, such as a corpus's F1, need more of a document than a number
            "scores": {
                metric: float(value)
                for metric, value in values.items()
                if isinstance(value, int | float) and math.isfinite(value)
            },
        }
