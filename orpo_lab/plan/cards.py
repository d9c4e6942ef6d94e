"""What a run computes on: memory, speed, and how much of the speed a step reaches."""

import os
import re
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from orpo_lab import program
from orpo_lab.errors import UserError, one_line

GIB = 2**30
# Share of a card's memory that tensors can take: the driver and CUDA's context take the rest
USABLE = 0.97
# The name of the card that `plan --calibrate` measures
HERE = "here"
NUMBERS = (
    *("memory_gb", "tflops", "bandwidth_gbps"),
    *("fp32_tflops", "share", "share_full", "host_ms_per_layer", "link_gbps"),
)


@dataclass(frozen=True)
class Card:
    """A device; the comments of `cards.yaml` say what the numbers mean."""

    name: str
    memory_gb: float
    tflops: float
    bandwidth_gbps: float
    fp32_tflops: float
    share: float
    host_ms_per_layer: float
    load_gbps: float
    save_gbps: float
    host_ms_per_token: float
    link_gbps: float
    has_bf16: bool = True
    is_gpu: bool = True
    share_full: float | None = None
    """As `share`, of a step that trains all weights; None: as `share`."""
    calibrated: str = ""
    """The day on which share and host time were measured; empty: they are assumed."""

    @property
    def memory(self) -> int:
        """Bytes that tensors can take."""
        return int(self.memory_gb * GIB * (USABLE if self.is_gpu else 1))

    def rate(self, dtype: torch.dtype, *, trains_all: bool) -> float:
        """Return how many FLOP/s a step reaches in a precision.

        Args:
            dtype: the precision.
            trains_all: whether all weights are trained, or adapters.
        """
        peak = (self.fp32_tflops if dtype == torch.float32 else self.tflops) * 1e12
        return peak * ((trains_all and self.share_full) or self.share)

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of the arithmetic for `model.dtype`, as `model.precision` would."""
        if name == "bf16" and not self.has_bf16:
            return torch.float16 if self.is_gpu else torch.float32
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


@cache
def _table() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Return the names of the cards."""
    return list(_table()["cards"])


def named(name: str) -> Card:
    """Return a card by its name, or by its numbers (`memory_gb=24,tflops=165,bandwidth_gbps=1008`).

    Raises:
        UserError: there is no such card, or a number is missing, unknown or no number.
    """
    assumed = _table()["assumed"]
    if name in _table()["cards"]:
        values = dict(_table()["cards"][name])
        measured = dict(values.pop("calibrated") or {})
        return Card(name=name, **assumed | values | _calibrated(measured))
    if "=" not in name:
        raise UserError(
            f"--card {name}: there is {', '.join(names())}; of another card give the numbers: "
            "memory_gb=24,tflops=165,bandwidth_gbps=1008"
        )
    given = dict(pair.partition("=")[::2] for pair in name.split(","))
    try:
        numbers = {key.strip(): float(value) for key, value in given.items()}
    except ValueError as error:
        raise UserError(f"--card {name}: {one_line(error)}") from error
    unknown, missing = set(numbers) - set(NUMBERS), set(NUMBERS[:3]) - set(numbers)
    if unknown or missing or min(numbers.values()) <= 0:
        raise UserError(
            f"--card {name}: give {', '.join(NUMBERS[:3])}, each above 0, and if known "
            f"{', '.join(NUMBERS[3:])}"
        )
    # Few cards compute fp32 faster than half of their 16-bit rate
    return Card(name=name, **assumed | {"fp32_tflops": numbers["tflops"] / 2} | numbers)


def _calibrated(measured: dict[str, Any]) -> dict[str, Any]:
    day = measured.pop("date", None)
    return measured | {"calibrated": str(day)} if day else {}


def this_machine(calibration: Path | None = None) -> Card:
    """Return this machine: its first GPU, or its CPU.

    Args:
        calibration: the file that `plan --calibrate` has written; None: that of the user's cache.

    Raises:
        UserError: the file that is given cannot be read.
    """
    file = calibration or cache_file()
    if calibration is not None or file.is_file():
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            found = Card(**_table()["assumed"] | values)
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            how = f"{program.command('plan')} --calibrate"
            raise UserError(
                f"{file} holds no calibration ({one_line(error)[:100]}); {how} writes one"
            ) from error
        if calibration is not None or found.name == device_name():
            return replace(found, memory_gb=memory_gb())
    if torch.cuda.is_available():
        known = like(device_name(), torch.cuda.mem_get_info()[1] / GIB)
        return replace(named(known or "h100"), name=device_name(), memory_gb=memory_gb())
    # 16 products and sums a cycle at 2 GHz on each core, a guess; the step's share is part of it
    rate = psutil.cpu_count() * 0.064
    return Card(
        **_table()["assumed"]
        | {"name": HERE, "memory_gb": memory_gb(), "is_gpu": False, "has_bf16": _cpu_has_bf16()}
        | {"tflops": rate, "fp32_tflops": rate, "bandwidth_gbps": 10.0, "host_ms_per_layer": 5}
    )


def like(device: str, memory_gb: float | None = None) -> str | None:
    """Return the name of the card that a device's name means; None: there is none.

    Args:
        device: as torch or Ray names a GPU: NVIDIA A100-SXM4-40GB, GeForce-RTX-4090, A100-80G.
        memory_gb: its memory, in GiB; None: what its name says. Of several cards of one model the
            smallest is taken that is not smaller than this.
    """
    words = re.split(r"[^a-z0-9]+", device.lower())
    words += [first + second for first, second in pairwise(words)]
    said = [int(size[1]) for word in words if (size := re.fullmatch(r"(\d+)gb?", word))]
    least = memory_gb or max(said, default=0)
    found = [name for name in names() if name.partition("_")[0] in words]
    # A card of 40 GB has 39.5 GiB
    large = [name for name in found if named(name).memory_gb >= 0.95 * least]
    return next(iter(large or found[-1:]), None)


def _cpu_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_name() -> str:
    """Return the name of the first GPU, or HERE for a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else HERE


def memory_gb() -> float:
    """Return the memory that is free now, of the GPU or of the CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / GIB / USABLE
    return psutil.virtual_memory().available / GIB


def cache_file() -> Path:
    """Return the place of this machine's calibration in the user's cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "orpo-lab" / "card.yaml"


def write(card: Card, file: Path) -> None:
    """Write a calibration for `this_machine`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {field.name: getattr(card, field.name) for field in fields(card)}
        head = f"# Measured by {program.command('plan')} --calibrate, {date.today()}\n"
        file.write_text(head + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({one_line(error)}); give another") from error
