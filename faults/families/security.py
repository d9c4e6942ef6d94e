"""What comes from elsewhere and wants to run code here."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.bench import UNTRACKED, Bench, Injection
from faults.families.numbers import base_model
from faults.judge import Outcome, refused, silent

# The file that foreign code would leave
MARK = "code-was-run"
LOCAL = (*UNTRACKED, "model=local", "model.path=./base", "hydra.run.dir=run")


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, folder: Path) -> None:
        self._mark = folder / MARK

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def evil(folder: Path) -> bytes:
    """Return a pickle that runs a command, in the protocol that torch writes."""
    return pickle.dumps(Evil(folder), protocol=2)


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    yield Injection("a model folder with code of its own", _refuses(_own_code, "code of its own"))
    yield Injection(
        "pickled weights that run a command", _refuses(_pickled_weights, "model.path=./base")
    )
    yield Injection("a chat template that reaches for Python", _refuses(_evil_template, "template"))
    for override in (
        "+model._target_=os.system",
        "+optimizer._target_=builtins.exec",
        "+_target_=os.abort",
        "+dataset.columns._target_=os.system",
    ):
        yield Injection(override, _refuses(lambda bench: None, "unknown key", override))


def unharmed_by_code(outcome: Outcome, bench: Bench) -> Outcome:
    """Return the outcome, unless foreign code was run."""
    return silent("foreign code was run") if bench.path(MARK).exists() else outcome


def _refuses(
    set_trap: Callable[[Bench], None], says: str, *overrides: str
) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        base_model(bench.path("base"))
        set_trap(bench)
        done = bench.run(*LOCAL, *overrides)
        return unharmed_by_code(refused(done, bench.path("run"), says), bench)

    return happen


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _own_code(bench: Bench) -> None:
    code = f"open({str(bench.path(MARK))!r}, 'w').close()\nclass Own: pass\nclass OwnConfig: pass\n"
    bench.path("base/own.py").write_text(code)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    _change(bench.path("base/config.json"), model_type="own", auto_map=names)


def _pickled_weights(bench: Bench) -> None:
    bench.path("base/model.safetensors").unlink()
    bench.path("base/pytorch_model.bin").write_bytes(evil(bench.folder))


def _evil_template(bench: Bench) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    bench.path("base/chat_template.jinja").write_text(template)
