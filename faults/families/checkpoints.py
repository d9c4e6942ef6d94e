"""Checkpoints and run folders that are damaged: by a disk, a copy cut short, a hand.

A run with the checkpoints 2 and 4 was killed in step 6. With 4 damaged it must go on from 2, with
both damaged begin anew, and say what it rejects and why.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.bench import UNTRACKED, Bench, Injection
from faults.families.kills import RUNS
from faults.families.security import evil, unharmed_by_code
from faults.judge import Outcome, contents, refused, silent
from orpo_lab.training.files import hash_of

ALL_KEPT = "train.num_checkpoints=9"
Harm = Callable[[Path], object]


def settings(kind: str = "qlora") -> tuple[str, ...]:
    """Return the command line of the runs whose checkpoints are damaged."""
    return (*UNTRACKED, *RUNS[kind], ALL_KEPT)


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


HARMS: dict[str, Harm] = {
    "missing": Path.unlink,
    "cut to half": _halve,
    "empty": _empty,
    "of one other bit": _flip_a_bit,
}
FILES = (
    "state.pt",
    "adapter_model.safetensors",
    "adapter_config.json",
    "manifest.json",
)


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for file in FILES:
        for name, harm in HARMS.items():
            yield Injection(f"{file} {name}", _damaged(harm, file))
    for kind in ("galore", "adamw"):
        for file in ("state.pt", "model.safetensors"):
            name = f"{file} of one other bit, {kind}"
            yield Injection(name, _damaged(_flip_a_bit, file, kind))
    for name, harm in HARMS.items():
        yield Injection(f"reference.pt {name}", _damaged(harm, "reference.pt", "dpo with qlora"))
    yield Injection("a file too many", _damaged(Path.touch, "more.bin"))
    yield Injection("checkpoint 2 under the name of 4", _renamed)
    yield Injection("a checkpoint of another run", _of_another_run)
    yield Injection("a file in place of the checkpoint", _a_file_instead)
    yield Injection("every checkpoint damaged", _all_damaged)
    yield Injection("every checkpoint damaged, resume=FOLDER", _all_damaged_and_named)
    yield Injection("no checkpoint, resume=FOLDER", _none_and_named)
    yield Injection("a pickle that runs a command, sealed", _evil("state.pt"))

    last_line_torn: Harm = lambda run: os.truncate(  # noqa: E731
        run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 9
    )
    yield Injection("metrics.jsonl torn in its last line", _folder_damaged(last_line_torn, step=4))
    harm = _in_folder(Path.unlink, "metrics.jsonl")
    yield Injection("metrics.jsonl missing", _folder_damaged(harm, step=4))
    yield Injection("metrics.jsonl with another first line", _folder_damaged(_other_line, step=4))
    for name, damage in HARMS.items():
        if name == "of one other bit":
            continue  # what people read has no checksum
        harm = _in_folder(damage, "status.json")
        yield Injection(f"status.json {name}", _folder_damaged(harm, step=4))
        yield Injection(f"segments.json {name}", _folder_refused(damage, "segments.json"))
    not_yaml: Harm = lambda file: file.write_text("beta: [0.1")  # noqa: E731
    yield Injection("config.yaml that is not YAML", _folder_refused(not_yaml, "config.yaml"))
    harm = _in_folder(Path.unlink, "config.yaml")
    yield Injection("config.yaml missing", _folder_damaged(harm, step=4))
    harm = _in_folder(Path.unlink, "run.log")
    yield Injection("run.log missing", _folder_damaged(harm, step=4))


def _damaged(harm: Harm, file: str, kind: str = "qlora") -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        arguments = settings(kind)
        run = bench.killed_in_step_6(*arguments)
        harm(run / "checkpoints" / "checkpoint-4" / file)
        return _rejecting(bench, bench.resumed(*arguments, step=2), "checkpoint-4")

    return happen


def _rejecting(bench: Bench, outcome: Outcome, *names: str) -> Outcome:
    """Return the outcome, if what was rejected is named with the reason in the run's log."""
    log = bench.path("run/run.log").read_text()
    unsaid = [name for name in names if f"{name} rejected: " not in log]
    return silent(f"not said to be rejected: {unsaid}") if unsaid else outcome


def _renamed(bench: Bench) -> Outcome:
    checkpoints = bench.killed_in_step_6(*settings()) / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-2").rename(checkpoints / "checkpoint-4")
    return _rejecting(bench, bench.resumed(*settings(), step=None), "checkpoint-4")


def _of_another_run(bench: Bench) -> Outcome:
    run = bench.killed_in_step_6(*settings(), "beta=0.5")
    run.rename(bench.path("other"))
    run = bench.killed_in_step_6(*settings())
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.copytree(bench.path("other/checkpoints/checkpoint-4"), run / "checkpoints/checkpoint-4")
    return _rejecting(bench, bench.resumed(*settings(), step=2), "checkpoint-4")


def _a_file_instead(bench: Bench) -> Outcome:
    checkpoint = bench.killed_in_step_6(*settings()) / "checkpoints" / "checkpoint-4"
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")
    return bench.resumed(*settings(), step=2)


def _damage_all(bench: Bench) -> Path:
    run = bench.killed_in_step_6(*settings())
    for file in run.glob("checkpoints/*/state.pt"):
        _flip_a_bit(file)
    return run


def _all_damaged(bench: Bench) -> Outcome:
    _damage_all(bench)
    outcome = bench.resumed(*settings(), step=None)
    return _rejecting(bench, outcome, "checkpoint-2", "checkpoint-4")


def _all_damaged_and_named(bench: Bench) -> Outcome:
    run = _damage_all(bench)
    before = contents(run)
    done = bench.run(*settings(), "resume=run")
    return refused(done, run, "no valid checkpoint", untouched=before)


def _none_and_named(bench: Bench) -> Outcome:
    run = bench.killed_in_step_6(*settings())
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    done = bench.run(*settings(), "resume=run")
    return refused(done, run, "no valid checkpoint", untouched=before)


def _evil(name: str) -> Callable[[Bench], Outcome]:
    """Seal a checkpoint with a pickle that runs a command: the seal keeps no secret."""

    def happen(bench: Bench) -> Outcome:
        run = bench.killed_in_step_6(*settings())
        checkpoint = run / "checkpoints" / "checkpoint-4"
        (checkpoint / name).write_bytes(evil(bench.folder))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"][name] = hash_of(checkpoint / name)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        done = bench.run(*settings(), "resume=run")
        return unharmed_by_code(refused(done, run, "checkpoint"), bench)

    return happen


def _in_folder(harm: Harm, name: str) -> Harm:
    return lambda run: harm(run / name)


def _other_line(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 1,', '"step": 0,', 1))


def _folder_damaged(harm: Harm, step: int | None) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        harm(bench.killed_in_step_6(*settings()))
        return bench.resumed(*settings(), step=step)

    return happen


def _folder_refused(harm: Harm, name: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        run = bench.killed_in_step_6(*settings())
        harm(run / name)
        before = contents(run)
        done = bench.run(*settings(), "resume=auto", "hydra.run.dir=run")
        return refused(done, run, f"{name} is (damaged|missing)", untouched=before)

    return happen
