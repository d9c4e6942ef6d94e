"""Names, types and ranges of every configuration key; the values are in `conf/`.

Each config group has a module of the same name in this package. `Config` puts the groups together.

`register` makes the dataclasses known to Hydra. Then Hydra refuses a misspelt key or a value of the
wrong type while it composes the configuration. `load` turns the composed configuration into plain
dataclasses, once. All code after that works with dataclasses only.

A dataclass checks its own ranges in `__post_init__`. `Config.__post_init__` checks that the groups
fit together. Both raise a `ValueError` that names the key to change.

Each key has a policy beside it: what the key means to a run's identity (`policy`, `identity`).
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from orpo_lab.config.beta_schedule import (
    Adaptive,
    BetaSchedule,
    Constant,
    Cosine,
    HoldThenAnneal,
    Linear,
    Step,
)
from orpo_lab.config.checks import at_least, check
from orpo_lab.config.dataset import (
    COLUMNS,
    Dataset,
    EmbeddedDataset,
    FileDataset,
    HubDataset,
    OasstDataset,
)
from orpo_lab.config.engine import Engine, SharedPrefixEngine, TrlEngine
from orpo_lab.config.evaluation import Evaluation, Harness, NoEvaluation
from orpo_lab.config.judge import EndpointJudge, Judge, NoJudge
from orpo_lab.config.method import METHODS, Method, OrpoMethod
from orpo_lab.config.mixture import SOURCES, MixedSource, MixtureDataset, is_left_behind
from orpo_lab.config.model import RESULT_FILES, Model
from orpo_lab.config.optimizer import AdamW, Galore, Lora, Optimizer, Qlora
from orpo_lab.config.plan import Planning
from orpo_lab.config.policy import free, lasting, location, setting
from orpo_lab.config.quantization import Int8, Nf4, Quantization, Unquantized
from orpo_lab.config.resolvers import RESOLVERS
from orpo_lab.config.tracker import BELOW, NoTracker, Tracker, WandbTracker, nowhere
from orpo_lab.config.train import Train
from orpo_lab.errors import UserError, one_line


@dataclass(kw_only=True)
class Config:
    """The configuration of a run."""

    name: str | None = free()
    seed: int = setting()
    beta: float = setting(unread_under={"method": "sft"})
    beta_end: float = setting(
        unread_under={"beta_schedule": ("constant", "adaptive"), "method": "sft"}
    )
    resume: str | None = free()
    accept_changes: bool = free()
    start_from: str | None = location(*RESULT_FILES)
    model: Model = lasting()
    quantization: Quantization = lasting()
    optimizer: Optimizer = lasting()
    beta_schedule: BetaSchedule = setting(unread_under={"method": "sft"})
    dataset: Dataset = setting()
    method: Method = setting()
    engine: Engine = setting()
    train: Train = setting()
    plan: Planning = free()
    evaluation: Evaluation = free()
    tracker: Tracker = free(factory=nowhere)
    judge: Judge = free()

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed)
        check(self.seed < 2**32, f"seed={self.seed} must be below 2**32 = {2**32}")
        for key in ("beta", "beta_end"):
            value = getattr(self, key)
            check(0 <= value < math.inf, f"{key}={value} must be a number of at least 0")
        check(self.start_from != "", "start_from is empty; give a run folder, or leave it out")
        self._check_beta()
        self._check_pairs()
        self._check_quantization()
        self._check_engine()
        self._check_judge()
        self._check_sharding()

    @property
    def adaptive(self) -> Adaptive | None:
        """The schedule by which beta follows the margins of batches; None: beta follows none."""
        schedule = self.beta_schedule
        return schedule if isinstance(schedule, Adaptive) and self.method.reads_beta else None

    @property
    def unit(self) -> str:
        """What the method learns from, and so what `train.batch_size` and `num_train` count."""
        return self.dataset.unit if self.method.reads_unpaired else "pairs"

    def _check_beta(self) -> None:
        least, keys = self.method.least_beta, ["beta"]
        if self.beta_schedule.reads_beta_end:
            keys.append("beta_end")
        for key in keys:
            value = getattr(self, key)
            check(
                value >= least,
                f"{key}={value} must be at least {least:g} with method={kind(self.method)}, which "
                f"divides by beta; give {key}={self.beta / 2 or self.method.default_beta:g} for "
                "instance",
            )
        check(
            self.method.learns_at_beta_zero or any(getattr(self, key) > 0 for key in keys),
            f"{' and '.join(f'{key}=0' for key in keys)}: method={kind(self.method)} learns "
            "nothing at a beta of 0; give a beta above 0",
        )
        if schedule := self.adaptive:
            check(
                self.beta > 0,
                "beta=0: beta_schedule=adaptive changes beta by a share of it; give a beta above 0",
            )
            lowest = (1 - schedule.max_change) * self.beta
            check(
                lowest >= least,
                f"beta={self.beta} may fall to {lowest:.2g} with beta_schedule.max_change="
                f"{schedule.max_change}, and must stay at least {least:g} with "
                f"method={kind(self.method)}, which divides by beta",
            )

    def _check_pairs(self) -> None:
        check(
            self.unit == "pairs" or not self.adaptive,
            "beta_schedule=adaptive reads the margins of pairs, and the rows of "
            f"dataset={kind(self.dataset)} are single completions; use another beta_schedule",
        )

    def _check_quantization(self) -> None:
        quantized = not isinstance(self.quantization, Unquantized)
        match self.optimizer:
            case Qlora():
                check(
                    quantized,
                    "optimizer=qlora trains adapters on a quantized base; "
                    "use quantization=nf4 or int8, or optimizer=lora for an unquantized one",
                )
            case Lora():
                check(
                    not quantized,
                    "optimizer=lora keeps the base unquantized; "
                    "use quantization=none, or optimizer=qlora for a quantized base",
                )
            case _:
                check(
                    not quantized,
                    f"optimizer={kind(self.optimizer)} trains every weight, and quantized weights "
                    "cannot be trained; use quantization=none, or optimizer=qlora",
                )

    def _check_engine(self) -> None:
        if isinstance(self.engine, SharedPrefixEngine):
            budget, longest = self.engine.tokens_per_microbatch, 2 * self.dataset.max_length
            check(
                budget is None or budget >= longest,
                f"engine.tokens_per_microbatch={budget} must be at least {longest}: a pair may "
                f"hold two completions of nearly dataset.max_length={self.dataset.max_length}",
            )
        if isinstance(self.engine, TrlEngine):
            size, micro = self.train.batch_size, self.engine.micro_batch_size
            check(
                size % micro == 0,
                f"train.batch_size={size} must be a multiple of engine.micro_batch_size={micro}",
            )
            check(
                self.train.meter_steps is None,
                f"train.meter_steps={self.train.meter_steps} needs engine=shared_prefix, since "
                "engine=trl returns its loss as one number, not as two terms; or set it to null",
            )
            check(
                self.dataset.supervised == "completion",
                f"dataset.supervised={self.dataset.supervised} needs engine=shared_prefix: TRL's "
                "step supervises the whole completion",
            )
            trl = OrpoMethod(
                default_beta=self.method.default_beta,
                learning_rate_factor=self.method.learning_rate_factor,
                nll_scope="prompt_and_completion",
                nll_mean="tokens",
                penalty="log_sigmoid",
                log_odds_scale=1.0,
            )
            check(
                self.method == trl,
                "engine=trl can only compute method=orpo: TRL's step has its objective built in; "
                "use engine=shared_prefix",
            )

    def _check_judge(self) -> None:
        check(
            isinstance(self.judge, NoJudge) or self.dataset.num_generations > 0,
            f"judge={kind(self.judge)} compares the run's answers, and dataset.num_generations=0 "
            "makes none; raise it, or use judge=none",
        )

    def _check_sharding(self) -> None:
        if self.train.sharding == "none":
            return
        cannot = "train.sharding=full cannot be combined with"
        check(
            not isinstance(self.optimizer, Galore),
            f"{cannot} optimizer=galore, which projects whole gradients; use "
            "train.sharding=none, or optimizer=lora, qlora or adamw",
        )
        check(
            not isinstance(self.quantization, Int8),
            f"{cannot} quantization=int8: the layers of bitsandbytes keep whole 8-bit weights; use "
            "quantization=nf4",
        )
        check(
            not isinstance(self.engine, TrlEngine),
            f"{cannot} engine=trl, which trains in one process; use engine=shared_prefix",
        )
        check(
            self.train.meter_steps is None,
            f"{cannot} train.meter_steps={self.train.meter_steps}, which takes gradients of its "
            "own; set it to null",
        )
        check(
            not isinstance(self.evaluation, Harness),
            f"{cannot} evaluation=harness, which asks one process alone; use evaluation=none, and "
            "judge final/ afterwards",
        )


# For each group, its options and the dataclass with the types of each option. Options that share a
# dataclass (the named models, the hub datasets) share a schema, under the name given here. A group
# inside another group is named by both.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"model": Model},
    "quantization": {"nf4": Nf4, "int8": Int8, "none": Unquantized},
    "optimizer": {"qlora": Qlora, "lora": Lora, "galore": Galore, "adamw": AdamW},
    "beta_schedule": {
        "constant": Constant,
        "linear": Linear,
        "cosine": Cosine,
        "step": Step,
        "hold_then_anneal": HoldThenAnneal,
        "adaptive": Adaptive,
    },
    "dataset": {
        "embedded": EmbeddedDataset,
        "hub": HubDataset,
        "file": FileDataset,
        "mixture": MixtureDataset,
        "oasst": OasstDataset,
    },
    "dataset/columns": {**COLUMNS},
    "method": {**METHODS},
    "engine": {"shared_prefix": SharedPrefixEngine, "trl": TrlEngine},
    "train": {"train": Train},
    "plan": {"plan": Planning},
    "evaluation": {"harness": Harness, "none": NoEvaluation},
    "tracker": {"wandb": WandbTracker, "none": NoTracker, **BELOW},
    "judge": {"endpoint": EndpointJudge, "none": NoJudge},
}


@functools.cache
def all_fields() -> dict[str, Field[Any]]:
    """Return the dataclass field of every key, such as `train.max_steps`, and of every group."""
    found = dict(_fields_in(Config, ""))
    for group, options in SCHEMAS.items():
        for schema in options.values():
            found |= fields_of(schema, group)
    # Of a mixture's sources, whose names are the user's; see `known_key`
    return found | dict(_fields_in(MixedSource, f"{SOURCES}.*."))


def known_key(key: str) -> str:
    """Return the name of a key in `all_fields`: for a key of a mixture's source, that with a *."""
    return re.sub(rf"^({re.escape(SOURCES)})\.[^.]+\.", r"\1.*.", key)


def fields_of(schema: type[Any], group: str) -> dict[str, Field[Any]]:
    """Return the dataclass field of every key of an option of a group."""
    below = [f"{name}." for name, other in BELOW.items() if other is schema]
    return dict(_fields_in(schema, f"{group.replace('/', '.')}.{''.join(below)}"))


def _fields_in(schema: type[Any], prefix: str) -> Iterator[tuple[str, Field[Any]]]:
    for field in fields(schema):
        yield f"{prefix}{field.name}", field
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from _fields_in(field.type, f"{prefix}{field.name}.")


def kind(section: Any) -> str:
    """Return the name of the option that a typed section belongs to, such as `galore`.

    Raises:
        KeyError: no group has an option of the section's type.
    """
    for options in SCHEMAS.values():
        for name, schema in options.items():
            if type(section) is schema:
                return name
    raise KeyError(type(section).__name__)


def register() -> None:
    """Make the schemas and our resolvers known to Hydra; a second call does no harm."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for group, options in SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy of a composed configuration without Hydra's own part."""
    own = composed.copy()
    with read_write(own), open_dict(own):
        del own["hydra"]
    return own


def load(composed: DictConfig) -> Config:
    """Check a composed configuration and return it as dataclasses.

    Raises:
        UserError: a key is unknown, a value is missing or out of range, or choices do not fit
            together; the message names the key to change.
    """
    try:
        unknown = sorted(_unknown_keys(composed, ""))
        check(not unknown, f"unknown key{'s' * (len(unknown) > 1)}: {', '.join(unknown)}")
        loaded = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value here; set it") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise UserError(one_line(error)) from error
    assert isinstance(loaded, Config), "conf/config.yaml no longer starts from /schema/config"
    return loaded


def _unknown_keys(node: DictConfig, prefix: str) -> Iterator[str]:
    """Yield the keys that `+key=value` added to a node, and that its dataclass does not have."""
    schema = OmegaConf.get_type(node)
    if schema is None or not (is_dataclass(schema) or schema is dict):
        return
    # The names of a mixture's sources are the user's
    known = {field.name for field in fields(schema)} if is_dataclass(schema) else set(node)
    for key in map(str, node):
        if key not in known and not is_left_behind(f"{prefix}{key}"):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            yield from _unknown_keys(node[key], f"{prefix}{key}.")
