"""Patches of libraries: each is listed, and looked at again when its library moves."""

import re
from pathlib import Path

import pytest

from orpo_lab import upstream
from orpo_lab.upstream import PATCHES, Patch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.function)
def test_a_patch_is_of_the_version_that_is_pinned(patch: Patch) -> None:
    pinned = re.findall(rf"^{patch.package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned == [patch.version], f"is {patch.function} needed still? {patch.until}"
    assert getattr(upstream, patch.function).__doc__
