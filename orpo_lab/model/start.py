"""What a run starts from: `model.path` alone, or the result of an earlier run (`start_from`).

- If the earlier run trained all weights, its `final/` is the base.
- If it trained an adapter, and this run trains an adapter of the same shape on the same base, the
  adapter goes on as an adapter.
- If it trained an adapter, and this run trains anything else, the adapter is merged into its base.
  A quantized base is dequantized first: the adapter was trained on the numbers that the codes stand
  for, and on other numbers it would be another model.

Adapters that are trained on another base than `model.path` are saved with this base beside them, in
`final/base/`.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orpo_lab.config import SCHEMAS, Config, kind
from orpo_lab.config.identity import contents
from orpo_lab.config.model import BASE, MODEL_FILES, Model, local_path
from orpo_lab.config.optimizer import Lora, Qlora
from orpo_lab.config.quantization import Quantization, Unquantized
from orpo_lab.errors import UserError, one_line
from orpo_lab.model import weights
from orpo_lab.model.adapter import attach, load_adapter, put_on
from orpo_lab.model.precision import weight_dtype
from orpo_lab.model.quantization import dequantize
from orpo_lab.model.source import fetch
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.training.files import Files, link
from orpo_lab.training.tensors import save_pretrained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a run starts from."""

    config: Config
    """The run's configuration."""
    base: Config
    """The configuration to load the base with: that of the run, but for the model or, under an
    earlier run's adapter, for the quantization and the optimizer."""
    final: Path | None = None
    """`final/` of the earlier run; None: there is no earlier run."""
    adapter: Lora | None = None
    """The settings of the adapter in `final`; None: there is no adapter."""
    called: str = ""
    """What messages call the earlier run."""

    @property
    def goes_on(self) -> bool:
        """Whether the earlier adapter goes on as an adapter."""
        new, old = self.config.optimizer, self.adapter
        return (
            old is not None
            and isinstance(new, Lora)
            and (new.r, new.alpha) == (old.r, old.alpha)
            and self.config.quantization == self.base.quantization
        )

    @property
    def is_merged(self) -> bool:
        """Whether the earlier adapter is merged into its base."""
        return self.adapter is not None and not self.goes_on

    @property
    def has_own_base(self) -> bool:
        """Whether the run trains adapters on another base than `model.path`."""
        is_other = self.is_merged or self.base.model != self.config.model
        return isinstance(self.config.optimizer, Lora) and is_other

    @property
    def words(self) -> str:
        """What the run starts from, for people; empty: there is no earlier run."""
        if self.final is None:
            return ""
        name = self.final.resolve().parent.name
        if self.adapter is None:
            return f"the weights of {name} are the base"
        if self.goes_on:
            return f"the adapter of {name} goes on as an adapter"
        is_quantized = not isinstance(self.base.quantization, Unquantized)
        how = ", which is dequantized first" if is_quantized else ""
        return f"the adapter of {name} is merged into its base{how}"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse an earlier run that used another tokenizer.

        Raises:
            UserError: the vocabularies or the chat templates differ.
        """
        if self.final is None:
            return
        earlier = fetch(AutoTokenizer.from_pretrained, _at(self.config.model, self.final))
        asked, had = ((one.get_vocab(), one.chat_template) for one in (tokenizer, earlier))
        if asked != had:
            raise UserError(
                f"{self.called} was trained with another vocabulary or chat template than those "
                f"of model.path={self.config.model.path}; put back the tokenizer, and the "
                "model.chat_template, that it was trained with"
            )

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        on: torch.device | None = None,
    ) -> tuple[Any, str]:
        """Return the network as training begins with it, and the fingerprint of its parts.

        The parts are the base and the earlier adapter. A merged base has none of its own: two
        devices round a merge in two ways.

        Args:
            tokenizer: with a pad token.
            dtype: precision of the arithmetic.
            on: see `weights.load_model`.

        Raises:
            UserError: see `weights.load_model`, `attach` and `load_adapter`.
        """
        network = self.load_as_left(tokenizer, dtype, on)
        fingerprint = weights.fingerprint(network)
        if self.is_merged:
            network = network.merge_and_unload().requires_grad_(True)
        if isinstance(self.config.optimizer, Lora) and not self.goes_on:
            network = attach(network, self.config.optimizer)
        return network, fingerprint

    def load_as_left(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        on: torch.device | None = None,
    ) -> Any:
        """Return the base, with the earlier adapter if there is one; see `load`."""
        network: Any = weights.load_model(self.base, tokenizer, dtype, on)
        if self.final is None or self.adapter is None:
            return network
        if self.goes_on:
            assert isinstance(self.config.optimizer, Lora)
            network = attach(network, self.config.optimizer)
        else:
            stored = weight_dtype(self.config.optimizer, dtype)
            if not isinstance(self.base.quantization, Unquantized):
                dequantize(network, stored)
            for weight in network.parameters():
                weight.data = weight.data.to(stored)
            network = put_on(network, self.adapter)
        load_adapter(network, self.final)
        return network

    def save_base(self, network: Any, files: Files, final: Path) -> None:
        """Save the base beside the adapter, and have the adapter name it, if it is the run's own.

        Args:
            network: the network, after `load` and training.
            files: the files of the trained model, which hold the adapter already.
            final: the folder that the files will be in.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        if not self.has_own_base:
            return
        if self.is_merged:
            base = network.get_base_model()
            # The names of the base's weights without those that peft puts between
            own = {
                name.replace(".base_layer.", "."): weight
                for name, weight in base.state_dict().items()
                if ".lora_" not in name
            }
            save_pretrained(base, files, BASE, state_dict=own)
        else:
            earlier = local_path(self.base.model.path)
            for file in (found for pattern in MODEL_FILES for found in earlier.glob(pattern)):
                copy = files.folder / BASE / file.relative_to(earlier)
                copy.parent.mkdir(parents=True, exist_ok=True)
                link(file, copy)
        settings = files.folder / CONFIG_NAME
        named = json.loads(settings.read_text(encoding="utf-8"))
        named["base_model_name_or_path"] = str((final / BASE).absolute())
        settings.write_text(json.dumps(named, indent=2, sort_keys=True), encoding="utf-8")


def origin_of(config: Config, called: str | None = None) -> Origin:
    """Return what a run starts from; nothing heavy is loaded.

    Args:
        config: the run's configuration.
        called: what messages call the earlier run. None: the key that names it, `start_from=...`.

    Raises:
        UserError: `start_from` names no finished run, or a run on another base model; or its
            adapter would have to be merged into a quantized base.
    """
    if config.start_from is None:
        return Origin(config, base=config)
    called = called or f"start_from={config.start_from}"
    place = RunFolder(local_path(config.start_from))
    _check_finished(place, called)
    try:
        recorded = place.segments()[-1]["contents"]
        optimizer, quantization = _section(place, "optimizer"), _section(place, "quantization")
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{called}: the record of this run cannot be read ({one_line(error)[:100]}); an "
            "earlier version of orpo_lab may have made it"
        ) from error
    _check_same_base(place, recorded, config, called)
    final = place.file("final")
    if isinstance(optimizer, Lora):
        model = _at(config.model, final / BASE) if (final / BASE).is_dir() else config.model
        base = replace(config, model=model, optimizer=optimizer, quantization=quantization)
        origin = Origin(config, base, final, optimizer, called)
    else:
        base = replace(config, model=_at(config.model, final))
        origin = Origin(config, base, final, called=called)
    if origin.is_merged and isinstance(config.optimizer, Qlora):
        raise UserError(_not_merged(config, optimizer, quantization))
    log.info("start_from: %s", origin.words)
    return origin


def _check_finished(place: RunFolder, called: str) -> None:
    """Refuse what is not the folder of a run that has finished."""
    if not place.path.is_dir():
        raise UserError(f"{called}: there is no such folder")
    if not place.file("config.yaml").is_file():
        raise UserError(
            f"{called} is not a run folder: no config.yaml in it; give the folder that holds final/"
        )
    state = place.status()["state"]
    if state != "finished":
        raise UserError(
            f"{called} holds no result: its run is {state}; end it by the command that began it "
            f"(choices.yaml) with resume={place.path}, then repeat this one"
        )
    if not place.file("final").is_dir():
        raise UserError(f"{called} holds no result: its final/ is missing; put it back")


def _check_same_base(
    place: RunFolder, recorded: dict[str, str], config: Config, called: str
) -> None:
    """Refuse the result of a run on another base model; `recorded` is what its locations held."""
    now = contents(config)
    if any(recorded.get(key) != now.get(key) for key in ("model.path", "model.revision")):
        was = place.read_yaml("config.yaml")["model"]
        if was["path"] == config.model.path and not local_path(config.model.path).exists():
            raise UserError(
                f"{called} was trained on model.path={was['path']}, which is not here; give the "
                "command in the folder in which the run was started, or put that model here"
            )
        raise UserError(
            f"{called} was trained on model.path={was['path']} "
            f"model.revision={was['revision']}, and model.path={config.model.path} "
            f"model.revision={config.model.revision} is another model, or its files have changed "
            "since; give the base that it was trained on"
        )


def _section(place: RunFolder, group: str) -> Any:
    """Return a section of a run's configuration, typed."""
    option = place.segments()[-1]["kinds"][group]
    return SCHEMAS[group][option](**place.read_yaml("config.yaml")[group])


def _at(model: Model, folder: Path) -> Model:
    """Return the model in another folder."""
    return replace(model, path=str(folder), revision=None)


def _not_merged(config: Config, adapter: Lora, quantization: Quantization) -> str:
    """Return why a quantized base cannot take an adapter in, and what to do."""
    keys = {
        "optimizer": kind(adapter),
        "optimizer.r": adapter.r,
        "optimizer.alpha": adapter.alpha,
        "quantization": kind(quantization),
    } | {f"quantization.{key}": value for key, value in asdict(quantization).items()}
    return (
        f"start_from={config.start_from}: its adapter is of another shape or on another base than "
        "this run's, and quantizing a base that it is merged into would undo much of it; give "
        f"{' '.join(f'{key}={value}' for key, value in keys.items())}, as it was trained with, or "
        "have it merged by optimizer=lora, galore or adamw"
    )
