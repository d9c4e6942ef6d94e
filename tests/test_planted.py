"""The planted faults can all be planted, and what comes of one is told right."""

import time
from collections import Counter
from pathlib import Path

import pytest

from faults.planted import catalogue
from faults.planted.catalogue import Mutant
from faults.planted.trial import Trial


@pytest.mark.parametrize("area", catalogue.areas())
def test_every_fault_can_still_be_planted(area: str) -> None:
    faults = catalogue.read([area])
    assert faults
    assert [f"{mutant}: {flaw}" for mutant in faults for flaw in catalogue.find_flaws(mutant)] == []


def test_no_fault_is_listed_twice() -> None:
    faults = catalogue.read(catalogue.areas())
    assert max(Counter(map(str, faults)).values()) == 1
    assert max(Counter((mutant.file, mutant.old, mutant.new) for mutant in faults).values()) == 1


def fault(old: str, new: str, tests: str, file: str = "orpo_lab/errors.py") -> Mutant:
    return Mutant("test", "a fault", file, old, new, (tests,))


def test_a_fault_that_cannot_be_planted_is_told() -> None:
    text = "return redact("
    assert catalogue.find_flaws(fault(text, "return (", "tests/test_redaction.py")) == []
    for wrong, said in (
        (fault("no such text", "", "tests/test_redaction.py"), "stands 0 times"),
        (fault("e", "", "tests/test_redaction.py"), "times in orpo_lab/errors.py"),
        (fault(text, text, "tests/test_redaction.py"), "changes nothing"),
        (fault(text, "return redact((", "tests/test_redaction.py"), "no Python any more"),
        (fault(text, "", "tests/test_none.py"), "there is no test tests/test_none.py"),
        (fault(text, "", "tests/test_redaction.py::test_none"), "there is no test"),
        (fault(text, "", "tests/test_redaction.py", "orpo_lab/none.py"), "there is no file"),
    ):
        assert said in "; ".join(catalogue.find_flaws(wrong))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_comes_of_a_fault_is_told_right(tmp_path: Path) -> None:
    file, tests, right = "orpo_lab/beta_schedule.py", ("tests/test_beta_schedule.py",), "steps - 1)"
    broken_import = "from orpo_lab.config import Nothing\n\n\ndef progress("
    cases = [
        (right, "steps)", 0.0, "unclear", "time is up"),
        (right, "steps)", 60.0, "caught", "tests/test_beta_schedule.py::test_"),
        ("at 0-based optimizer step", "at optimizer step", 60.0, "survived", ""),
        (right, "stepps - 1)", 60.0, "unclear", "NameError"),
        ("def progress(", broken_import, 60.0, "unclear", "cannot be collected"),
    ]
    trials = []
    for number, (old, new, seconds, *_) in enumerate(cases):
        fault = Mutant("", "", file, old, new, tests)
        trials.append(Trial(tmp_path / str(number), tests, fault, seconds))
        # Tests without time are killed here: while the next tree is copied they could end
        trials[-1].has_ended()
    while not all(trial.has_ended() for trial in trials):
        time.sleep(0.05)
    for trial, (*_, verdict, detail) in zip(trials, cases, strict=True):
        outcome = trial.outcome()
        assert (outcome.verdict, detail in outcome.detail) == (verdict, True), outcome
