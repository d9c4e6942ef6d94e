"""Several processes where there should be one."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Outcome, refused, silent, survived
from faults.processes import LAUNCH, PATIENCE, Done


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    yield Injection("a sweep under torchrun", _torchrun)
    yield Injection("WORLD_SIZE=2 left in the environment", _world_size)
    yield Injection("a second run in the folder of one that runs", _second_run("beta=0.5"))
    yield Injection("resume=auto in the folder of one that runs", _second_run("resume=auto"))


def _torchrun(bench: Bench) -> Outcome:
    logs = bench.path("logs")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--redirects=3"]
    command += [f"--log-dir={logs}", LAUNCH, *UNTRACKED, "-m", "hydra.sweep.dir=run"]
    done = subprocess.run(command, cwd=bench.folder, capture_output=True, timeout=PATIENCE)
    if not done.returncode:
        return silent("exit code 0")
    said = [file.read_text() for file in logs.glob("*/attempt_0/*/stderr.log")]
    # torchrun ends the other ranks as soon as one has failed, which may be before they say anything
    own = [text for text in said if text not in ("", "stopped by SIGTERM\n")]
    if not own:
        return silent(f"no rank has said why: {said}")
    return refused(Done(1, "", own[0]), bench.path("run"), "start it with .*not with torchrun")


def _world_size(bench: Bench) -> Outcome:
    done = bench.run(*UNTRACKED, "hydra.run.dir=run", environment={"WORLD_SIZE": "2"})
    return refused(done, bench.path("run"), "WORLD_SIZE=2 asks for several.*unset WORLD_SIZE")


def _second_run(*more: str) -> Callable[[Bench], Outcome]:
    return lambda bench: _beside(bench, *more)


def _beside(bench: Bench, *more: str) -> Outcome:
    first = bench.start(*UNTRACKED, "hydra.run.dir=run")
    first.wait_for(lambda: "step 2/6" in first.stdout)
    second = bench.run(*UNTRACKED, *more, "hydra.run.dir=run")
    outcome = survived(first.wait(), bench.path("run"), bench.reference(*UNTRACKED))
    if second.code != 1 or second.stderr != "error: another process is running in run\n":
        return silent(f"the second was not refused: {second.code} {second.stderr[-300:]}")
    return outcome
