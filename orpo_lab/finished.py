"""A finished run, loaded again: its configuration, tokenizer, network and pairs."""

from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orpo_lab import config, data
from orpo_lab.config import SCHEMAS, Config
from orpo_lab.config.dataset import columns_of
from orpo_lab.config.identity import policy_of
from orpo_lab.errors import UserError, one_line
from orpo_lab.model.precision import resolve_device, resolve_dtype
from orpo_lab.model.source import load_config
from orpo_lab.model.start import origin_of
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.records.run_folder import RunFolder


class FinishedRun:
    """The result of a run.

    Args:
        folder: the run folder.
        is_trained: whether the network is the trained one; otherwise it is what the run began with.

    Attributes:
        config: the run's configuration, without its free groups.
        origin: where the network comes from: the run's own `final/`, or what the run began with.
        tokenizer: with the run's chat template and a pad token.
        dtype: precision of the arithmetic.
        stored: precision of the weights in the folder that the network is loaded from.

    Raises:
        UserError: the run has not finished, its record cannot be read, or its base has changed.
    """

    def __init__(self, folder: Path, *, is_trained: bool = True) -> None:
        self.folder = folder
        self.config = began = read_config(folder)
        ended = replace(began, start_from=str(folder.resolve()))
        self.origin = origin_of(ended, str(folder)) if is_trained else origin_of(began)
        own = load_config(self.origin.base.model)
        self.tokenizer = load_tokenizer(self.config.model, own)
        self.origin.check_tokenizer(self.tokenizer)
        self.dtype = resolve_dtype(self.config.model.dtype, resolve_device())
        self.stored = own.dtype or self.dtype

    def load(self) -> Any:
        """Return the network as the run left it, or began with it."""
        network, _ = self.origin.load(self.tokenizer, self.dtype)
        return network

    @cached_property
    def pairs(self) -> data.Data:
        """The pairs that the run was made with.

        Raises:
            UserError: the held-out pairs are not those that the run was measured on.
        """
        place = RunFolder(self.folder)
        today = date.fromisoformat(place.segments()[-1]["started"][:10])
        makes_pairs = not self.config.method.reads_unpaired
        asked = self.config.dataset
        pairs = data.load(asked, self.tokenizer, today=today, makes_pairs=makes_pairs)
        held_out = place.read_json("summary.json")["dataset_fingerprint"]["held_out"]
        if pairs.report["held_out"]["fingerprint"] != held_out:
            raise UserError(
                f"the held-out pairs are not those that {self.folder} was measured on (their files "
                "have changed); put back the old ones"
            )
        return pairs


def read_config(folder: Path) -> Config:
    """Return the configuration of the run in a folder, without its free groups.

    These are the tracker, what is evaluated beside the held-out pairs, and the plan.

    Raises:
        UserError: there is no run, or its configuration is not one of this version of orpo_lab.
    """
    place = RunFolder(folder)
    if not place.segments():
        raise UserError(f"{folder} is not a run folder: it holds no record of a run")
    groups = [group for group in SCHEMAS if "/" not in group and policy_of(group).kind == "free"]
    values = place.read_yaml("config.yaml") | {group: {} for group in groups}
    kinds = place.segments()[-1]["kinds"] | dict.fromkeys(groups, "none")
    values["plan"], kinds["plan"] = {"check": "off"}, "plan"
    try:
        sections = {
            group: _typed(SCHEMAS[group][kind], values[group]) for group, kind in kinds.items()
        }
        merged = OmegaConf.merge(OmegaConf.structured(Config), values | sections)
    except (KeyError, OmegaConfBaseException) as error:
        raise UserError(
            f"{folder}/config.yaml cannot be read; another version of orpo_lab may have made it "
            f"({one_line(error)[:100]})"
        ) from error
    return config.load(cast(DictConfig, merged))


def _typed(schema: type[Any], values: dict[str, Any]) -> Any:
    """Return a recorded section with the types of its option."""
    if "columns" in values:
        columns = OmegaConf.structured(columns_of(values["columns"]))
        values = values | {"columns": OmegaConf.merge(columns, values["columns"])}
    return OmegaConf.merge(OmegaConf.structured(schema), values)
