"""Completion: what a shell offers for what has been typed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lab.config.completion import answer, flags_and_line
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("python launch.py opt", "program opt"),
        ("python launch.py ", "program "),
        (".venv/bin/python ../my-lab/launch.py optimizer=galore op", "program optimizer=galore op"),
        ("orpo-lab -m beta=0.1,0.2 be", "program -m be"),
        ("python launch.py optimizer.r=8 optimizer=galore be", "program optimizer=galore be"),
        ("python launch.py optimizer=lora,galore train.", "program train."),
        ("python launch.py 'model.path=a b' be", "program be"),
    ],
)
def test_only_what_decides_on_the_keys_is_composed(typed: str, asked: str) -> None:
    assert flags_and_line(typed) == ([], asked)


def test_a_folder_of_ones_own_is_read_once_it_exists(tmp_path: Path) -> None:
    for folder, flags in ((tmp_path, [f"--config-dir={tmp_path}"]), (tmp_path / "no", [])):
        typed = f"python launch.py --config-dir {folder} experiment="
        assert flags_and_line(typed) == (flags, "program experiment=")


def test_a_run_is_not_taken_for_a_query() -> None:
    assert answer(["beta=0.2"], {"COMP_LINE": "python launch.py x"}) == ["beta=0.2"]


BASH = """
eval "$(python launch.py -sc install=bash)"
ask() {
    COMP_LINE="$1" COMP_POINT=${#1}
    COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
}
ask "python launch.py --config-dir $OWN optimizer=mine optimizer.r=8 optimizer.r"
"""
FISH = """
python launch.py -sc install=fish | source
complete -C "python launch.py --config-dir $OWN optimizer=mine optimizer.r" | string join " "
"""
ZSH = """
autoload -Uz compinit bashcompinit; compinit -u -D; bashcompinit
eval "$(python launch.py -sc install=bash)"
COMP_LINE="python launch.py --config-dir $OWN optimizer=mine optimizer.r" \\
    python launch.py -sc query=zsh
"""


@pytest.mark.parametrize(
    ("shell", "script"),
    [
        ("bash", BASH),
        pytest.param("fish", FISH, marks=pytest.mark.slow),
        pytest.param("zsh", ZSH, marks=pytest.mark.slow),
    ],
    ids=["bash", "fish", "zsh"],
)
def test_a_shell_completes_the_keys_of_an_option_of_ones_own(
    shell: str, script: str, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "optimizer").mkdir()
    own = "# @package _global_\ndefaults: [galore, _self_]\n"
    (tmp_path / "optimizer" / "mine.yaml").write_text(own)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OWN": str(tmp_path)}
    done = subprocess.run(
        [shell, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    offered = "optimizer.rank= optimizer.refresh= optimizer.rotate_moments=\n"
    assert (done.stdout, done.stderr) == (offered, "")
