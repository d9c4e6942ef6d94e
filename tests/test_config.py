import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from orpo_lab import config
from orpo_lab.config import command_line
from orpo_lab.config.checks import AUTO
from orpo_lab.config.command_line import as_typed
from orpo_lab.config.dataset import Faults
from orpo_lab.config.method import METHODS
from orpo_lab.config.model import local_path
from orpo_lab.config.quantization import Nf4, Unquantized
from orpo_lab.config.resolvers import fresh_or_resumed, slug
from orpo_lab.config.tracker import BELOW, MlflowTracker, WandbTracker, chosen
from orpo_lab.errors import UserError
from tests.conftest import ROOT, compose_anew, compose_job, ours

CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
# Ours; Hydra's own are in `hydra`
GROUPS = sorted(
    folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"
)
# What an option needs before it can be loaded
NEEDS = {
    "model/hub": ["model.path=org/name"],
    "model/local": ["model.path=folder"],
    "judge/endpoint": ["judge.model=m"],
    "dataset/hub": ["dataset.path=org/name"],
    "dataset/file": ["dataset.train_path=pairs.jsonl"],
    "dataset/jsonl": ["dataset.train_path=pairs.jsonl"],
    "dataset/mixture": ["dataset.sources.math.train_path=pairs.jsonl"],
    **{
        f"dataset/{name}": ["dataset.train_path=rows.jsonl"]
        for name in ("sharegpt", "alpaca", "ranked", "scored", "arena", "helpsteer")
    },
    "dataset/unpaired": ["dataset.train_path=rows.jsonl", "method=kto"],
    "dataset/unpaired_hub": ["dataset.path=org/name", "method=sft"],
    "quantization/none": ["optimizer=lora"],
    "quantization/int8": ["optimizer=qlora"],
}
EXPERIMENTS = [None, *sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))]


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


# Groups whose options `test_every_optimizer_schedule_and_experiment_compose` composes
COMPOSED = ("experiment", "optimizer", "beta_schedule")


def test_several_trackers_have_the_keys_that_each_has_alone(
    load: Callable[..., config.Config],
) -> None:
    mlflow = MlflowTracker(uri="u", experiment=None)
    assert chosen(load("tracker=mlflow", "tracker.mlflow.uri=u").tracker) == [mlflow]
    for order in ("wandb,mlflow", "mlflow,wandb"):
        several = load(f"tracker=[{order}]", "tracker.project=p", "tracker.mlflow.uri=u").tracker
        assert isinstance(several, WandbTracker)
        assert (several.project, several.mode) == ("p", "auto")
        assert chosen(several) == [several, mlflow]
    assert chosen(load("tracker=none").tracker) == []


def test_there_are_files_in_every_group() -> None:
    assert len(FILES) >= 35
    assert all(options(group) for group in GROUPS)
    assert not (CONF / "beta").exists(), "a group `beta` would make beta=0.2 choose an option"


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in GROUPS if group not in COMPOSED for option in options(group)],
)
def test_every_option_loads(load: Callable[..., config.Config], group: str, option: str) -> None:
    load(*NEEDS.get(f"{group}/{option}", []), f"{group}={option}")


# What reads no rows that a checker could be given
OWN_ANSWERS = {
    "embedded": "dataset.checker is a key of dataset=hub or dataset=file",
    "oasst": "dataset.checker is a key of dataset=hub or dataset=file",
    "mixture": ". Of a mixture each source has its own, dataset.sources.NAME.checker",
}


@pytest.mark.parametrize("option", options("dataset"))
def test_a_checker_goes_with_every_dataset_or_is_refused(
    load: Callable[..., config.Config], option: str
) -> None:
    overrides = [*NEEDS.get(f"dataset/{option}", []), f"dataset={option}"]
    asked = "dataset.checker=last_number"
    if option not in OWN_ANSWERS:
        loaded: Any = load(*overrides, asked)
        assert loaded.dataset.checker == "last_number"
        return
    with pytest.raises(command_line.NOT_COMPOSED) as refusal:
        load(*overrides, asked)
    assert OWN_ANSWERS[option] in command_line.explain(refusal.value)


# Pairwise: every two options of different groups stand together, in a fifth of the product
OPTIMIZERS, SCHEDULES = options("optimizer"), options("beta_schedule")
TRIPLES = [
    (experiment, OPTIMIZERS[i % len(OPTIMIZERS)], SCHEDULES[(i + j) % len(SCHEDULES)])
    for j, experiment in enumerate(EXPERIMENTS)
    for i in range(max(len(OPTIMIZERS), len(SCHEDULES)))
]


def test_the_triples_hold_every_pair_of_options() -> None:
    groups = (EXPERIMENTS, OPTIMIZERS, SCHEDULES)
    for index, other in itertools.combinations(range(3), 2):
        pairs = set(itertools.product(groups[index], groups[other]))
        assert {(triple[index], triple[other]) for triple in TRIPLES} == pairs


@pytest.mark.parametrize(("experiment", "optimizer", "schedule"), TRIPLES)
def test_every_optimizer_schedule_and_experiment_compose(
    load: Callable[..., config.Config], experiment: str | None, optimizer: str, schedule: str
) -> None:
    chosen = [f"experiment={experiment}"] if experiment else []
    loaded = load(*chosen, f"optimizer={optimizer}", f"beta_schedule={schedule}")
    assert config.kind(loaded.optimizer) == optimizer.removesuffix("_8bit")
    assert config.kind(loaded.beta_schedule) == schedule


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["beta=0.3", "optimizer=galore", "optimizer.rank=8", "beta=0.4"],
        ["train.batch_size=9", "engine=trl", "train.num_epochs=2", "resume=run"],
        ["experiment=phi2", "+dataset.faults.typo=drop", "name=1.10", "tracker.tags=[1.10,a]"],
        ["dataset=file", "dataset.train_path=a b/c.jsonl", "quantization=int8", "hydra.run.dir=x"],
    ],
    ids=" ".join,
)
def test_what_tests_compose_is_what_hydra_composes(overrides: list[str]) -> None:
    composed, other = compose_job(*overrides), compose_anew(*as_typed(overrides))
    # As text: what stands in it is asked of Hydra, which runs nothing here
    places = [OmegaConf.to_container(each.hydra.run, resolve=False) for each in (composed, other)]
    assert places[0] == places[1]
    assert composed.hydra.runtime.choices == other.hydra.runtime.choices
    assert sorted(composed.hydra.overrides.task) == sorted(other.hydra.overrides.task)
    assert composed.hydra.overrides.hydra == other.hydra.overrides.hydra
    assert ours(composed) == ours(other)


def test_a_galore_run_and_a_qlora_run_differ_by_one_override(
    load: Callable[..., config.Config],
) -> None:
    assert isinstance(load().quantization, Nf4)
    assert isinstance(load("optimizer=galore").quantization, Unquantized)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_yaml_key_has_a_comment(file: Path) -> None:
    lines = file.read_text().splitlines()
    inside_hydra = False
    for above, line in itertools.pairwise(lines):
        if line and not line.startswith((" ", "#")):
            inside_hydra = line.startswith("hydra:")
        key = line.split(":")[0].strip()
        is_key = ":" in line and not line.lstrip().startswith(("#", "-"))
        if is_key and not inside_hydra and key not in (*GROUPS, "defaults", "train"):
            assert above.lstrip().startswith("#"), f"{file.name}: no comment above '{key}'"


def test_every_dataclass_field_has_a_value_in_yaml(load: Callable[..., config.Config]) -> None:
    written = {key for file in FILES for key in _keys(yaml.safe_load(file.read_text()))}
    named = {
        field.name for schema in (config.Config, Faults, *_schemas()) for field in fields(schema)
    }
    assert named - set(GROUPS) - set(BELOW) - {"train", "faults"} <= written


def _schemas() -> list[type]:
    return [schema for group in config.SCHEMAS.values() for schema in group.values()]


def _keys(tree: Any) -> set[str]:
    if not isinstance(tree, dict):
        return set()
    return set(tree) | {key for value in tree.values() for key in _keys(value)}


GALORE_TORCH = "optimizer.implementation=galore_torch"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["beta=-1"], "beta=-1"),
        (["beta=nan"], "beta=nan"),
        (["beta=inf"], "beta=inf"),
        (["beta_end=-0.1"], "beta_end"),
        (["+betta=0.2"], "unknown key: betta"),
        (["+optimizer.rank=4"], "unknown key: optimizer.rank"),
        (["+dataset.columns={prompt: a}"], "unknown key: dataset.columns"),
        (["optimizer=galore", "quantization=nf4"], "trains every weight"),
        (["optimizer=adamw", "quantization=int8"], "trains every weight"),
        (["optimizer=qlora", "quantization=none"], "quantized base"),
        (["optimizer=lora", "quantization=nf4"], "base unquantized"),
        (["dataset.max_prompt_length=96"], "must be below"),
        (["train.max_steps=null"], "exactly one of"),
        (["train.num_epochs=1", "train.max_steps=3"], "exactly one of"),
        (["engine=trl", "method=orpo_paper"], "engine=trl can only compute method=orpo"),
        (["engine=trl", "method=dpo"], "engine=trl can only compute method=orpo"),
        (["method=ipo", "beta=0"], "beta=0.0 must be at least 1e-06 with method=ipo"),
        (["method=ipo", "beta_schedule=linear", "beta_end=0"], "beta_end=0.0 must be at least"),
        (["method.penalty=log_odds", "method.log_odds_scale=2"], "method.log_odds_scale is inside"),
        (["engine=trl", "engine.micro_batch_size=5"], "multiple of engine.micro_batch_size"),
        (["engine.tokens_per_microbatch=191"], "tokens_per_microbatch=191 must be at least 192"),
        (["train.warmup_steps=1.5"], "train.warmup_steps"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate"),
        (["optimizer.dropout=1"], "optimizer.dropout"),
        (["optimizer=galore", "optimizer.bits=16"], "must be 8 or 32"),
        (["optimizer=galore", "optimizer.rank=0"], "optimizer.rank=0"),
        (["optimizer=galore", "optimizer.refresh=svd"], "must be one of exact, randomized, warm"),
        (["optimizer=galore_8bit", GALORE_TORCH], "max_unorm=100 and skip_zeros=True"),
        (["optimizer=galore", GALORE_TORCH, "optimizer.layerwise=true"], "layerwise=true is not"),
        (["optimizer=galore", GALORE_TORCH, "optimizer.refresh=warm"], "refresh=warm is not in"),
        (["beta_schedule=step", "beta_schedule.milestones=[0.7,0.5]"], "must rise"),
        (["beta_schedule=hold_then_anneal", "beta_schedule.anneal_fraction=0"], "anneal_fraction"),
        (["dataset.faults.duplicate=ignore"], "must be one of refuse, drop, keep"),
        (["dataset.faults.wrong_type=keep"], "faults.wrong_type=keep must be one of refuse, drop"),
        (["+dataset.faults.typo=drop"], "unknown key: dataset.faults.typo"),
        (["dataset=hub", "dataset.path=a/b", "dataset.transcripts=true"], "columns.prompt=null"),
        (
            [*NEEDS["dataset/unpaired"], "dataset=unpaired", "dataset.transcripts=true"],
            "and these rows hold none; leave it false",
        ),
        (
            [*NEEDS["dataset/scored"], "dataset=scored", "dataset.columns.pairing=some"],
            "dataset.columns.pairing=some must be one of best_worst, adjacent, all, margin",
        ),
        (
            [*NEEDS["dataset/scored"], "dataset=scored", "dataset.columns.least_difference=0"],
            "dataset.columns.least_difference=0.0 must be above 0",
        ),
        (
            [*NEEDS["dataset/scored"], "dataset=scored", "dataset.columns.prompt=null"],
            "rows with several answers need a column with a prompt",
        ),
        (
            [*NEEDS["dataset/arena"], "dataset=arena", "dataset.columns.ties=[Model_a]"],
            "name model_a 2 times; a value means one thing",
        ),
        (["method=dpo", "beta=0"], "beta=0: method=dpo learns nothing at a beta of 0"),
        (["method=cpo", "beta=0", "method.sft_weight=0"], "method=cpo learns nothing"),
        (["method=simpo", "beta=0", "beta_schedule=linear"], "beta=0 and beta_end=0: method=simpo"),
        (
            ["method=kto", "method.desirable_weight=0", "method.undesirable_weight=0"],
            "are both 0, so nothing would be learned",
        ),
        (["dataset=oasst", "dataset.pairing=some"], "must be one of best_worst, adjacent, all"),
        (["dataset=oasst", "dataset.max_depth=0"], "dataset.max_depth=0 must be at least 1"),
        (["model.dtype=bfloat16"], "must be one of bf16"),
        (["model=hub"], "model.path has no value"),
        (["seed=4294967296"], "seed=4294967296 must be below 2**32"),
        (["~seed"], "~seed: no key can be taken away; give it a value, seed=..."),
        (["~optimizer.r=8"], "~optimizer.r=8: no key can be taken away"),
        (["~tracker"], "~tracker: no key can be taken away"),
        (["seed=${nowhere}"], "seed: Interpolation key 'nowhere' not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_one_line(
    load: Callable[..., config.Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        load(*overrides)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.lr_scheduler_type=cosin", "cosine"),
        ("train.gradient_checkpointing=flase", "false"),
        ("dataset.overlong=cut-prompt", "cut_prompt"),
        ("dataset.faults.duplicate=dorp", "drop"),
        ("model.dtype=BFLOAT16", "bf16"),
        ("method.penalty=logodds", "log_odds"),
        ("tracker.mode=off-line", "offline"),
    ],
)
def test_the_value_that_was_meant_is_named(
    load: Callable[..., config.Config], override: str, meant: str
) -> None:
    with pytest.raises(UserError, match=rf"must be one of .*\. Did you mean '{meant}'\?$"):
        load(override)


def test_no_value_is_named_where_none_is_close(load: Callable[..., config.Config]) -> None:
    with pytest.raises(UserError, match=r"must be one of drop, cut_prompt, cut_completion$"):
        load("dataset.overlong=keep")


INF, NAN = float("inf"), float("nan")
# Of every range its ends, and what lies beyond: group, overrides, key, fine values, refused ones
RANGES: list[tuple[str, list[str], str, list[Any], list[Any]]] = [
    ("", [], "seed", [0, 2**32 - 1], [-1, 2**32]),
    ("", [], "beta", [0.0], [-0.1, INF, NAN]),
    ("", [], "beta_end", [0.0], [-0.1, INF, NAN]),
    ("optimizer", ["optimizer=adamw"], "learning_rate", [0.0, 1e36], [-1e-9, 2e36, NAN]),
    ("optimizer", ["optimizer=lora"], "weight_decay", [0.0, 2.0], [-0.1, NAN]),
    ("optimizer", ["optimizer=galore"], "weight_decay", [0.0], [-0.1]),
    ("optimizer", ["optimizer=adamw"], "adam_beta1", [0.0, 0.999], [-0.1, 1.0]),
    ("optimizer", ["optimizer=adamw"], "adam_beta2", [0.0, 0.999], [-0.1, 1.0]),
    ("optimizer", ["optimizer=adamw"], "adam_epsilon", [1e-30], [0.0]),
    ("optimizer", ["optimizer=lora"], "r", [1], [0]),
    ("optimizer", ["optimizer=lora"], "alpha", [0.1], [0.0]),
    ("optimizer", ["optimizer=lora"], "dropout", [0.0, 0.99], [-0.1, 1.0]),
    ("optimizer", ["optimizer=galore"], "scale", [0.1], [0.0]),
    ("optimizer", ["optimizer=galore"], "rank", [None, 1], [0]),
    (
        "beta_schedule",
        ["beta_schedule=step"],
        "milestones",
        [[0.5], [0.25, 0.75]],
        [[], [0.5, 0.5], [0.75, 0.5], [0.0, 0.5], [0.5, 1.0]],
    ),
    (
        "beta_schedule",
        ["beta_schedule=hold_then_anneal"],
        "anneal_fraction",
        [0.1, 1.0],
        [0.0, 1.1, NAN],
    ),
    ("beta_schedule", ["beta_schedule=adaptive"], "alpha", [1e-3, 9.0], [0.0, -1.0, INF, NAN]),
    ("beta_schedule", ["beta_schedule=adaptive"], "momentum", [0.0, 0.99], [-0.1, 1.0, NAN]),
    ("beta_schedule", ["beta_schedule=adaptive"], "max_change", [0.01, 0.99], [0.0, 1.0, NAN]),
    ("", ["beta_schedule=adaptive"], "beta", [1e-6], [0.0]),
    ("", ["beta_schedule=adaptive", "method=sft"], "beta", [0.0], [-0.1]),
    ("", ["method=ipo"], "beta", [1e-6], [1e-7, 0.0]),
    ("", ["method=ipo", "beta_schedule=adaptive"], "beta", [1.1e-5], [9e-6, 0.0]),
    ("", ["method=ipo", "beta_schedule=cosine", "beta_end=1"], "beta_end", [1e-6], [0.0]),
    ("", ["method=ipo"], "beta_end", [0.0], [-0.1]),
    ("method", [], "log_odds_scale", [1e-3, 50.0], [0.0, -1.0, NAN]),
    ("method", ["method=dpo"], "label_smoothing", [0.0, 0.49], [-0.1, 0.5, NAN]),
    ("method", ["method=cpo"], "label_smoothing", [0.0, 0.49], [-0.1, 0.5, NAN]),
    ("method", ["method=cpo"], "sft_weight", [0.0, 2.0], [-0.1, NAN]),
    ("method", ["method=simpo"], "sft_weight", [0.0, 2.0], [-0.1, NAN]),
    ("method", ["method=simpo"], "gamma", [0.0, 3.0], [-0.1, NAN]),
    ("dataset", ["dataset.max_length=96"], "max_prompt_length", [1, 95], [0, 96]),
    ("train", [], "logging_steps", [1], [0]),
    ("train", [], "max_steps", [1], [0, None]),
    ("train", ["train.num_epochs=1"], "num_epochs", [0.1, 3.0], [0.0, INF, NAN, None]),
    ("train", [], "warmup_steps", [0.0, 0.5, 1.0, 2.0], [-1.0, 1.5]),
    ("train", [], "max_hours", [None, 1e-3], [0.0, INF, NAN]),
    ("train", [], "max_grad_norm", [0.0], [-1.0, NAN]),
]


@pytest.mark.parametrize(
    ("group", "overrides", "key", "fine", "refused"),
    RANGES,
    ids=[f"{key} {' '.join(overrides)}".strip() for _, overrides, key, _, _ in RANGES],
)
def test_every_range_ends_where_it_says(
    load: Callable[..., config.Config],
    group: str,
    overrides: list[str],
    key: str,
    fine: list[Any],
    refused: list[Any],
) -> None:
    loaded = load(*overrides)
    section: Any = getattr(loaded, group) if group else loaded
    for value in fine:
        assert getattr(replace(section, **{key: value}), key) == value
    for value in refused:
        with pytest.raises(ValueError, match=key):
            replace(section, **{key: value})


def test_an_optimizer_of_adapters_is_told_from_the_other(
    load: Callable[..., config.Config],
) -> None:
    for name in ("lora", "qlora", "galore", "adamw"):
        assert config.kind(load(f"optimizer={name}").optimizer) == name


def test_paths_and_folders_are_where_they_are_said_to_be() -> None:
    assert local_path("~/x") == Path.home() / "x"
    assert local_path("here/x") == Path("here/x")
    for resume in (None, AUTO):
        assert fresh_or_resumed(resume, "outputs/a b") == "outputs/a-b"
    assert fresh_or_resumed("my run", "outputs/a") == "my run"


def test_the_folder_of_a_run_names_its_method_and_the_beta_that_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for overrides, end in (
        (["method=dpo", "beta=0.3"], "-tiny-dpo-qlora-beta0.3-constant"),
        (["method=sft", "beta=0.3"], "-tiny-sft-qlora"),
    ):
        composed = compose_job(*overrides)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", composed)
        assert composed.hydra.run.dir.endswith(end)


def test_annealing_keys_are_ignored_by_constant(load: Callable[..., config.Config]) -> None:
    assert load("beta_end=0.05").beta_end == 0.05


def test_slugs_are_safe_and_stay_apart() -> None:
    assert slug("0-dataset.path=org/name,beta=0.1") == "0-dataset.path=org-name,beta=0.1"
    assert slug("../..") == "run"
    long = [slug("x" * 300 + end) for end in "ab"]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 120
    assert slug("name=hf_" + "aB3" * 11) == "name="


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["train.num_epochs=2"], "train.max_steps", None),
        (["experiment=phi2", "train.max_steps=5"], "train.num_epochs", None),
        (["dataset=file", "dataset.train_path=a.jsonl"], "dataset.max_prompt_length", 512),
        (
            ["dataset=file", "dataset.train_path=a.jsonl", "dataset.max_length=256"],
            "dataset.max_prompt_length",
            128,
        ),
        (["dataset.max_length=128"], "dataset.max_prompt_length", 64),
        (["dataset.max_length=64"], "dataset.max_prompt_length", 32),
        (["experiment=phi2"], "dataset.max_prompt_length", 1024),
        (["experiment=phi2", "dataset.max_length=1024"], "dataset.max_prompt_length", 512),
        (["experiment=mistral_orpo_beta"], "dataset.max_prompt_length", 1791),
        (["engine=trl"], "engine.micro_batch_size", 8),
        (["engine=trl", "train.batch_size=2"], "engine.micro_batch_size", 2),
        (["engine=trl", "train.batch_size=9"], "engine.micro_batch_size", 3),
    ],
)
def test_one_wish_is_one_key(
    load: Callable[..., config.Config], overrides: list[str], key: str, value: int | None
) -> None:
    group, name = key.split(".")
    assert getattr(getattr(load(*overrides), group), name) == value


def test_a_file_and_a_data_set_of_the_hub_are_cut_alike(load: Callable[..., config.Config]) -> None:
    hub, file = (load(*NEEDS[f"dataset/{name}"], f"dataset={name}") for name in ("hub", "file"))
    assert hub.dataset.overlong == file.dataset.overlong


def test_a_method_brings_its_beta_and_its_learning_rate(load: Any) -> None:
    rates = {method: load(f"method={method}").optimizer.learning_rate for method in METHODS}
    assert rates["orpo"] == 1e-3
    assert rates["dpo"] == 1e-4
    assert load("method=dpo", "optimizer=galore").optimizer.learning_rate == 1.5e-5
    assert load("method=dpo", "optimizer.learning_rate=0.5").optimizer.learning_rate == 0.5
    assert [load(f"method={method}").beta for method in ("orpo", "simpo")] == [0.1, 2.0]
    assert load("method=simpo", "beta=3").beta == 3
