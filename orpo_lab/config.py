"""Names, types and ranges of every configuration key; the values stand in `conf/`.

`register` makes the dataclasses known to Hydra, so that a misspelt key or a value of the wrong type
is refused while the configuration is composed. `load` turns the composed configuration into plain
dataclasses, once; everything after it sees dataclasses only.

A dataclass checks its own ranges in `__post_init__`; `Config.__post_init__` checks what must fit
together. Both raise a `ValueError` that names the key to change.

Beside each key stands its policy: what it means to a run's identity (`policy`, `identity`).
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from orpo_lab.errors import UserError, one_line
from orpo_lab.masking import mask
from orpo_lab.policy import free, lasting, location, setting

# conf/model/tiny.yaml names the embedded model by its place in the package
EMBEDDED = "orpo_lab/tiny"
# What a model is loaded from; checkpoints and a README beside it are not read
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
ALL_FILES = "**/*"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _at_least(low: float, **values: float | None) -> None:
    """Refuse a given value below `low`; NaN is below everything."""
    for key, value in values.items():
        key = key.replace("__", ".")
        _check(value is None or value >= low, f"{key}={value} must be at least {low:g}")


def _one_of(allowed: tuple[str, ...], **values: str) -> None:
    for key, value in values.items():
        key = key.replace("__", ".")
        _check(value in allowed, f"{key}={value} must be one of {', '.join(allowed)}")


@dataclass(kw_only=True)
class Model:
    """A causal language model: a hub name or a local folder."""

    path: str = location(*MODEL_FILES)
    revision: str | None = location()
    attention: str = lasting()
    dtype: str = lasting()
    trust_remote_code: bool = lasting()
    # Read by other keys only: what a run takes of them stands in optimizer.learning_rate
    learning_rate: float = free()
    full_learning_rate: float = free()

    def __post_init__(self) -> None:
        _check(bool(self.path.strip()), "model.path is empty; give a hub name or a folder")
        _one_of(("auto", "flash_attention_2", "sdpa", "eager"), model__attention=self.attention)
        _one_of(("bf16", "fp16", "fp32"), model__dtype=self.dtype)


@dataclass(kw_only=True)
class Quantization:
    """How the frozen base weights are stored."""


@dataclass(kw_only=True)
class Nf4(Quantization):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    double_quantization: bool = lasting()


@dataclass(kw_only=True)
class Int8(Quantization):
    """LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339)."""

    outlier_threshold: float = lasting()

    def __post_init__(self) -> None:
        _at_least(0, quantization__outlier_threshold=self.outlier_threshold)


@dataclass(kw_only=True)
class Unquantized(Quantization):
    """Weights in `model.dtype`, or in fp32 where they are trained themselves."""


@dataclass(kw_only=True)
class Optimizer:
    """What every optimizer has; alone it is never used."""

    learning_rate: float = setting()
    weight_decay: float = setting()
    adam_beta1: float = setting()
    adam_beta2: float = setting()
    adam_epsilon: float = setting()

    def __post_init__(self) -> None:
        _check(
            0 <= self.learning_rate <= 1e36,
            f"optimizer.learning_rate={self.learning_rate} must be a number of at least 0, and one "
            "whose step fp32 can hold",
        )
        _at_least(0, optimizer__weight_decay=self.weight_decay)
        _check(self.adam_epsilon > 0, f"optimizer.adam_epsilon={self.adam_epsilon} must be above 0")
        for key in ("adam_beta1", "adam_beta2"):
            _check(0 <= getattr(self, key) < 1, f"optimizer.{key} must be in [0, 1)")


@dataclass(kw_only=True)
class Lora(Optimizer):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on unquantized weights."""

    r: int = lasting()
    alpha: float = lasting()
    dropout: float = lasting()

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, optimizer__r=self.r)
        _check(self.alpha > 0, f"optimizer.alpha={self.alpha} must be above 0")
        _check(0 <= self.dropout < 1, f"optimizer.dropout={self.dropout} must be in [0, 1)")


@dataclass(kw_only=True)
class Qlora(Lora):
    """The same adapters on a quantized base."""


@dataclass(kw_only=True)
class AdamW(Optimizer):
    """Full parameters, fp32 master weights."""


@dataclass(kw_only=True)
class Galore(Optimizer):
    """Full parameters with low-rank gradients (Zhao et al. 2024, arXiv:2403.03507)."""

    implementation: str = lasting()
    rank: int | None = lasting()
    update_proj_gap: int | None = lasting()
    scale: float = lasting()
    proj_type: str = lasting()
    bits: int = lasting()
    refresh: str | None = lasting()
    stagger_refresh: bool | None = lasting()
    rotate_moments: bool = lasting()
    layerwise: bool = lasting()

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, optimizer__rank=self.rank, optimizer__update_proj_gap=self.update_proj_gap)
        _check(self.scale > 0, f"optimizer.scale={self.scale} must be above 0")
        _one_of(("std", "reverse_std", "left", "right"), optimizer__proj_type=self.proj_type)
        _check(self.bits in (8, 32), f"optimizer.bits={self.bits} must be 8 or 32")
        refresh = self.refresh or "exact"
        _one_of(("exact", "randomized", "warm"), optimizer__refresh=refresh)
        _one_of(("orpo_lab", "galore_torch"), optimizer__implementation=self.implementation)
        if self.implementation == "galore_torch":
            self._check_galore_torch()

    def _check_galore_torch(self) -> None:
        """Refuse what galore-torch 1.0 would drop, or do wrong."""
        _check(
            self.bits == 32,
            "optimizer.implementation=galore_torch cannot do optimizer.bits=8: its 8-bit class "
            "passes its settings in an order that bitsandbytes has since changed (it would run "
            "with max_unorm=100 and skip_zeros=True); use optimizer.implementation=orpo_lab",
        )
        asked = {
            "layerwise=true": self.layerwise,
            "rotate_moments=true": self.rotate_moments,
            "stagger_refresh=true": self.stagger_refresh,
            f"refresh={self.refresh}": self.refresh not in (None, "exact"),
        }
        for override, is_asked in asked.items():
            _check(
                not is_asked,
                f"optimizer.{override} is not in galore-torch, which takes exact bases, all at "
                "once; use optimizer.implementation=orpo_lab",
            )


@dataclass(kw_only=True)
class BetaSchedule:
    """How beta moves from `beta` to `beta_end`; alone it is never used."""


@dataclass(kw_only=True)
class Constant(BetaSchedule):
    """beta throughout; beta_end is not read."""


@dataclass(kw_only=True)
class Linear(BetaSchedule):
    """A straight line from the first step to the last."""


@dataclass(kw_only=True)
class Cosine(BetaSchedule):
    """Half a cosine: slow, fast, slow."""


@dataclass(kw_only=True)
class Step(BetaSchedule):
    """Equal jumps at the milestones."""

    milestones: list[float] = setting()

    def __post_init__(self) -> None:
        rising = self.milestones == sorted(set(self.milestones))
        inside = all(0 < milestone < 1 for milestone in self.milestones)
        _check(
            bool(self.milestones) and rising and inside,
            f"beta_schedule.milestones={self.milestones} must rise and lie between 0 and 1",
        )


@dataclass(kw_only=True)
class HoldThenAnneal(BetaSchedule):
    """beta, then a straight line to beta_end over the final part of the run."""

    anneal_fraction: float = setting()

    def __post_init__(self) -> None:
        _check(
            0 < self.anneal_fraction <= 1,
            f"beta_schedule.anneal_fraction={self.anneal_fraction} must be in (0, 1]",
        )


# Faults that a row can be trained on with; the others leave no pair of a prompt and two answers
KEEPABLE_FAULTS = (
    "nul_character",
    "contradicting_prompt",
    "unknown_role",
    "other_turn_in_answer",
    "special_token_text",
    "unrendered_text",
    "duplicate",
    "conflicting_duplicate",
    "leaked_prompt",
    "leaked_prompt_normalized",
)


@dataclass(kw_only=True)
class Faults:
    """What becomes of a row with a fault: refuse, drop or keep (see docs/data.md)."""

    invalid_json: str = setting()
    invalid_utf8: str = setting()
    missing_column: str = setting()
    wrong_type: str = setting()
    oversized_row: str = setting()
    lone_surrogate: str = setting()
    nul_character: str = setting()
    empty_prompt: str = setting()
    empty_completion: str = setting()
    chosen_equals_rejected: str = setting()
    chosen_equals_rejected_after_cut: str = setting()
    differing_prompts: str = setting()
    contradicting_prompt: str = setting()
    turns_not_alternating: str = setting()
    unknown_role: str = setting()
    no_answer: str = setting()
    prefilled_answer: str = setting()
    other_turn_in_answer: str = setting()
    special_token_text: str = setting()
    template_error: str = setting()
    misrendered: str = setting()
    unrendered_text: str = setting()
    duplicate: str = setting()
    conflicting_duplicate: str = setting()
    leaked_prompt: str = setting()
    leaked_prompt_normalized: str = setting()

    def __post_init__(self) -> None:
        for one in fields(self):
            policies = ("refuse", "drop", "keep")[: 3 if one.name in KEEPABLE_FAULTS else 2]
            _one_of(policies, **{f"dataset__faults__{one.name}": getattr(self, one.name)})


@dataclass(kw_only=True)
class Dataset:
    """What every source of preference pairs has; alone it is never used."""

    max_length: int = setting()
    max_prompt_length: int = setting()
    overlong: str = setting()
    num_train: int | None = setting()
    num_eval: int | None = setting()
    num_generations: int = setting()
    max_new_tokens: int = setting(unread_under=("dataset.num_generations", 0))
    num_proc: int | None = free()
    faults: Faults = setting()

    def __post_init__(self) -> None:
        _at_least(2, dataset__max_length=self.max_length)
        _at_least(
            1,
            dataset__max_prompt_length=self.max_prompt_length,
            dataset__num_train=self.num_train,
            dataset__num_eval=self.num_eval,
            dataset__max_new_tokens=self.max_new_tokens,
            dataset__num_proc=self.num_proc,
        )
        _at_least(0, dataset__num_generations=self.num_generations)
        _one_of(("drop", "cut_prompt", "cut_completion"), dataset__overlong=self.overlong)
        _check(
            self.max_prompt_length < self.max_length,
            f"dataset.max_prompt_length={self.max_prompt_length} must be below "
            f"dataset.max_length={self.max_length}, or no completion fits behind such a prompt",
        )


@dataclass(kw_only=True)
class EmbeddedDataset(Dataset):
    """Generated by `orpo_lab.data.embedded`."""


@dataclass(kw_only=True)
class Columns:
    """Which column of the source holds what; `prompt: null` where there is none."""

    prompt: str | None = setting()
    chosen: str = setting()
    rejected: str = setting()


@dataclass(kw_only=True)
class TableDataset(Dataset):
    """Rows that hold a pair in columns; alone it is never used."""

    columns: Columns = setting(factory=Columns)
    transcripts: bool = setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            not self.transcripts or self.columns.prompt is None,
            "dataset.transcripts=true reads the prompt out of the transcripts: "
            "set dataset.columns.prompt=null",
        )


@dataclass(kw_only=True)
class HubDataset(TableDataset):
    """A dataset of the Hugging Face hub, or a local folder laid out like one."""

    path: str = location(ALL_FILES)
    revision: str | None = location()
    train_split: str = setting()
    eval_split: str | None = setting()


@dataclass(kw_only=True)
class FileDataset(TableDataset):
    """A file of rows; its suffix says of which kind."""

    train_path: str = location(ALL_FILES)
    eval_path: str | None = location(ALL_FILES)


@dataclass(kw_only=True)
class OasstDataset(Dataset):
    """OpenAssistant's conversation trees, whose replies people have ranked."""

    train_path: str = location(ALL_FILES)
    eval_path: str | None = location(ALL_FILES)
    languages: list[str] | None = setting()
    max_depth: int | None = setting()
    pairing: str = setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, dataset__max_depth=self.max_depth)
        _one_of(("best_worst", "adjacent", "all"), dataset__pairing=self.pairing)


@dataclass(kw_only=True)
class Method:
    """A method of alignment; alone it is never used."""


@dataclass(kw_only=True)
class OrpoMethod(Method):
    """ORPO, and which reading of its equations is optimised (see docs/method.md)."""

    nll_scope: str = setting()
    nll_mean: str = setting()
    penalty: str = setting()

    def __post_init__(self) -> None:
        _one_of(("prompt_and_completion", "completion"), method__nll_scope=self.nll_scope)
        _one_of(("tokens", "sequences"), method__nll_mean=self.nll_mean)
        _one_of(("log_sigmoid", "log_odds"), method__penalty=self.penalty)


@dataclass(kw_only=True)
class Engine:
    """What computes one optimizer step; alone it is never used."""


@dataclass(kw_only=True)
class SharedPrefixEngine(Engine):
    """Our own step: prompts once, packed rows, no logits."""

    tokens_per_microbatch: int | None = setting()

    def __post_init__(self) -> None:
        _at_least(1, engine__tokens_per_microbatch=self.tokens_per_microbatch)


@dataclass(kw_only=True)
class TrlEngine(Engine):
    """TRL's own ORPO step."""

    micro_batch_size: int = setting()

    def __post_init__(self) -> None:
        _at_least(1, engine__micro_batch_size=self.micro_batch_size)


@dataclass(kw_only=True)
class Train:
    """Length, batch and rhythm of a run."""

    max_steps: int | None = setting()
    num_epochs: float | None = setting()
    batch_size: int = setting()
    lr_scheduler_type: str = setting()
    warmup_steps: float = setting(unread_under=("train.lr_scheduler_type", "constant"))
    max_grad_norm: float = setting()
    gradient_checkpointing: bool = setting()
    logging_steps: int = free()
    eval_steps: int | None = free()
    save_steps: int | None = free()
    num_checkpoints: int = free()
    max_hours: float | None = free()
    on_nonfinite: str = setting()
    max_skipped_steps: int = setting(unread_under=("train.on_nonfinite", "stop"))

    def __post_init__(self) -> None:
        _at_least(
            1,
            train__max_steps=self.max_steps,
            train__batch_size=self.batch_size,
            train__logging_steps=self.logging_steps,
            train__eval_steps=self.eval_steps,
            train__save_steps=self.save_steps,
            train__num_checkpoints=self.num_checkpoints,
            train__max_skipped_steps=self.max_skipped_steps,
        )
        _check(
            self.max_hours is None or 0 < self.max_hours < math.inf,
            f"train.max_hours={self.max_hours} must be above 0, or null for no limit",
        )
        _one_of(("stop", "skip"), train__on_nonfinite=self.on_nonfinite)
        _at_least(0, train__warmup_steps=self.warmup_steps, train__max_grad_norm=self.max_grad_norm)
        _check(
            (self.max_steps is None) != (self.num_epochs is None),
            "set exactly one of train.max_steps and train.num_epochs, and the other to null",
        )
        _check(
            self.num_epochs is None or 0 < self.num_epochs < math.inf,
            f"train.num_epochs={self.num_epochs} must be above 0",
        )
        _check(
            self.warmup_steps < 1 or self.warmup_steps == int(self.warmup_steps),
            f"train.warmup_steps={self.warmup_steps} must be a whole number, or a fraction below 1",
        )
        _one_of(
            ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"),
            train__lr_scheduler_type=self.lr_scheduler_type,
        )


@dataclass(kw_only=True)
class Tracker:
    """Where a run is logged beside its own folder."""


@dataclass(kw_only=True)
class WandbTracker(Tracker):
    """Weights & Biases."""

    mode: str = free()
    project: str | None = free()
    entity: str | None = free()
    group: str | None = free()
    tags: list[str] = free()
    summary_run: bool = free()

    def __post_init__(self) -> None:
        _one_of(("auto", "online", "offline"), tracker__mode=self.mode)


@dataclass(kw_only=True)
class NoTracker(Tracker):
    """The run folder only."""


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    name: str | None = free()
    seed: int = setting()
    beta: float = setting()
    beta_end: float = setting(unread_under=("beta_schedule", "constant"))
    resume: str | None = free()
    accept_changes: bool = free()
    model: Model = lasting()
    quantization: Quantization = lasting()
    optimizer: Optimizer = lasting()
    beta_schedule: BetaSchedule = setting()
    dataset: Dataset = setting()
    method: Method = setting()
    engine: Engine = setting()
    train: Train = setting()
    tracker: Tracker = free()

    def __post_init__(self) -> None:
        _at_least(0, seed=self.seed)
        _check(self.seed < 2**32, f"seed={self.seed} must be below 2**32 = {2**32}")
        for key in ("beta", "beta_end"):
            value = getattr(self, key)
            _check(0 <= value < math.inf, f"{key}={value} must be a number of at least 0")
        self._check_quantization()
        self._check_engine()

    def _check_quantization(self) -> None:
        quantized = not isinstance(self.quantization, Unquantized)
        match self.optimizer:
            case Qlora():
                _check(
                    quantized,
                    "optimizer=qlora trains adapters on a quantized base; "
                    "use quantization=nf4 or int8, or optimizer=lora for an unquantized one",
                )
            case Lora():
                _check(
                    not quantized,
                    "optimizer=lora keeps the base unquantized; "
                    "use quantization=none, or optimizer=qlora for a quantized base",
                )
            case _:
                _check(
                    not quantized,
                    f"optimizer={kind(self.optimizer)} trains every weight, and quantized weights "
                    "cannot be trained; use quantization=none, or optimizer=qlora",
                )

    def _check_engine(self) -> None:
        if isinstance(self.engine, SharedPrefixEngine):
            budget, longest = self.engine.tokens_per_microbatch, 2 * self.dataset.max_length
            _check(
                budget is None or budget >= longest,
                f"engine.tokens_per_microbatch={budget} must be at least {longest}: a pair may "
                f"hold two completions of nearly dataset.max_length={self.dataset.max_length}",
            )
        if isinstance(self.engine, TrlEngine):
            size, micro = self.train.batch_size, self.engine.micro_batch_size
            _check(
                size % micro == 0,
                f"train.batch_size={size} must be a multiple of engine.micro_batch_size={micro}",
            )
            trl = OrpoMethod(
                nll_scope="prompt_and_completion", nll_mean="tokens", penalty="log_sigmoid"
            )
            _check(
                self.method == trl,
                "engine=trl can only compute method=orpo: TRL's step has its objective built in; "
                "use engine=shared_prefix",
            )


# Each option of a group and the dataclass that types it. Options that share a dataclass (the named
# models, the hub datasets) share a schema, under the name that stands here.
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
    },
    "dataset": {
        "embedded": EmbeddedDataset,
        "hub": HubDataset,
        "file": FileDataset,
        "oasst": OasstDataset,
    },
    "method": {"orpo": OrpoMethod},
    "engine": {"shared_prefix": SharedPrefixEngine, "trl": TrlEngine},
    "train": {"train": Train},
    "tracker": {"wandb": WandbTracker, "none": NoTracker},
}


@functools.cache
def all_fields() -> dict[str, Field[Any]]:
    """Return the field of every key, e.g. of `train.max_steps`; of a group: of what is chosen."""
    found = dict(_fields_in(Config, ""))
    for group, options in SCHEMAS.items():
        for schema in options.values():
            found |= dict(_fields_in(schema, f"{group}."))
    return found


def _fields_in(schema: type[Any], prefix: str) -> Iterator[tuple[str, Field[Any]]]:
    for one in fields(schema):
        yield f"{prefix}{one.name}", one
        if isinstance(one.type, type) and is_dataclass(one.type):
            yield from _fields_in(one.type, f"{prefix}{one.name}.")


def kind(section: Any) -> str:
    """Return the option's name that a typed section came from, e.g. `galore`.

    Raises:
        KeyError: the section is of a type that no group offers.
    """
    for options in SCHEMAS.values():
        for name, schema in options.items():
            if type(section) is schema:
                return name
    raise KeyError(type(section).__name__)


def local_path(path: str) -> Path:
    """Return where a path lies that is not on the hub; whether something does is another matter."""
    if path == EMBEDDED:
        return Path(__file__).with_name("tiny")
    return Path(path).expanduser()


def slug(text: str) -> str:
    """Return `text` as one safe folder name of at most 120 characters.

    A cut name ends in a hash of the whole, so that two long names stay apart. Secrets are left out.
    """
    plain = re.sub("[\"']", "", mask(text))
    safe = re.sub(r"[^A-Za-z0-9=.,+_-]+", "-", plain).strip("-.") or "run"
    if len(safe) <= 120:
        return safe
    return f"{safe[:107]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


# `resume=auto`: go on with the run in hydra.run.dir, or begin it
AUTO = "auto"


def run_folder(resume: str | None, fresh: str) -> str:
    """Return the folder a run writes to: the one it resumes, or a fresh one."""
    if resume is not None and resume != AUTO:
        return resume
    return "/".join(slug(part) for part in fresh.split("/"))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` up to `limit`; at least 1."""
    return max((one for one in range(1, limit + 1) if number % one == 0), default=1)


def prompt_limit(usual: int, max_length: int) -> int:
    """Return the longest prompt's length: the usual one, or half of a `max_length` not above it."""
    return usual if usual < max_length else max_length // 2


def register() -> None:
    """Make the schemas and our resolvers known to Hydra. Calling it twice does no harm."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for group, options in SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("half", lambda length: length // 2, replace=True)
    OmegaConf.register_new_resolver("prompt_limit", prompt_limit, replace=True)
    OmegaConf.register_new_resolver("divisor", largest_divisor, replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)


def load(composed: DictConfig) -> Config:
    """Check a composed configuration and return it as dataclasses.

    Raises:
        UserError: a key that no dataclass has, a value out of its range, a missing value, or
            choices that do not fit together; the message names the key to change.
    """
    try:
        unknown = sorted(_unknown_keys(composed, ""))
        _check(not unknown, f"unknown key{'s' * (len(unknown) > 1)}: {', '.join(unknown)}")
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
    """Yield the keys that `+key=value` added beside a node's dataclass fields."""
    schema = OmegaConf.get_type(node)
    if schema is None or not is_dataclass(schema):
        return
    known = {one.name for one in fields(schema)}
    for key in map(str, node):
        if key not in known:
            yield f"{prefix}{key}"
        elif not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            yield from _unknown_keys(node[key], f"{prefix}{key}.")
