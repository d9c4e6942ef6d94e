"""Patches of libraries: each is listed, and looked at again when its library moves."""

import re
import subprocess
import sys
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


def in_new_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_libraries_are_imported_without_the_compiler_and_without_a_search_for_garbage() -> None:
    in_new_process("""
import gc, sys
from orpo_lab.upstream import import_libraries
import_libraries()
assert "torch._inductor.compile_fx" not in sys.modules
assert gc.get_freeze_count() > 100_000
assert gc.isenabled()
""")


def test_a_process_that_has_models_already_goes_on_to_look_for_garbage() -> None:
    in_new_process("""
import gc, torch
from orpo_lab.upstream import import_libraries
import_libraries()
assert gc.get_freeze_count() == 0
""")


def test_a_function_of_bitsandbytes_is_compiled_once_when_it_is_called() -> None:
    in_new_process("""
import torch
compiled = []
def compiler(function, **settings):
    compiled.append(function.__name__)
    return function
torch.compile = compiler
from orpo_lab.upstream import import_bitsandbytes, silence
silence()
import_bitsandbytes()
assert torch.compile is compiler and not compiled
from bitsandbytes.backends.default import ops
absmax, code = torch.ones(1), torch.linspace(-1, 1, 256)
for _ in range(2):
    got = ops._dequantize_blockwise_compute(
        torch.arange(256, dtype=torch.uint8), absmax, code, 256, torch.float32
    )
    assert torch.equal(got, code)
assert compiled == ["_dequantize_blockwise_compute"], compiled
""")
