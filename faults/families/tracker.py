"""W&B servers that fail: training goes on, and comes to what it comes to without a tracker.

The server is a loopback one that speaks W&B's protocol (tests/wandb_server.py); the client is
W&B's own.
"""

from collections.abc import Callable, Iterator
from typing import Any

from faults.bench import SMALL, UNTRACKED, Bench, Injection
from faults.inside import short_patience
from faults.judge import Outcome, survived
from faults.processes import Running
from tests.wandb_server import WandbServer

# The shape of a key, not one
KEY = "local" + "0" * 35


class Server(WandbServer):
    """Says nothing of clients that have given up on it."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that waits no longer, or has ended, is what is expected."""


Harm = Callable[[WandbServer], None]


def _errors(server: WandbServer) -> None:
    server.health = "errors"


def _waits(server: WandbServer) -> None:
    server.health = "waits"


def _dies(server: WandbServer) -> None:
    server.die()


HARM: dict[str, Harm] = {"answers 500": _errors, "keeps waiting": _waits, "is gone": _dies}


def faults(bench: Bench) -> Iterator[Injection]:
    """Return what can happen to a server, at a run's beginning and in its middle."""
    for name, harm in HARM.items():
        faults = {
            f"a server that {name}": _from_the_beginning(harm, "auto", fresh=False),
            f"a server that {name}, asked for": _from_the_beginning(harm, "online", fresh=True),
            f"a server that {name} from step 3 on": _in_the_middle(harm),
        }
        yield from (Injection(name, happen, waits=True) for name, happen in faults.items())
    yield Injection("a key that is refused", _with_key("not-a-key"), waits=True)
    yield Injection("no key", _with_key(None), waits=True)


def _environment(bench: Bench, url: str, key: str | None = KEY) -> dict[str, str | None]:
    """Let W&B see nothing of this machine's."""
    home = str(bench.folder)
    netrc = f"{home}/netrc"
    return {
        "HOME": home,
        "NETRC": netrc,
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": url,
        "WANDB_MODE": None,
    }


def _judge(bench: Bench, running: Running) -> Outcome:
    return survived(running.wait(), bench.path("run"), bench.reference(*UNTRACKED))


def _from_the_beginning(harm: Harm, mode: str, *, fresh: bool) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        server = Server()
        harm(server)
        return _judge(
            bench,
            bench.start(
                *SMALL,
                f"tracker.mode={mode}",
                "hydra.run.dir=run",
                fresh=fresh,
                environment=_environment(bench, server.url),
                prepare=None if fresh else short_patience,
            ),
        )

    return happen


def _in_the_middle(harm: Harm) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        server = Server()
        running = bench.start(
            *SMALL,
            "hydra.run.dir=run",
            environment=_environment(bench, server.url),
            prepare=short_patience,
        )
        running.wait_for(lambda: "step 3/6" in running.stdout)
        if not server.runs:
            raise RuntimeError("the run is not online")
        harm(server)
        return _judge(bench, running)

    return happen


def _with_key(key: str | None) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        server = Server()
        environment = _environment(bench, server.url, key)
        running = bench.start(*SMALL, "hydra.run.dir=run", environment=environment)
        return _judge(bench, running)

    return happen
