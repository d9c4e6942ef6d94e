"""What is done inside the process of a run, to make something happen at a place of its code.

Each function is given to `processes.start` as `prepare`, its arguments bound by `partial`.
"""

import importlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

Act = Callable[[], None]


def send(*numbers: int) -> None:
    """Send this process signals."""
    for number in numbers:
        os.kill(os.getpid(), number)


def die() -> None:
    """End this process as the kernel does where memory runs out."""
    send(signal.SIGKILL)


def at_call(module: str, name: str, number: int, act: Act) -> None:
    """Act when a function of a module is called the `number`-th time, before it does anything."""
    home = importlib.import_module(module)
    function, calls = getattr(home, name), 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*arguments, **named)

    setattr(home, name, called)


def in_step(step: int, act: Act) -> None:
    """Act in an optimizer step, between its forward and its backward pass."""

    def acted(loss: Any) -> Any:
        act()
        return loss

    _change_loss(lambda now: now == step, acted)


def poison_step(what: str, *steps: int) -> None:
    """Make the loss of steps NaN, or the gradient that it sends back."""

    def poisoned(loss: Any) -> Any:
        if what == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    _change_loss(lambda now: now in steps, poisoned)


def _change_loss(applies: Callable[[int], bool], change: Callable[[Any], Any]) -> None:
    from orpo_lab import engine
    from orpo_lab.training import loop

    build, add_gradients = engine.build, loop.add_gradients
    steps: list[int] = []

    def changed(*arguments: Any, **parts: Any) -> Any:
        built: Any = build(*arguments, **parts)
        score = built.score

        def changed_score(*arguments: Any) -> Any:
            scored = score(*arguments)
            is_training = scored.loss.requires_grad and applies(steps[-1] + 1)
            return replace(scored, loss=change(scored.loss)) if is_training else scored

        built.score = changed_score
        return built

    def watched(built: Any, state: Any, *rest: Any) -> Any:
        steps.append(state.step)
        return add_gradients(built, state, *rest)

    engine.build = changed
    setattr(loop, "add_gradients", watched)  # noqa: B010  (of another type)


def exit_where(seed: int) -> None:
    """Have the job with a seed call sys.exit(0) instead of training."""
    from orpo_lab import run

    train: Any = run._train

    def exits(config: Any, *rest: Any) -> Any:
        if config.seed == seed:
            sys.exit(0)
        return train(config, *rest)

    setattr(run, "_train", exits)  # noqa: B010  (of another type)


def short_patience() -> None:
    """Give up on a W&B server after seconds at the run's end."""
    from orpo_lab.tracker import wandb

    wandb.FINISH_SECONDS = 4.0


def die_once_tracked() -> None:
    """End this process as `die` does, after its trackers' threads have taken all lines."""
    from orpo_lab.tracker.background import Background

    targets = [getattr(thread, "_target", None) for thread in threading.enumerate()]
    owners = [getattr(target, "__self__", None) for target in targets]
    runs = [owner for owner in owners if isinstance(owner, Background)]
    while not all(run._calls.empty() and run._sink and not run._lines for run in runs):
        time.sleep(0.1)
    die()


def note_connections(file: str) -> None:
    """Write a line for every connection and every look-up of a name; let no library see pytest.

    Some libraries send their telemetry only where they see no test.
    """
    for name in ("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "CI"):
        os.environ.pop(name, None)

    def note(event: str, arguments: Any) -> None:
        is_local = event == "socket.connect" and isinstance(arguments[1], str)
        if event in ("socket.connect", "socket.getaddrinfo") and not is_local:
            with open(file, "a") as lines:
                lines.write(f"{event} {arguments}\n")

    sys.addaudithook(note)


def limit_file_size(num_bytes: int) -> None:
    """Let no file grow beyond a size: a write then fails, as where a quota is used up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
