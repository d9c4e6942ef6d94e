"""The commands beside running: one program, one way to say errors."""

import importlib

import pytest

from orpo_lab.__main__ import COMMANDS, main


def test_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        main(arguments)
        said = capsys.readouterr().out
        assert all(f"  {name}" in said and about in said for name, (_, about) in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: python -m orpo_lab {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compaer", "x"], "error: compaer is no command; there are: compare, dial, preview"),
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


def test_a_disk_that_fails_and_ctrl_c_are_no_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module(COMMANDS["compare"][0])
    for raised, code in ((OSError(28, "No space left"), "error: "), (KeyboardInterrupt(), 130)):

        def fail(options: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr(command, "run", fail)
        with pytest.raises(SystemExit) as end:
            main(["compare", "x"])
        assert str(end.value.code).startswith(str(code))
