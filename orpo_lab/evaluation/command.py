"""Judge a finished run: `python -m orpo_lab evaluate RUN --tasks TASK...`.

A run of `evaluation=harness` judges itself; this command does the same for a run that has finished,
with the same code. The figures go where those of a run go: to `harness/after.json` and
`summary.json` of the run folder, beside the figures of other tasks. With `--before` the untrained
model is judged, too; without it, its figures on a task that was asked in another way are removed.
The run's tracker is not told.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from orpo_lab import environment, evaluation
from orpo_lab.config.evaluation import Harness
from orpo_lab.config.folder import values_of
from orpo_lab.errors import UserError
from orpo_lab.evaluation import reached
from orpo_lab.evaluation.reached import figures_of, keep, kept
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.upstream import import_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="tasks, groups or tags of lm-evaluation-harness (lm_eval ls tasks)",
    )
    parser.add_argument("--before", action="store_true", help="also judge the untrained model")
    parser.add_argument("--task-path", metavar="FOLDER", help="a folder with tasks of one's own")
    parser.add_argument(
        "--trust-task-code",
        action="store_true",
        help="load the tasks in FOLDER, which may run code with all your rights",
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples (default: as the task says)"
    )
    parser.add_argument(
        "--num-documents", type=int, metavar="N", help="documents of each task (default: all)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="ask in plain text, without the chat template"
    )
    usual = values_of("evaluation/harness")["batch_size"]
    parser.add_argument(
        "--batch-size",
        type=int,
        default=usual,
        metavar="N",
        help=f"sequences in memory at once (default: {usual})",
    )


def run(options: argparse.Namespace) -> None:
    """Judge the run's model, print the figures, and write them to the run folder.

    Raises:
        UserError: an argument is out of range, there is no finished run in the folder, a task
            cannot be loaded, or the harness failed on a task.
        OSError: the run folder cannot be written to.
    """
    try:
        asked = Harness(
            tasks=options.tasks,
            task_path=options.task_path,
            trust_task_code=options.trust_task_code,
            num_fewshot=options.num_fewshot,
            num_documents=options.num_documents,
            apply_chat_template=not options.plain,
            batch_size=options.batch_size,
            before=options.before,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    place = RunFolder(options.run)
    if not place.file("config.yaml").is_file() or not place.is_complete():
        raise UserError(
            f"{place.path} holds no run that has finished with all results; finish it with "
            "resume=, or give another folder"
        )
    with place.held() as is_free:
        if not is_free:
            raise UserError(f"another process is running in {place.path}")
        _judge(place, asked)


def _judge(place: RunFolder, asked: Harness) -> None:
    environment.settle()
    environment.use_one_device(None)
    import_libraries()
    from orpo_lab import memory
    from orpo_lab.evaluation.harness import judge_all
    from orpo_lab.finished import FinishedRun

    tasks = evaluation.load(asked)
    for when in ("before", "after") if asked.before else ("after",):
        with memory.given_back():
            finished = FinishedRun(place.path, is_trained=when == "after")
            network, which = finished.origin.load(finished.tokenizer, finished.dtype)
            found = judge_all(
                tasks,
                network,
                finished.tokenizer,
                finished.config,
                dtype=finished.dtype,
                which=which,
                when=when,
                say=print,
            )
            del network
        keep(place, when, kept(place, when) | found)
        summary = place.read_json("summary.json")
        summary[when] |= figures_of(found)
        place.write_json("summary.json", summary)
        print(f"{when} training: {place.file(reached.FILES[when])}")
    _remove_what_was_asked_otherwise(place, asked.tasks)


def _remove_what_was_asked_otherwise(place: RunFolder, names: Sequence[str]) -> None:
    """Remove the untrained model's figures on tasks that the trained one was asked in another way.

    Args:
        place: the run folder.
        names: the tasks that were judged just now.

    Beside the trained model's figures they would look like what training has changed.
    """
    before, after = kept(place, "before"), kept(place, "after")
    others = {
        name: one for name, one in before.items() if name in names and one.way != after[name].way
    }
    if not others:
        return
    left = {name: one for name, one in before.items() if name not in others}
    keep(place, "before", left)
    summary = place.read_json("summary.json")
    gone = figures_of(others).keys()
    figures = {name: value for name, value in summary["before"].items() if name not in gone}
    summary["before"] = figures | figures_of(left)
    place.write_json("summary.json", summary)
    for name in others:
        print(
            f"{name}: removed the figures of the untrained model, which was asked in another way "
            "(or it is not known how); --before judges it again"
        )
