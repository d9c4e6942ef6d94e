"""What people type stays as it was typed, and errors name the key that was meant."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from orpo_lab import config
from orpo_lab.config.command_line import FOLDERS, as_typed, did_you_mean
from orpo_lab.config.folder import CONF
from orpo_lab.config.other_names import ALSO_CALLED, BATCH
from orpo_lab.errors import UserError
from tests.conftest import compose_config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.revision=1.10", "1.10"),
        ("model.revision=2024_01_15", "2024_01_15"),
        ("model.revision=0x10", "0x10"),
        ("name=1e-4", "1e-4"),
        ("name=true", "true"),
        ("name=null", None),
        ("name='1.10'", "1.10"),
        ("name=it's", "it's"),
        ("name=a=b", "a=b"),
        ("name=a\\\\b=c\\\\", "a\\\\b=c\\\\"),
        ("tracker.tags=[1.10,a,'b,2']", ["1.10", "a", "b,2"]),
        ("tracker.tags=[a]", ["a"]),
        ("beta=1.10", 1.1),
        ("model.path=a b(1)/\u00fc", "a b(1)/\u00fc"),
        ("model.path=multirun/x/0-beta=0.05,seed=1/final", "multirun/x/0-beta=0.05,seed=1/final"),
        ("resume=multirun/x/0-beta=0.05,seed=1", "multirun/x/0-beta=0.05,seed=1"),
        ("model.path=0-a,b", "0-a,b"),
        ("model.path=*", "*"),
        ("model.path='*'", "*"),
        ("model.path=~/x", str(Path("~/x").expanduser())),
    ],
)
def test_text_is_what_was_typed(override: str, value: Any) -> None:
    key = override.partition("=")[0]
    composed = compose_config(override)
    assert OmegaConf.select(composed, key) == value


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("beta=0.1,0.2", "beta=0.1,0.2"),
        ("model.path=a,b", "model.path=a,b"),
        ("model.revision=1.10,2.0", "model.revision='1.10','2.0'"),
        ("model.revision=choice(1.10,b)", "model.revision=choice('1.10',b)"),
        ("tracker.tags=[1.10],[b]", "tracker.tags=['1.10'],[b]"),
        ("dataset.train_path=a=1.jsonl,b.jsonl", "dataset.train_path='a=1.jsonl',b.jsonl"),
        ("seed=range(1,3)", "seed=range(1,3)"),
        ("name=glob(*)", "name=glob(*)"),
        ("model.path=*.pt,b", "model.path=*.pt,b"),
    ],
)
def test_a_list_in_a_sweep_stays_a_list(typed: str, read: str) -> None:
    assert as_typed(["-m", typed]) == ["-m", read]


def test_a_folder_with_a_comma_in_a_sweep_is_one_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0-beta=0.1,seed=1").mkdir()
    typed = ["-m", "model.path=0-beta=0.1,seed=1"]
    assert as_typed(typed) == ["-m", "model.path='0-beta=0.1,seed=1'"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("betta", "beta"),
        ("train.max_step", "train.max_steps"),
        ("max_steps", "train.max_steps"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lora_r", "optimizer.r"),
        ("dataset.maxlength", "dataset.max_length"),
        ("method.cpo_alpha", "method.sft_weight"),
        ("data_seed", "seed"),
    ],
)
def test_the_key_that_was_meant_is_named_in_full(typed: str, meant: str) -> None:
    assert did_you_mean(f"Could not override '{typed}'.") == f". Did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train.per_device_train_batch_size", f"'train.batch_size'? ({BATCH})"),
        ("gradient_accumulation_steps", f"'train.batch_size'? ({BATCH})"),
        ("warmup_ratio", "'train.warmup_steps'? (below 1 it is a fraction of the run)"),
        ("load_in_4bit", "'quantization=nf4'? (optimizer=qlora brings it)"),
    ],
)
def test_a_name_with_another_meaning_is_said_to_have_one(typed: str, said: str) -> None:
    assert did_you_mean(f"Could not override '{typed}'.") == f". Did you mean {said}"


# Of transformers' and TRL's arguments, of axolotl and of LLaMA-Factory
THEIRS = """
    per_device_train_batch_size gradient_accumulation_steps max_length max_prompt_length
    num_train_epochs warmup_ratio lr_scheduler_type logging_steps eval_steps save_steps
    save_total_limit bf16 fp16 load_in_4bit bnb_4bit_quant_type lora_alpha lora_dropout
    target_modules optim galore_rank optim_args report_to run_name output_dir seed dataset_name
    model_name_or_path loss_type beta gradient_checkpointing max_grad_norm weight_decay
    adam_beta1 packing attn_implementation torch_dtype micro_batch_size sequence_len cutoff_len
    pref_beta pref_loss finetuning_type base_model val_set_size lora_r learning_rate
"""


def test_every_common_name_of_other_trainers_is_known() -> None:
    last = {key.rsplit(".", 1)[-1] for key in config.all_fields()}
    assert set(THEIRS.split()) <= ALSO_CALLED.keys() | last


def test_a_key_of_another_option_is_said_to_be_one() -> None:
    said = did_you_mean("Could not override 'optimizer.rank'.")
    assert said == ". optimizer.rank is a key of optimizer=galore"
    said = did_you_mean("Could not override 'dataset.columns.label'.")
    assert said == ". dataset.columns.label is a key of dataset/columns=labelled"


def test_an_option_in_capitals_is_recognised() -> None:
    said = did_you_mean("Could not find 'method/DPO'\nAvailable options:\n\tdpo\n\tsft")
    assert said == ". Did you mean 'dpo'?"


def test_what_others_call_a_key_leads_to_a_key_or_an_option() -> None:
    for name, ours in ALSO_CALLED.items():
        group, _, option = ours.name.partition("=")
        place = CONF / group / f"{option}.yaml"
        is_known = place.exists() if option else ours.name in {*config.all_fields(), *FOLDERS}
        assert is_known, f"{name} leads to {ours.name}, which does not exist"
        assert re.fullmatch(r"[^\n]{0,90}", ours.note)


def test_steps_and_epochs_are_not_asked_for_together() -> None:
    assert as_typed(["train.num_epochs=2"]) == ["train.num_epochs=2", "train.max_steps=null"]
    assert as_typed(["train.max_steps=9"]) == ["train.max_steps=9", "train.num_epochs=null"]
    for both in (["train.max_steps=9", "train.num_epochs=null"], ["train.max_steps=null"]):
        assert as_typed(both) == both


def test_a_group_without_an_option_is_named() -> None:
    with pytest.raises(UserError, match="tracker=null names no option of the group; write tracker"):
        as_typed(["tracker=null"])


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ("[wandb,none]", "none is no tracker beside others; leave it out"),
        ("[mlflow, mlflow]", "mlflow is given twice"),
        ("[null]", "give the names of trackers"),
        ("[wandb,[mlflow]]", "give the names of trackers"),
    ],
)
def test_a_list_of_trackers_that_do_not_go_together_is_refused(trackers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_typed([f"tracker={trackers}"])


def test_a_list_of_trackers_stays_as_it_is() -> None:
    for trackers in ("[]", "[none]", "[wandb,mlflow]", "[wandb],[mlflow,trackio]", "none,[wandb]"):
        assert as_typed([f"tracker={trackers}"]) == [f"tracker={trackers}"]


def test_bytes_that_are_no_text_are_refused_before_a_run() -> None:
    with pytest.raises(UserError, match=r"^hydra.run.dir=\udcfcber holds bytes that are no text"):
        as_typed(["hydra.run.dir=\udcfcber"])


@pytest.mark.parametrize(
    "argument", ["objective=paper", "objective.penalty=log_odds", "+objective=trl"]
)
def test_a_group_by_its_name_of_before_is_told_its_name_of_now(argument: str) -> None:
    with pytest.raises(UserError, match="objective=paper is method=orpo_paper") as refused:
        as_typed(["beta=0.2", argument])
    assert str(refused.value).startswith(f"{argument}: ")
