"""Write an export beside its place, check it there, and rename it into place."""

import argparse
import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import GenerationConfig

from orpo_lab import engine, memory
from orpo_lab.config.identity import locations
from orpo_lab.config.optimizer import Lora
from orpo_lab.config.quantization import Unquantized
from orpo_lab.errors import UserError
from orpo_lab.evaluate import turn_ends
from orpo_lab.export import card, check, merge
from orpo_lab.export.place import check_free
from orpo_lab.finished import FinishedRun
from orpo_lab.model.adapter import ADAPTER
from orpo_lab.model.causal import without_adapters
from orpo_lab.model.precision import DTYPES
from orpo_lab.model.quantization import stored
from orpo_lab.model.source import load_config
from orpo_lab.records.card import hub_name
from orpo_lab.records.run_folder import RunFolder, put_in_place, versions

# The largest file of a model's weights; hubs and downloads do better with several
SHARD = "5GB"
# Bytes beside the weights: the tokenizer, the card
OTHER_BYTES = 2**26


@dataclass(frozen=True)
class Order:
    """What is to be written."""

    is_adapter: bool
    dtype: torch.dtype
    """Of the weights of a whole model; for an adapter, of the arithmetic in which it is checked."""
    into: merge.Into | None = None
    """The base that the adapter of a quantized run is merged into; None: there is no such merge."""
    base: str | None = None
    """The name of the base on the hub."""
    revision: str | None = None
    """Its branch, tag or commit."""
    name: str = ""
    """What the export is called."""
    place: str = ""
    """What others load it by: its name on the hub, or its folder's."""
    was_adapter: bool = False
    """Whether the run has trained an adapter."""

    @classmethod
    def of(cls, options: argparse.Namespace, finished: FinishedRun, target: Path) -> "Order":
        """Return what a command line asks for.

        Raises:
            UserError: an argument does not fit the run.
        """
        config, model = finished.config, finished.origin.base.model
        was_adapter = isinstance(config.optimizer, Lora)
        is_adapter = was_adapter and not options.merge
        is_quantized = not isinstance(config.quantization, Unquantized)
        base, _, revision = (options.base or hub_name(config.model) or "").partition("@")
        _check_name(options.base, base)
        if options.into and not (is_quantized and options.merge):
            raise UserError(
                f"--into {options.into} chooses the base of a merge, and this run "
                + ("is not merged: give --merge too" if is_adapter else "is not quantized")
            )
        if options.into == "16bit" and stored(load_config(model)) is not None:
            raise UserError(
                f"--into 16bit: model.path={model.path} is stored quantized, so there are no "
                "weights in 16 bits; use --into dequantized"
            )
        if options.dtype and is_adapter:
            raise UserError(
                f"--dtype {options.dtype}: an adapter is written as it was trained; give --merge "
                "too for a whole model"
            )
        if is_adapter and (not base or (finished.origin.has_own_base and not options.base)):
            raise UserError(
                f"the base of this adapter is a folder of this machine ({model.path}), where "
                "nobody else finds it: write a whole model with --merge, or give the base's name "
                "on the hub with --base org/name"
            )
        narrow = min((finished.stored, finished.dtype), key=lambda dtype: dtype.itemsize)
        default = narrow if was_adapter else finished.stored
        return cls(
            is_adapter=is_adapter,
            dtype=torch.float32 if is_adapter else DTYPES.get(options.dtype, default),
            into=(options.into or "dequantized") if is_quantized and not is_adapter else None,
            base=base or None,
            revision=revision or config.model.revision,
            name=options.push or config.name or options.run.resolve().name,
            place=options.push or target.resolve().name,
            was_adapter=was_adapter,
        )

    @property
    def words(self) -> str:
        """What is written, for people."""
        precision = str(self.dtype).removeprefix("torch.")
        if self.is_adapter:
            return "an adapter, as it was trained"
        if not self.was_adapter:
            return f"a whole model in {precision}, as the run has trained it"
        base = {
            None: "its base",
            "dequantized": "its dequantized base, the numbers that it was trained on",
            "16bit": "its base before that was quantized",
        }[self.into]
        return f"a whole model in {precision}: the adapter is merged into {base}"


def _check_name(given: str | None, name: str) -> None:
    """Refuse a `--base` that is no name on the hub.

    Raises:
        UserError: it is none.
    """
    try:
        if given:
            validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"--base {given} must be a name on the hub, such as org/name or org/name@revision; "
            "nobody else finds a folder of this machine"
        ) from error


def write(finished: FinishedRun, order: Order, target: Path) -> list[str]:
    """Write an export, check it, and put it in place; return what was found, as lines.

    Raises:
        UserError: there is not enough room, another export goes to the same place, the run's files
            have changed, or the export does not answer like its run. Nothing is left then.
        OSError: the folder cannot be written to.
    """
    with _part(target) as part:
        network = finished.load()
        engine.check(finished.config, network, finished.dtype)
        _check_room(network, finished, order, part)
        own = like = check.of_run(network, finished, finished.dtype, "run")
        check.check_recorded(own, finished)
        if order.into == "16bit":
            del network
            memory.give_back()
            network, _ = merge.on_16bit(finished.origin).load(finished.tokenizer, finished.stored)
            like = check.of_run(network, finished, finished.stored, "16-bit base")
        if order.is_adapter:
            order = _write_adapter(network, finished, order, part)
        else:
            _write_model(network, finished, order, part)
        finished.tokenizer.save_pretrained(part)
        del network
        memory.give_back()
        checks = _check_replies(part, finished, order, own=own, like=like)
        _describe(part, finished, order, checks)
        put_in_place(part, target)
    return [f"{name:8} {difference}" for name, difference in checks.items()]


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """Inside this context there is a new folder beside `target`, of which nothing may be left.

    No other process has this context for the same place.

    Raises:
        UserError: another process has it, or its export has come to the place meanwhile.
        OSError: the folder cannot be made.
    """
    part, locked = (target.with_name(f".orpo_lab.{target.name}.{end}") for end in ("part", "lock"))
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locked)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another export to {target} is at work; choose a new --to") from None
    try:
        check_free(target)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        locked.unlink(missing_ok=True)
        lock.release()


def _check_room(network: Any, finished: FinishedRun, order: Order, part: Path) -> None:
    """Refuse to begin where the disk has no room for the export."""
    if order.is_adapter:
        size = (finished.folder / "final" / ADAPTER).stat().st_size
    else:
        # transformers counts the weights behind 4-bit codes too
        size = without_adapters(network).num_parameters() * order.dtype.itemsize
    size += OTHER_BYTES
    free = shutil.disk_usage(part).free
    if free < size:
        raise UserError(
            f"{part.parent} has {free / 1e9:.1f} GB of room and the export takes {size / 1e9:.1f} "
            "GB; make room, or choose another disk with --to"
        )


def _write_adapter(network: Any, finished: FinishedRun, order: Order, part: Path) -> Order:
    """Write the adapter of a run as it is, and what ends an answer.

    Returns:
        The order with the commit of the adapter's base.
    """
    final = finished.folder / "final"
    shutil.copyfile(final / ADAPTER, part / ADAPTER)
    if order.base == hub_name(finished.config.model):
        commit = getattr(without_adapters(network).config, "_commit_hash", None)
        order = replace(order, revision=commit or order.revision)
    _generation(network, finished).save_pretrained(part)
    settings = json.loads((final / CONFIG_NAME).read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": order.base, "revision": order.revision}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (part / CONFIG_NAME).write_text(text, encoding="utf-8")
    return order


def _write_model(network: Any, finished: FinishedRun, order: Order, part: Path) -> None:
    """Write a whole model."""
    model = merge.plain(network, order.dtype)
    model.generation_config = _generation(model, finished)
    model.config.get_text_config().use_cache = True
    try:
        model.save_pretrained(part, max_shard_size=SHARD)
    except SafetensorError as error:
        raise OSError(f"the export cannot be written: {error}") from error


def _generation(network: Any, finished: FinishedRun) -> GenerationConfig:
    """Return a network's generation settings, which name every token that ends an answer."""
    found: GenerationConfig = copy.deepcopy(without_adapters(network).generation_config)
    kwargs = finished.config.dataset.template_kwargs
    found.eos_token_id = turn_ends(network, finished.tokenizer, kwargs)
    return found


def _check_replies(
    part: Path, finished: FinishedRun, order: Order, *, own: check.Replies, like: check.Replies
) -> dict[str, check.Difference]:
    """Compare an export with its run, and with the network that it was written from.

    Args:
        part: the folder of the export.
        finished: the run.
        order: what was written.
        own: the replies of the run.
        like: those of the network that was written: the run's own, or its adapter on another base.

    Returns:
        The differences by the name of what the export was compared with.

    Raises:
        UserError: the export does not answer like the network that it was written from.
    """
    before = check.recorded(finished, "before")
    found, gap = check.of_folder(part, finished, like)
    exact = check.compare(found, like, before, gap)
    faults = exact.faults(check.tolerance(order.dtype, finished.dtype))
    if faults:
        remedy = "" if order.is_adapter else "; a wider --dtype is closer to the run"
        raise UserError(
            f"the export does not answer like {finished.folder}, and is not kept: "
            f"{'; '.join(faults)}{remedy}"
        )
    if like is own:
        return {"run": exact}
    return {"run": check.compare(found, own, before), "unmerged": exact}


def _describe(
    part: Path, finished: FinishedRun, order: Order, checks: dict[str, check.Difference]
) -> None:
    """Write `export.json` and the card.

    Raises:
        UserError: a file of the export names a path of this machine.
    """
    record = {
        "run": finished.folder.resolve().name,
        "what": order.words,
        "date": str(date.today()),
        "versions": versions(),
        "differences": {name: asdict(difference) for name, difference in checks.items()},
    }
    RunFolder(part).write_json("export.json", record)
    text = card.text(finished, order, checks)
    (part / "README.md").write_text(text, encoding="utf-8")
    # safetensors writes files that only their owner can read, and a server may be another user
    mode = (part / "README.md").stat().st_mode
    for file in part.glob("*.safetensors"):
        file.chmod(mode)
    places = {str(Path.cwd()), str(finished.folder.resolve())}
    places |= {place for found in locations(finished.config).values() for place in found}
    # Some tokenizers have chat templates in a folder of their own
    for file in filter(Path.is_file, part.rglob("*")):
        content = file.read_bytes() if file.suffix != ".safetensors" else b""
        for place in places:
            if (
                Path(place).is_absolute()
                and len(Path(place).parts) > 2
                and place.encode() in content
            ):
                name = file.relative_to(part)
                raise UserError(f"{name} of the export would name {place}; take it out of {name}")
