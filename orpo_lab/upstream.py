"""Every patch of a library: for which version, why, and what would show that it can go.

`PATCHES` lists them. A test holds the versions against those that are pinned, so that each is
looked at again when its library moves. Nothing here imports more than a patch's own library.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    # A kernel that takes codes, their blocks' constants, block size, type, shape and precision
    Dequantize = Callable[[Tensor, Tensor, int, str, tuple[int, ...], torch.dtype], Tensor]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """One patch, and when it can go; why it is there stands in the function's docstring."""

    function: str
    package: str
    version: str
    """The newest version that is known to need the patch."""
    until: str
    """What would show that the patch is not needed any more."""


PATCHES: list[Patch] = []


def patch(package: str, version: str, *, until: str) -> Callable[[F], F]:
    """Put a function into the list of patches."""

    def listed(function: F) -> F:
        PATCHES.append(Patch(function.__name__, package, version, until))
        return function

    return listed


# What upstream says in a normal run that tells our users nothing: start of the message -> reason.
# Everything else stays audible.
WARNINGS = {
    "`gradient_checkpointing` is deprecated": "TRL reads the setting under its old name",
    "`is_gradient_checkpointing` is deprecated": "peft asks for it under its old name",
}


@patch("trl", "1.16.0", until="a run with every option prints none of it without this")
def silence() -> None:
    """Keep upstream's words from our users; called before the heavy imports, where some speak."""
    # trl.experimental says at import that its API may change: engine/trl.py is the only module
    # that uses it, and trl is pinned to a minor version
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    # tokenizers warns when a process forks after it has used threads, as dataset.num_proc does
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # An optional kernel for 4-bit inference on CPUs is not installed; training does not use it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Five retries of an unreachable hub; our error says it in one line
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # matplotlib says once that it has listed the machine's fonts
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        _hide_bars()


def _hide_bars() -> None:
    """Progress bars are for terminals: in a file they are thousands of characters a line."""
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
@patch("trl", "1.16.0", until="importing TRL's kernels or trainer imports no W&B without this")
def hidden(package: str) -> Iterator[None]:
    """Make a package look absent to what is imported meanwhile.

    TRL imports W&B wherever W&B is installed, which takes seconds and reads its settings.
    """
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]  # find_spec then finds nothing
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


@contextmanager
@patch("matplotlib", "3.11.2", until="importing it survives an MPLBACKEND that is not installed")
def matplotlib_as_shipped() -> Iterator[None]:
    """Have matplotlib as it ships: no MPLBACKEND and no matplotlibrc has a say in our pictures.

    A notebook names a backend in the environment that need not be installed here, and matplotlib
    then fails as it is imported.
    """
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@patch("hydra-core", "1.3.8", until="Hydra takes a loader of configurations as a parameter")
def compose_through(loader: type[Any]) -> None:
    """Let Hydra compose through a loader of ours: what it calls by name is checked before."""
    from hydra._internal import hydra as internals

    setattr(internals, "ConfigLoaderImpl", loader)  # noqa: B010  (not its type)


@patch("hydra-core", "1.3.8", until="a sweep leaves out what cannot be, and saves no secret")
def sweep_through(name: str, *, saves: Any, checks: Callable[[Any, list[list[str]]], None]) -> None:
    """Let Hydra's sweeper save and check through us.

    Args:
        name: the sweeper's class, by its full name.
        saves: stands where the sweeper has `OmegaConf`: the overrides that it saves may hold
            secrets.
        checks: gets the sweeper and a batch of overrides, and may shorten the batch. Hydra's own
            check ends the sweep at the first combination that cannot be composed.
    """
    from hydra.core.plugins import Plugins

    # Hydra imports its plugins once more: the module of that name is not the one it uses
    sweeper: Any = Plugins.instance().class_name_to_class[name]
    sweeper.sweep.__globals__["OmegaConf"] = saves
    sweeper.validate_batch_is_legal = checks


@patch("transformers", "5.23.0", until="apply_chat_template takes a clock among its arguments")
def fix_clock(template: str, today: date) -> None:
    """Let a chat template's clock stand at one day, whenever the run goes on.

    transformers gives templates the clock as a global of its own and takes no other (callables
    among the arguments become text). The compiled template, which it keeps, takes one.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if "strftime_now" in template:
        noon = datetime.combine(today, time(12))
        _compile_jinja_template(template).globals["strftime_now"] = noon.strftime


@patch("bitsandbytes", "0.50.2", until="tests/test_quantization.py passes without it on AVX-512")
def switch_off_repacking(layer: "nn.Module") -> None:
    """Keep a 4-bit layer from repacking its weights on a CPU that has avx512_bf16.

    `Linear4bit.forward` does so in evaluation mode, and the next backward pass misreads them: the
    loss looks right and the gradients are noise. The attribute is the switch that its own code
    asks.
    """
    setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  (not in its type)


def dequantize_by_block(kernel: "Dequantize") -> "Dequantize":
    """Return `kernel`, given its weights as rows of one block each where rows cut blocks.

    With AVX-512 the CPU kernel of bitsandbytes looks for the constants of a row's blocks at
    `row * (width // block size)`. Blocks run on from row to row, so that is another block's
    constant where the width is no multiple of the block size (csrc/cpu_ops.cpp,
    `dequantizeBlockwise4bitCpu`). Which numbers share a block does not depend on the shape: a
    shape whose rows are blocks gives the right constants, and the same bits.
    """

    def dequantize(
        codes: "Tensor",
        constants: "Tensor",
        block_size: int,
        kind: str,
        shape: tuple[int, ...],
        dtype: "torch.dtype",
    ) -> "Tensor":
        size = prod(shape)
        if shape[-1] % block_size == 0:
            rows = tuple(shape)
        else:  # a block that is not full has no row: then all is one row
            rows = (1, size) if size % block_size else (size // block_size, block_size)
        return kernel(codes, constants, block_size, kind, rows, dtype).view(*shape)

    return dequantize


@cache
@patch("bitsandbytes", "0.50.2", until="tests/test_quantization.py passes without it on AVX-512")
def mend_4bit_kernel() -> Any:
    """Put `dequantize_by_block` in the place of bitsandbytes' own kernel for CPUs, once a process.

    Returns:
        The library of operators, which holds the kernel there for as long as the library lives.
    """
    import bitsandbytes  # noqa: F401  (its kernels are registered by the import)
    import torch

    name = "bitsandbytes::dequantize_4bit"
    theirs = torch.library.get_kernel(name, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def kernel(*arguments: Any) -> "Tensor":
        return theirs.call_boxed(keys, *arguments)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # torch says that a kernel is overridden; that is what this is for
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, dequantize_by_block(kernel), "CPU")
    return library
