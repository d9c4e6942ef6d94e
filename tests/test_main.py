"""The commands of the lab: one program, one way to say errors."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lab import __version__, launch
from orpo_lab.__main__ import COMMANDS, RUNNING, main
from orpo_lab.curate.command import STEPS
from orpo_lab.curate.folder import PROMPTS, Prompt, append


def test_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        main(arguments)
        said = capsys.readouterr().out
        every = {**RUNNING, **COMMANDS}.items()
        assert all(f"  {name}" in said and about in said for name, (_, about) in every)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"orpo-lab {__version__}\n"


@pytest.fixture
def by_hydra(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every call of Hydra, which is not called, each with the line to complete."""
    calls: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["orpo-lab"])
    line = "COMP_LINE"
    monkeypatch.setenv(line, "")
    monkeypatch.setattr(launch, "main", lambda: calls.append([os.environ[line], *sys.argv[1:]]))
    return calls


def test_what_trains_hands_its_arguments_to_hydra(by_hydra: list[list[str]]) -> None:
    main(["train", "beta=0.2", "--cfg", "job"])
    main(["sweep", "beta=0.1,0.2"])
    main(["train", "--help"])
    assert by_hydra == [
        ["", "beta=0.2", "--cfg", "job"],
        ["", "--multirun", "beta=0.1,0.2"],
        ["", "--help"],
    ]


@pytest.mark.parametrize(
    ("line", "said", "asked"),
    [
        ("orpo-lab ", [*RUNNING, *COMMANDS], None),
        ("orpo-lab c", ["compare", "curate"], None),
        ("orpo-lab compare ", [], None),
        ("orpo-lab train ", [], "orpo-lab "),
        ("orpo-lab sweep beta=0.1,0.2 opt", [], "orpo-lab beta=0.1,0.2 opt"),
    ],
)
def test_a_shell_completes_commands_and_hydra_their_options(
    line: str,
    said: list[str],
    asked: str | None,
    by_hydra: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    main(["-sc", "query=bash"])
    assert capsys.readouterr().out.split() == said
    assert by_hydra == ([] if asked is None else [[asked, "-sc", "query=bash"]])


def test_the_script_for_a_shell_is_hydras(by_hydra: list[list[str]]) -> None:
    main(["-sc", "install=bash"])
    assert by_hydra == [["", "-sc", "install=bash"]]


def test_help_of_a_command_with_steps_lists_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["curate"], ["curate", "--help"]):
        main(arguments)
        said = capsys.readouterr().out
        assert said.startswith("usage: python -m orpo_lab curate STEP ...")
        assert all(f"  {name}" in said and about in said for name, (_, about) in STEPS.items())


@pytest.mark.parametrize(
    "command",
    [*([name] for name in COMMANDS if name != "curate"), *(["curate", step] for step in STEPS)],
    ids=" ".join,
)
def test_a_command_says_what_it_takes(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert f"usage: python -m orpo_lab {' '.join(command)}" in capsys.readouterr().out


def test_a_package_that_a_step_lacks_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Prompt("p", [{"role": "user", "content": "why?"}], "x", 0)
    append(tmp_path / PROMPTS, [row])
    monkeypatch.delitem(sys.modules, "orpo_lab.curate.endpoint", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit) as end:
        main(["curate", "candidates", str(tmp_path), "--model", "m", "--endpoint", "http://x/v1"])
    assert str(end.value) == 'error: openai is not installed: pip install -e ".[curate]"'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["compaer", "x"],
            "error: compaer is no command; there are: train, sweep, compare, curate",
        ),
        (["curate", "promts", "x"], "error: promts is no command; there are: prompts, candidates"),
        (["compare", "nowhere"], "error: nowhere is not a run folder"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)  # Python prints a text that a program exits with, and its code is 1
    assert str(end.value.code).startswith(said)
    assert "\n" not in str(end.value.code)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "error: the following arguments are required: FOLDER; see python -m"),
        (["compare", "x", "--ouch"], "error: unrecognized arguments: --ouch; see python -m"),
    ],
)
def test_a_bad_command_line_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_what_reads_the_output_may_go_away() -> None:
    line = f"{sys.executable} -m orpo_lab --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_disk_that_fails_and_ctrl_c_are_no_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module("orpo_lab.compare.command")
    for raised, code in ((OSError(28, "No space left"), "error: "), (KeyboardInterrupt(), 130)):

        def fail(options: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr(command, "run", fail)
        with pytest.raises(SystemExit) as end:
            main(["compare", "x"])
        assert str(end.value.code).startswith(str(code))
