"""What identifies a run: the policies beside its keys, and what its data and model hold."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from orpo_lab import config
from orpo_lab.config import identity
from orpo_lab.config.policy import Policy
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from tests.conftest import ROOT

Load = Callable[..., config.Config]
SCHEMAS = [
    config.Config,
    *(schema for group in config.SCHEMAS.values() for schema in group.values()),
]
FILE = ("dataset=file", "dataset.train_path=train.jsonl")


def nested(schema: type) -> Iterator[type]:
    yield schema
    for field in fields(schema):
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from nested(field.type)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_of_every_schema_has_a_policy(schema: type) -> None:
    for key in (field for part in nested(schema) for field in fields(part)):
        policy = key.metadata.get("policy")
        assert isinstance(policy, Policy), f"{schema.__name__}.{key.name}: give it a policy"
        assert set(policy.unread_under) <= set(identity.policies()), key.name


def test_no_checkpoint_fits_another_base_or_another_optimizer() -> None:
    # An optimizer's state is the same whatever its learning rate, decay and Adam's numbers
    fits_all = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
    for key, policy in identity.policies().items():
        group, _, name = key.partition(".")
        is_made_of = group in ("model", "quantization", "optimizer") and name not in fits_all
        if is_made_of and policy.kind in ("setting", "lasting"):
            assert policy.kind == "lasting", key


def test_a_key_means_the_same_in_every_option_of_its_group() -> None:
    for group, options in config.SCHEMAS.items():
        for schema in options.values():
            for key, field in config.fields_of(schema, group).items():
                assert field.metadata["policy"] == identity.policies()[key]


@pytest.mark.parametrize(
    ("overrides", "other"),
    [
        ([], ["beta_end=0.05"]),
        ([], ["tracker=none", "name=other", "train.logging_steps=1", "train.save_steps=1"]),
        (["tracker=wandb"], ["tracker=[mlflow,tensorboard]", "tracker.mlflow.uri=http://a"]),
        ([], ["judge=endpoint", "judge.model=m", "judge.num_prompts=3"]),
        ([], ["dataset.num_proc=2"]),
        ([], ["train.meter_steps=5"]),
        ([], ["model.full_learning_rate=1"]),
        (["optimizer=galore"], ["optimizer=galore", "model.learning_rate=1"]),
        ([], ["train.max_skipped_steps=3"]),
        (["dataset.num_generations=0"], ["dataset.num_generations=0", "dataset.max_new_tokens=7"]),
        (["optimizer=galore_8bit"], ["optimizer=galore", "optimizer.bits=8"]),
        (["method=sft"], ["method=sft", "beta=0.5"]),
        (["method=sft"], ["method=sft", "beta_schedule=linear", "beta_end=0.7"]),
        (
            ["train.lr_scheduler_type=constant"],
            ["train.lr_scheduler_type=constant", "train.warmup_steps=5"],
        ),
    ],
)
def test_what_comes_to_the_same_has_one_identity(
    load: Load, overrides: list[str], other: list[str]
) -> None:
    assert identity.identity(load(*overrides)) == identity.identity(load(*other))


@pytest.mark.parametrize(
    "other",
    [
        ["beta=0.2"],
        ["seed=1"],
        ["beta_schedule=linear"],
        ["train.max_steps=7"],
        ["train.warmup_steps=7"],
        ["train.batch_size=8"],
        ["model.learning_rate=1e-5"],
        ["optimizer=galore"],
        ["dataset.num_train=64"],
        ["dataset.max_new_tokens=7"],
        ["engine=trl"],
        ["model=smollm2_135m"],
        ["model=smollm2_135m", "model.revision=v1"],
        ["dataset=hub", "dataset.path=org/name"],
    ],
)
def test_what_changes_a_result_changes_the_identity(load: Load, other: list[str]) -> None:
    assert identity.identity(load(*other)) != identity.identity(load())


def test_schedules_without_keys_of_their_own_are_told_apart(load: Load) -> None:
    linear, cosine = (load(f"beta_schedule={name}") for name in ("linear", "cosine"))
    assert identity.identity(linear) != identity.identity(cosine)


def test_a_file_is_what_it_holds_wherever_it_lies(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def identity_of(path: str) -> str:
        return identity.identity(load("dataset=file", f"dataset.train_path='{path}'"))

    missing = identity_of("train.jsonl")
    texts = {"train.jsonl": "rows", "moved/x.jsonl": "rows", "b.jsonl": "others", "c.csv": "rows"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    here = identity_of("train.jsonl")
    assert here not in (missing, identity_of("b.jsonl"), identity_of("c.csv"))
    for same in ("./train.jsonl", str(tmp_path / "train.jsonl"), "moved/x.jsonl"):
        assert identity_of(same) == here
    (tmp_path / "train.jsonl").write_text("swor")  # of the same size
    assert identity_of("train.jsonl") != here


def test_what_is_asked_for_is_settings_and_places_whatever_lies_there(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("rows")
    before = [
        function(load(*FILE), "dataset") for function in (identity.name_of, identity.identity)
    ]
    (tmp_path / "train.jsonl").write_text("others")
    after = [function(load(*FILE), "dataset") for function in (identity.name_of, identity.identity)]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    other = load("dataset=file", "dataset.train_path=nowhere.jsonl")
    assert identity.name_of(other, "dataset") != before[0]


def test_a_group_is_its_own_keys_alone(load: Load) -> None:
    loaded, other = load("beta=0.2"), load("beta_schedule=linear", "beta_end=0.1", "seed=7")
    assert identity.identity(other, "beta") == identity.identity(load(), "beta")
    assert identity.identity(loaded, "beta") != identity.identity(load(), "beta")


def test_a_model_is_what_is_read_of_its_folder(load: Load, tmp_path: Path) -> None:
    import numpy as np

    def identity_of(folder: Path) -> str:
        return identity.identity(load("model=local", f"model.path={folder}"))

    base, copy = tmp_path / "base", tmp_path / "copy"
    shutil.copytree(ROOT / "orpo_lab" / "tiny", base)
    shutil.copytree(base, copy)
    before = identity_of(base)
    (copy / "README.md").write_text("another")
    (copy / "checkpoint-1").mkdir()
    (copy / "checkpoint-1" / "state.pt").write_text("not read")
    assert identity_of(copy) == before
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert identity_of(copy) != before
    # Large enough to be sampled; the last weight is another
    weights = np.zeros(2**21, dtype=np.float32)
    for value, folder in ((0.0, base), (1.0, copy)):
        weights[-1] = value
        save_file({"weight": weights}, folder / "model.safetensors")
    assert len({before, identity_of(base), identity_of(copy)}) == 3


def test_a_revision_is_a_name_and_no_folder(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = load("model=hub", "model.path=org/name", "model.revision=main")
    before = identity.identity(asked)
    (tmp_path / "main").mkdir()
    assert identity.identity(asked) == before


def begin(place: RunFolder, loaded: config.Config, **rest: Any) -> None:
    place.begin(loaded, {}, place.check(loaded, [], **{"resume": None, **rest}))
    place.append_metrics(
        1, {"loss": 1.0}
    )  # it has come to a step: there is something to go on with


def test_a_finished_run_is_recognised_by_its_data_and_refused_for_others(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("rows")
    place, loaded = RunFolder(tmp_path / "run"), load(*FILE)
    begin(place, loaded)
    place.set_status("finished", exit_code=0)
    shutil.move("train.jsonl", "moved.jsonl")
    assert place.has_finished(load("dataset=file", "dataset.train_path=moved.jsonl"))
    (tmp_path / "train.jsonl").write_text("others")
    assert not place.has_finished(loaded)
    with pytest.raises(UserError, match=r"finished on something else \(dataset.train_path"):
        begin(place, loaded, resume="auto")
    begin(place, load(*FILE, "accept_changes=true"), resume="auto")


def test_what_a_run_never_reads_may_change_when_it_goes_on(load: Load, tmp_path: Path) -> None:
    place = RunFolder(tmp_path / "run")
    begin(place, load())
    for change in ("model.full_learning_rate=1", "dataset.num_proc=2", "beta_end=0.05"):
        begin(place, load(change), resume="auto")
    assert [start["changes"] for start in place.segments()] == [{}] * 4
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.001 -> 0.5"):
        begin(place, load("model.learning_rate=0.5"), resume="auto")
    with pytest.raises(UserError, match=r"no checkpoint fits another optimizer\.r"):
        begin(place, load("optimizer.r=4", "accept_changes=true"), resume="auto")
    with pytest.raises(UserError, match=r"no checkpoint fits another quantization\b"):
        begin(place, load("quantization=int8", "accept_changes=true"), resume="auto")
