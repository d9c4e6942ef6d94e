"""How often does a judge prefer one run's answers? `python -m orpo_lab winrate RUN_A RUN_B`.

    python -m orpo_lab winrate RUN_A RUN_B --url URL --model JUDGE    A's answers against B's
    python -m orpo_lab winrate RUN --before                           after training against before

The answers are the greedy ones of `samples.json`, to the prompts that both have. Verdicts are kept
in `RUN_A/judge/` as they come, so the same command goes on where it was stopped. With `--before`
the figures go into `summary.json` of the run, which reports read.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from orpo_lab.compare.read import Run, read_run
from orpo_lab.config.folder import values_of
from orpo_lab.config.judge import EndpointJudge
from orpo_lab.errors import UserError
from orpo_lab.judge import answers
from orpo_lab.judge.at_end import AFTER, BEFORE, FOLDER
from orpo_lab.judge.verdicts import Pair, compare, open_judge
from orpo_lab.judge.win_rate import figures
from orpo_lab.metrics import JUDGED_PREFIX
from orpo_lab.records.run_folder import RunFolder

# The type and meaning of each option about the judge; a key of the group `judge` each
OPTIONS: dict[str, tuple[type, str]] = {
    "url": (str, "base URL of an OpenAI-compatible endpoint (or OPENAI_BASE_URL)"),
    "model": (str, "the judge, as the endpoint calls it"),
    "key_variable": (str, "environment variable that holds the endpoint's key"),
    "num_prompts": (int, "judge the first so many prompts only"),
    "max_new_tokens": (int, "largest number of tokens of a reply; more for a judge that reasons"),
    "concurrency": (int, "requests at a time"),
    "rate": (float, "requests a minute"),
    "timeout": (float, "seconds of silence after which a request is tried again"),
    "retries": (int, "more tries of a request that fails"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument("run", type=Path, metavar="RUN_A", help="a finished run")
    parser.add_argument("other", nargs="?", type=Path, metavar="RUN_B", help="another finished run")
    parser.add_argument(
        "--before",
        action="store_true",
        help="compare with RUN_A's own answers before training, in place of RUN_B",
    )
    parser.add_argument(
        "--out", type=Path, help="where verdicts and figures go (default: RUN_A/judge)"
    )
    usual = "; default: as RUN_A was judged, or conf/judge/endpoint.yaml"
    for key, (kind, about) in OPTIONS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, help=about + usual)


def run(options: argparse.Namespace) -> None:
    """Ask the judge, print what it says, and write the figures.

    Raises:
        UserError: an argument is wrong, a run has no answers, the runs share no prompt, or the
            judge cannot be asked.
        OSError: a folder cannot be written to.
    """
    if (options.other is None) != options.before:
        raise UserError(
            "give a second run, or --before to compare with the answers before training"
        )
    a = _finished(options.run)
    settings = _settings(options, a)
    folder = options.out or options.run / FOLDER
    if options.before:
        pairs, names = answers.after_and_before(a.samples), (AFTER, BEFORE)
    else:
        pairs, names = _common(a, _finished(options.other)), (str(options.run), str(options.other))
    judge = open_judge(settings, "--url")
    found, tally = compare(judge, pairs[: settings.num_prompts], folder, settings.max_new_tokens)
    print("\n".join(found.sentences(*names, judge.name)))
    for reason, num in tally.failed.most_common(3):
        print(f"{num} questions have no reply; the same command asks them again: {reason}")
    said = figures(found, judge.name)
    if options.before:
        _add_to_summary(options.run, said)
        return
    place, name = RunFolder(folder), f"against-{options.other.resolve().name}.json"
    place.write_json(name, {"a": names[0], "b": names[1], **said})
    print(f"figures  {place.file(name)}")


def _settings(options: argparse.Namespace, run: Run) -> EndpointJudge:
    """Return the judge: as given, else as the run was judged, else as `conf/judge/` says.

    Raises:
        UserError: no model is given, or a value is out of range.
    """
    usual = values_of("judge/endpoint")
    values: dict[str, Any] = {}
    for field in fields(EndpointJudge):
        given = getattr(options, field.name)
        own = run.values.get(f"judge.{field.name}", usual[field.name])
        values[field.name] = own if given is None else given
    if values["model"] == "???":
        raise UserError(f"--model is missing, and {run.folder} was judged by none: name a judge")
    try:
        return EndpointJudge(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _finished(folder: Path) -> Run:
    """Return a finished run with answers.

    Raises:
        UserError: the folder holds no such run.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: no config.yaml in it")
    found = read_run(folder)
    if found.state != "finished":
        raise UserError(f"{folder} has not finished ({found.state}); go on with it by resume=auto")
    if not found.samples:
        raise UserError(
            f"{folder} has no answers in samples.json; train with dataset.num_generations above 0"
        )
    return found


def _common(a: Run, b: Run) -> list[Pair]:
    """Return the answers of both runs to the prompts that both have, and say how many these are.

    Raises:
        UserError: the runs share no prompt.
    """
    pairs = answers.after_in_both(a.samples, b.samples)
    nums = [answers.num_prompts(run.samples) for run in (a, b)]
    if not pairs:
        raise UserError(
            f"{a.folder} and {b.folder} have answered no prompt in common; compare runs on the "
            "same held-out pairs"
        )
    if nums != [len(pairs)] * 2:
        print(f"{len(pairs)} prompts in common, of {nums[0]} and {nums[1]}")
    limits = [run.values.get("dataset.max_new_tokens") for run in (a, b)]
    if limits[0] != limits[1]:
        print(
            f"warning: answers may be cut at other lengths: dataset.max_new_tokens={limits[0]} and "
            f"{limits[1]}"
        )
    return pairs


def _add_to_summary(folder: Path, said: dict[str, Any]) -> None:
    """Replace a judge's figures in the summary of a run.

    Raises:
        UserError: another process works in the run folder, or the run has no summary.
    """
    place = RunFolder(folder)
    with place.held() as is_held:
        summary = place.read_json("summary.json")
        if not is_held or summary is None:
            raise UserError(
                f"the figures are not in {place.file('summary.json')}: it is missing, or another "
                "process works there; the same command asks nothing again"
            )
        others = {key: value for key, value in summary.items() if not key.startswith(JUDGED_PREFIX)}
        place.write_json("summary.json", others | said)
    print(f"figures  {place.file('summary.json')}")
