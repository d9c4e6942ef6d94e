"""The fault suite, a few faults of each family, and whether it can fail."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from faults import __main__ as suite
from faults import events, inside, processes
from faults.bench import UNTRACKED, Bench, Injection, References
from faults.judge import Ending, Outcome, refused, survived

pytestmark = pytest.mark.slow

# Three of each family; together they take every way of making a fault happen
SAMPLE = {
    "changes": ["resume=FOLDER beta=0.5", "another row in the training file"],
    "checkpoints": [
        "state.pt of one other bit",
        "reference.pt of one other bit",
        "manifest.json missing",
        "every checkpoint damaged",
    ],
    "configuration": ["betta=0.2", "optimizer=galore quantization=nf4"],
    "data": ["chosen equals rejected", "a line cut short"],
    "disk": ["full as the optimizer of checkpoint 4 is written", "a file larger than may be"],
    "environment": ["ACCELERATE_MIXED_PRECISION=bf16", "WORLD_SIZE=two"],
    "folders": [
        "a run in a folder with final/thesis.tex",
        "over a finished run: more steps, accepted",
        "no plot: it fails",
    ],
    "kills": [
        "qlora: torn open checkpoints/checkpoint-4/state.pt",
        "galore: before os.rename checkpoints/checkpoint-4/manifest.json.part",
        "adamw: in step 4",
        "lora: after step 3, from outside",
        "dpo with qlora: before os.rename checkpoints/checkpoint-4/manifest.json.part",
        "sft with galore: in step 4",
    ],
    "numbers": ["learning rate 1e30, adamw", "a step that is skipped, galore"],
    "processes": ["a sweep under torchrun"],
    "security": ["a model folder with code of its own", "+model._target_=os.system"],
    "signals": ["SIGTERM in step 3", "SIGINT, SIGINT in step 3", "train.max_hours used up"],
    "sweep": ["SIGKILL in the second of three jobs, forked", "a job that diverges"],
    "templates": ["a system message that moves", "a generation prompt behind every answer"],
    "tracker": ["a server that is gone from step 3 on"],
    "weights": ["no output head", "stored in 8 bits", "an output head of its own"],
}


def test_the_sample_is_of_every_family() -> None:
    assert sorted(SAMPLE) == suite.FAMILIES


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with processes.server():
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A place for runs that are forked from the server."""
    return Bench(tmp_path / "bench", References(tmp_path / "references"))


@pytest.mark.parametrize("family", SAMPLE)
def test_no_fault_of_a_sample_ends_silently(bench: Bench, tmp_path: Path, family: str) -> None:
    if family == "disk" and os.geteuid():
        pytest.skip("a disk of its own takes root to mount")
    found = suite.collect([family], bench)
    chosen = [entry for entry in found if entry[1].name in SAMPLE[family]]
    assert len(chosen) == len(SAMPLE[family])
    counts = suite.run(chosen, tmp_path / "scratch", jobs=2)
    assert counts[family].total() == len(chosen)
    assert counts[family][Ending.SILENT] == 0


def _raise() -> None:
    raise ZeroDivisionError("a defect")


def _hang() -> None:
    time.sleep(60)


RUN = "hydra.run.dir=run"


def _other_weights(bench: Bench) -> Outcome:
    done = bench.run(*UNTRACKED, "beta=0.11", RUN)
    return survived(done, bench.path("run"), bench.reference(*UNTRACKED))


def _lost_work(bench: Bench) -> Outcome:
    run = bench.killed_in_step_6(*UNTRACKED)
    shutil.rmtree(run / "checkpoints")
    return bench.resumed(*UNTRACKED, step=4)


def _traceback(bench: Bench) -> Outcome:
    done = bench.run(*UNTRACKED, RUN, prepare=partial(inside.at_call, *LOADING, _raise))
    return refused(done, bench.path("run"), "a defect")


def _hung(bench: Bench) -> Outcome:
    prepare = partial(inside.at_call, *LOADING, _hang)
    done = bench.start(*UNTRACKED, RUN, prepare=prepare).wait(patience=4)
    return refused(done, bench.path("run"), "")


def _other_reason(bench: Bench) -> Outcome:
    return refused(bench.run("betta=0.2"), bench.path("run"), "beta=-1")


def _never_killed(bench: Bench) -> Outcome:
    nowhere = events.Point(events.Event("open", "no-such-file", 1))
    watch = events.Watch(bench.path("run"), bench.path("events"), nowhere)
    bench.run(*UNTRACKED, RUN, prepare=watch)
    return survived(bench.run(*UNTRACKED, RUN), bench.path("run"), bench.path("run"))


def _broken_suite(bench: Bench) -> Outcome:
    raise KeyError("a defect of the suite")


LOADING = ("orpo_lab.model.weights", "load_model", 1)
# What a defect of the lab would look like, and what the suite has to say of it
DEFECTS: list[tuple[Callable[[Bench], Outcome], str]] = [
    (_other_weights, "not as the unharmed run: weights, metrics.jsonl, held-out figures"),
    (_lost_work, "it goes on from step None instead of 4"),
    (_traceback, "stderr is not one line of the lab's"),
    (_hung, "exit code none, it hung"),
    (_other_reason, "it says something else than /beta=-1/"),
    (_never_killed, "exit code 1"),
    (_broken_suite, "KeyError: 'a defect of the suite'"),
]


@pytest.mark.parametrize(("happen", "seen"), DEFECTS)
def test_what_ends_silently_is_told_and_fails_the_suite(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    happen: Callable[[Bench], Outcome],
    seen: str,
) -> None:
    fault = Injection("a defect", happen)
    monkeypatch.setattr(suite, "collect", lambda *_: [("kills", fault)])
    monkeypatch.setattr(processes, "server", contextlib.nullcontext)
    monkeypatch.setattr(sys, "argv", ["faults"])
    with pytest.raises(SystemExit) as end:
        suite.main()
    assert end.value.code == 1
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert json.loads(last) == {"tried": 1, "survived": 0, "refused": 0, "silent": 1}
    assert "silent    kills: a defect" in lines[0]
    assert seen in lines[1], lines[1]
