"""The list of planted faults: `lists/<area>.toml`, a file for each module or part of one.

    file = "orpo_lab/evaluate.py"           # what the faults are planted in
    tests = ["tests/test_evaluate.py"]      # what should go red: files, or file::test

    [[fault]]
    name = "scores of the training pairs"
    old = "data.held_out, desc"             # stands exactly once in the file
    new = "data.train, desc"
    tests = ["tests/test_evaluate.py::test_..."]  # of this one alone; so may be `file`

Nothing here imports torch.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).with_name("lists")


@dataclass(frozen=True)
class Mutant:
    """One mistake: a text of a file, what stands there instead, and the tests that should see."""

    area: str
    """The name of the list that it stands in."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.area}: {self.name}"

    def planted(self, text: str) -> str:
        """Return the file's text with the fault in it."""
        return text.replace(self.old, self.new)


def read(areas: Iterable[str]) -> list[Mutant]:
    """Return the faults of some lists."""
    return [fault for area in areas for fault in _read_list(LISTS / f"{area}.toml")]


def areas() -> list[str]:
    """Return the names of the lists."""
    return sorted(file.stem for file in LISTS.glob("*.toml"))


def _read_list(file: Path) -> list[Mutant]:
    listed = tomllib.loads(file.read_text(encoding="utf-8"))
    shared = {key: listed[key] for key in ("file", "tests") if key in listed}
    entries = [shared | entry for entry in listed["fault"]]
    return [Mutant(file.stem, **entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def find_flaws(fault: Mutant) -> list[str]:
    """Return why a fault cannot be planted as it is listed; nothing where it can."""
    file = ROOT / fault.file
    if not file.is_file():
        return [f"there is no file {fault.file}"]
    text = file.read_text(encoding="utf-8")
    flaws = [f"there is no test {test}" for test in fault.tests if not _exists(test)]
    if not fault.tests:
        flaws.append("it names no test")
    if (count := text.count(fault.old)) != 1:
        flaws.append(f"its old text stands {count} times in {fault.file}, not once")
    if fault.old == fault.new:
        flaws.append("it changes nothing")
    try:
        compile(fault.planted(text), fault.file, "exec")
    except SyntaxError as error:
        flaws.append(f"{fault.file} is no Python any more: {error}")
    return flaws


def _exists(test: str) -> bool:
    file, *names = test.split("::")
    if not (ROOT / file).is_file():
        return False
    text = (ROOT / file).read_text(encoding="utf-8")
    plain = [name.partition("[")[0] for name in names]
    return all(re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) for name in plain)
