"""What the tests share: configurations, the real tiny model, the command line, the assets."""

import os

# Before any import of transformers, datasets or wandb: no test may reach a network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# Runs in processes of their own: threads that wait for each other cost more than they save
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import gc
import pickle
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from faults import processes
from orpo_lab import config
from orpo_lab.config.command_line import as_typed
from orpo_lab.config.optimizer import Lora
from orpo_lab.upstream import silence
from tests import endpoint_server

ROOT = Path(__file__).parents[1]
GROUPS = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
# Launchers whose jobs are processes of this machine, two at a time where it has two cores
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    "ray": ["hydra/launcher=ray"],
}
GIVEN_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
silence()


def each_launcher(*, long: Container[str]) -> pytest.MarkDecorator:
    """Run a slow test with every launcher; with those named in `long` it is a long test."""
    params = [
        pytest.param(options, id=name, marks=[pytest.mark.long] if name in long else [])
        for name, options in LAUNCHERS.items()
    ]
    return pytest.mark.parametrize("launcher", params)


def compose_config(*overrides: str) -> DictConfig:
    """Compose our own part of a job's configuration."""
    return ours(compose_job(*overrides))


def compose_job(*overrides: str) -> DictConfig:
    """Compose as launch.py does, Hydra's own part included.

    The same options of groups are composed once; Hydra, too, applies all other overrides to what
    the options came to.
    """
    typed = as_typed(overrides)
    groups = GROUPS | config.SCHEMAS.keys()
    options = [override for override in typed if override.lstrip("+").partition("=")[0] in groups]
    composed: DictConfig = pickle.loads(_composed(*options))
    others = OverridesParser.create().parse_overrides([o for o in typed if o not in options])
    ConfigLoaderImpl._apply_overrides_to_config(others, composed)
    for parsed in others:
        given = composed.hydra.overrides
        (given.hydra if parsed.is_hydra_override() else given.task).append(parsed.input_line)
    return composed


@functools.cache
def _composed(*options: str) -> bytes:
    return pickle.dumps(compose_anew(*options))


def compose_anew(*typed: str) -> DictConfig:
    """Compose by Hydra alone."""
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*typed], return_hydra_config=True)


def ours(composed: DictConfig) -> DictConfig:
    """Take Hydra's own part out of a configuration."""
    with open_dict(composed):
        del composed["hydra"]
    return composed


def break_import_of_wandb(folder: Path) -> None:
    """Make a folder for Python's path in which W&B is a module that cannot be imported."""
    folder.mkdir()
    (folder / "wandb.py").write_text("raise RuntimeError('wandb was imported')\n")


@pytest.fixture
def load() -> Callable[..., config.Config]:
    """Compose and check overrides, as launch.py does before a run."""
    return lambda *overrides: config.load(compose_config(*overrides))


@pytest.fixture(scope="session", autouse=True)
def _lasting() -> None:
    """Have garbage collections pass over what is imported: nothing of it is ever let go.

    Every run asks for a collection at its end, and TRL's trainer as it is made; with two million
    objects to look at, a collection takes longer than the few steps that a test trains for.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _server() -> Iterator[None]:
    """What is to be forked has imported torch once: three seconds a run instead of nine."""
    with processes.server():
        yield


@pytest.fixture
def launch(tmp_path: Path, _server: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command line in a process of its own; runs land in the test's folder.

    Options are those of `processes.start`. `fresh` starts a new interpreter, for what only shows
    there: imports, and what they print.
    """

    def run(
        *arguments: str,
        expect: int = 0,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        said = tmp_path.parent / f"{tmp_path.name}-said"
        done = processes.start(
            said, [*arguments], at=tmp_path, environment={**(env or {})}, **options
        ).wait()
        assert done.code == expect, done.stdout + done.stderr
        return subprocess.CompletedProcess(arguments, expect, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and pairs; where there is none, the test is skipped."""
    folder = os.environ.get("ORPO_LAB_ASSETS")
    if not folder:
        pytest.skip("ORPO_LAB_ASSETS names no folder of real models and pairs")
    return Path(folder).resolve()


@pytest.fixture
def server() -> Iterator[endpoint_server.Endpoint]:
    """A loopback endpoint, at whose end no request is on its way."""
    from orpo_lab.curate.endpoint import THREADS

    with endpoint_server.serving() as server:
        yield server
    # A step that ends early breaks off requests on their way. A connection that is being opened at
    # that moment is left to the end of the process, which in a test is not near
    end = time.monotonic() + 5
    while any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        assert time.monotonic() < end, "requests go on"
        time.sleep(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded model's tokenizer."""
    from orpo_lab.model.source import load_config
    from orpo_lab.model.tokenizer import load_tokenizer

    tiny = config.load(compose_config()).model
    return load_tokenizer(tiny, load_config(tiny))


@pytest.fixture
def build_model(tokenizer: Any) -> Callable[..., Any]:
    """Build the model of a configuration, with its adapter, as `run.train` does."""
    from transformers import set_seed

    from orpo_lab.model.adapter import attach
    from orpo_lab.model.precision import resolve_device, resolve_dtype
    from orpo_lab.model.weights import load_model

    def build(loaded: config.Config) -> Any:
        set_seed(loaded.seed)
        dtype = resolve_dtype(loaded.model.dtype, resolve_device())
        network = load_model(loaded, tokenizer, dtype)
        if isinstance(loaded.optimizer, Lora):
            return attach(network, loaded.optimizer)
        return network

    return build


@pytest.fixture
def flash_kernel() -> Iterator[None]:
    """Have flash attention's kernels on the CPU."""
    from tests import flash_kernel

    with flash_kernel.on_cpu():
        yield


@pytest.fixture(autouse=True)
def _given_gpus() -> None:
    """Begin with the GPUs that the tests were given: a run in this process leaves itself one."""
    if GIVEN_GPUS is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = GIVEN_GPUS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, whatever the machine: sums come in the same order, and no thread spins."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
