"""Every patch of a library: for which version, why, and what would show that it can be removed.

`PATCHES` lists the patches. A test compares their versions with the pinned ones, so that a patch is
reviewed when its library is updated. A patch imports only its own library, or what that library
imports; what it puts in place may ask a room of the lab once it is called.
"""

import gc
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cache, partial, wraps
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    # A kernel that takes codes, the constants of their blocks, block size, type, shape, precision
    Dequantize = Callable[[Tensor, Tensor, int, str, tuple[int, ...], torch.dtype], Tensor]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """One patch, and when it can be removed; the function's docstring says why it is needed."""

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


# Warnings of libraries in a normal run that do not help our users: start of the message -> reason.
# All other warnings are shown.
WARNINGS = {
    "`gradient_checkpointing` is deprecated": "TRL reads the setting under its old name",
    "`is_gradient_checkpointing` is deprecated": "peft asks for it under its old name",
}


@patch("trl", "1.16.0", until="a run with every option prints none of it without this")
def silence() -> None:
    """Hide messages of libraries that do not help our users.

    Called before the heavy imports, since some messages appear during an import.
    """
    # trl.experimental says at import that its API may change: engine/trl.py is the only module
    # that uses it, and trl is pinned to a minor version
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    # tokenizers warns when a process forks after it has used threads, as dataset.num_proc does
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # An optional kernel for 4-bit inference on CPUs is not installed; training does not use it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # The hub's client logs five retries of an unreachable hub; our own error says this in one line
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # matplotlib logs once that it has listed the fonts of the machine
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)
    title_bars()


@patch("tqdm", "4.70.1", until="libraries let their users name and hide each of their bars")
def title_bars() -> None:
    """Show the progress bars of libraries as our own: with the title, and only where they fit.

    Outside a terminal they would be lines of thousands of characters. On a terminal that several
    processes write to, each would write over the others' bars.
    """
    from tqdm.std import tqdm

    own = tqdm.__init__
    if hasattr(own, "__wrapped__"):  # by an earlier call
        return
    signature = inspect.signature(own)

    @wraps(own)
    def begin(*arguments: Any, **settings: Any) -> None:
        from orpo_lab import progress

        given = signature.bind(*arguments, **settings)
        desc, is_hidden = given.arguments.get("desc"), given.arguments.get("disable")
        given.arguments["desc"] = f"{progress.title()}{desc or ''}"
        given.arguments["disable"] = is_hidden or not progress.on_terminal()
        own(*given.args, **given.kwargs)

    setattr(tqdm, "__init__", begin)  # noqa: B010  (not its type)


@contextmanager
@patch("trl", "1.16.0", until="importing TRL's kernels or trainer imports no W&B without this")
def hidden(package: str) -> Iterator[None]:
    """Inside this context, let imports find that a package is not installed.

    TRL imports W&B wherever W&B is installed. That takes seconds, and reads W&B's settings.
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
    """Inside this context, use matplotlib's default settings: no MPLBACKEND, no matplotlibrc.

    A notebook names a backend in its environment. If this backend is not installed here, the import
    of matplotlib fails.
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
    """Let Hydra compose through our loader, which checks what Hydra would call by name."""
    from hydra._internal import hydra as internals

    setattr(internals, "ConfigLoaderImpl", loader)  # noqa: B010  (not its type)


@patch("hydra-core", "1.3.8", until="Hydra instantiates a registered sweeper of another package")
def plug_in(name: str) -> None:
    """Make a plugin of ours known to Hydra, which takes plugins of two packages alone.

    Args:
        name: the full name of the plugin's class.
    """
    from hydra.core.plugins import Plugins

    plugins = Plugins.instance()
    # Imported only now: Hydra has executed the modules of its own plugins a second time, and a
    # subclass of a class of the first time does not work
    module, _, own = name.rpartition(".")
    plugins.register(getattr(importlib.import_module(module), own))
    takes = Plugins.is_in_toplevel_plugins_module
    setattr(  # noqa: B010  (a static method)
        Plugins,
        "is_in_toplevel_plugins_module",
        staticmethod(lambda named: named == name or takes(named)),
    )


@patch("hydra-core", "1.3.8", until="a sweep leaves out what cannot be, and saves no secret")
def sweep_through(name: str, *, saves: Any, checks: Callable[[Any, list[list[str]]], None]) -> None:
    """Let Hydra's sweeper save and check through our functions.

    Args:
        name: the full name of the sweeper's class.
        saves: replaces the sweeper's `OmegaConf`, since the overrides that the sweeper saves may
            hold secrets.
        checks: called with the sweeper and a batch of overrides; may shorten the batch. Hydra's own
            check would end the sweep at the first combination that cannot be composed.
    """
    from hydra.core.plugins import Plugins

    # Hydra imports its plugins a second time: it does not use the module in sys.modules
    sweeper: Any = Plugins.instance().class_name_to_class[name]
    sweeper.sweep.__globals__["OmegaConf"] = saves
    sweeper.validate_batch_is_legal = checks


@patch("transformers", "5.23.0", until="apply_chat_template takes a clock among its arguments")
def fix_clock(template: str, today: date) -> None:
    """Make a chat template see one fixed day, also when the run goes on another day.

    transformers gives templates its own clock as a global, and accepts no other clock as an
    argument (callables among the arguments become text). So the clock is set in the compiled
    template, which transformers keeps.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if "strftime_now" in template:
        noon = datetime.combine(today, time(12))
        _compile_jinja_template(template).globals["strftime_now"] = noon.strftime


@contextmanager
@patch("peft", "0.21.2", until="save_pretrained takes a function that writes a file of tensors")
@patch("transformers", "5.23.0", until="save_pretrained takes such a function")
def tensors_written_by(save_file: Callable[..., None]) -> Iterator[None]:
    """Inside this context, let `save_pretrained` write tensors by `save_file`.

    Both libraries call safetensors' function of that name. That function first copies all tensors
    from the GPU to the host, and nobody sees the bytes before they are in the file. A version of a
    library that knows the function by another name still writes by safetensors.
    """
    from peft import peft_model
    from transformers import modeling_utils

    name = "safe_save_file"
    modules: list[Any] = [peft_model, modeling_utils]
    before = {module: getattr(module, name) for module in modules if hasattr(module, name)}
    for module in before:
        setattr(module, name, save_file)
    try:
        yield
    finally:
        for module, theirs in before.items():
            setattr(module, name, theirs)


@patch("bitsandbytes", "0.50.2", until="tests/test_quantization.py passes without it on AVX-512")
def switch_off_repacking(layer: "nn.Module") -> None:
    """Keep a 4-bit layer from repacking its weights on a CPU that has avx512_bf16.

    `Linear4bit.forward` repacks the weights in evaluation mode, and the next backward pass misreads
    them. The loss then looks right, but the gradients are noise. The layer's own code reads the
    attribute that is set here.
    """
    setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  (not in its type)


def dequantize_by_block(kernel: "Dequantize") -> "Dequantize":
    """Return a version of `kernel` that is also right where a block continues in the next row.

    With AVX-512 the CPU kernel of bitsandbytes looks for the constants of a row's blocks at
    `row * (width // block size)`. But blocks continue from row to row. If the width is not a
    multiple of the block size, this is the constant of another block (csrc/cpu_ops.cpp,
    `dequantizeBlockwise4bitCpu`). Which numbers share a block does not depend on the shape. So the
    kernel gets a shape in which every row is one block. This gives the right constants, and the
    same bits.
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
        else:  # if the last block is not full, all numbers form one row
            rows = (1, size) if size % block_size else (size // block_size, block_size)
        return kernel(codes, constants, block_size, kind, rows, dtype).view(*shape)

    return dequantize


def import_libraries() -> None:
    """Import the libraries that a model needs: silently, and in less time than imports take.

    Called before the first of these imports. What an import makes stays until the process ends. But
    Python looks through all of it for garbage again and again, and once more when the process ends,
    and finds none. Here Python is told to leave it alone. A process that has imported torch itself
    may have models that become garbage later: there Python goes on to look through everything.
    """
    silence()
    if is_first := "torch" not in sys.modules:
        gc.disable()
    try:
        import_bitsandbytes()
        for library in ("datasets", "peft", "transformers.modeling_utils"):
            importlib.import_module(library)
    finally:
        if is_first:
            gc.freeze()
            gc.enable()


@patch("bitsandbytes", "0.50.2", until="its import imports no torch._inductor without this")
def import_bitsandbytes() -> None:
    """Import bitsandbytes, and let its functions be compiled when they are called first.

    bitsandbytes compiles some functions when it is imported. That imports torch's compiler, which
    takes about a second, and most runs call none of these functions.
    """
    import torch

    compiler = torch.compile

    def at_first_call(function: Any = None, **settings: Any) -> Any:
        if function is None:
            return partial(at_first_call, **settings)
        compiled = cache(partial(compiler, function, **settings))

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    setattr(torch, "compile", at_first_call)  # noqa: B010  (not its type)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        setattr(torch, "compile", compiler)  # noqa: B010


@cache
@patch("bitsandbytes", "0.50.2", until="tests/test_quantization.py passes without it on AVX-512")
def mend_4bit_kernel() -> Any:
    """Replace bitsandbytes' own kernel for CPUs by `dequantize_by_block`, once per process.

    Returns:
        The library of operators; the replacement lasts as long as this object.
    """
    import bitsandbytes  # noqa: F401  (the import registers its kernels)
    import torch
    from torch import library as operators

    name = "bitsandbytes::dequantize_4bit"
    theirs = operators.get_kernel(name, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def kernel(*arguments: Any) -> "Tensor":
        return theirs.call_boxed(keys, *arguments)

    replaced = operators.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # torch warns that a kernel is overridden, which is intended here
        warnings.simplefilter("ignore", UserWarning)
        replaced.impl(name, dequantize_by_block(kernel), "CPU", allow_override=True)
    return replaced


@patch("lm_eval", "0.4.13", until="a run with evaluation=harness prints none of it without this")
def quiet_harness() -> None:
    """Hide the harness's warnings.

    The harness warns of every default of a task file, and that the model it is given is loaded
    already, as ours is.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
