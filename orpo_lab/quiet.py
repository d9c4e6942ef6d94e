"""What upstream says in a normal run that tells our users nothing, each with its reason.

Everything else stays audible.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Start of the message -> reason
WARNINGS = {
    "`gradient_checkpointing` is deprecated": "TRL 1.16 reads the setting under its old name",
    "`is_gradient_checkpointing` is deprecated": "peft 0.21 asks for it under its old name",
}


def silence_upstream() -> None:
    """Silence them; called before the heavy imports, since some speak while they are imported."""
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


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Make a package look absent to what is imported meanwhile."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]  # find_spec then finds nothing
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


def _hide_bars() -> None:
    """Progress bars are for terminals: in a file they are thousands of characters a line."""
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
