"""The help: options, keys, and what they mean."""

import re
from pathlib import Path

import pytest

from orpo_lab.config.command_line import as_typed
from orpo_lab.config.folder import CONF
from orpo_lab.config.help import help_text
from orpo_lab.errors import UserError
from tests.conftest import compose_anew


def said(*arguments: str) -> str:
    return help_text(arguments)


def test_all_options_are_listed_with_what_they_are() -> None:
    text = said("--help")
    for file in CONF.rglob("*.yaml"):
        if file.parent != CONF:
            assert f"  {file.stem} " in text
    assert "\n\ndataset/columns\n" in text
    assert "  galore_8bit        GaLore with 8-bit moments.\n" in text


def test_options_of_a_folder_of_ones_own_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# My recipe.\n")
    text = said("--help", "--config-dir", str(tmp_path))
    assert re.search(r"^  mine +My recipe\.$", text, flags=re.MULTILINE)
    assert "  mistral_qlora " in text
    only = said("--help", "experiment", "--config-dir", str(tmp_path))
    assert "  mine " in only
    assert "  qlora " not in only


def test_an_option_shows_its_keys_with_their_meaning() -> None:
    text = said("optimizer=galore_8bit", "--help")
    assert text.startswith("optimizer=galore_8bit: GaLore with 8-bit moments.\n")
    assert "  optimizer.bits: 8\n      Bits of the moments: 32 or 8" in text
    assert text.count("optimizer.bits") == 1, "the option's own value replaces galore's"
    assert "  optimizer.scale: 0.25\n" in text, "what galore_8bit takes from galore"


def test_an_option_shows_the_keys_of_the_options_inside_it() -> None:
    text = said("--help", "dataset=hub")
    assert "  dataset.columns.chosen: chosen\n" in text
    assert "  dataset.faults.empty_prompt: drop\n" in text
    assert "defaults" not in text


def test_keys_are_explained_by_name_or_by_what_they_stand_in() -> None:
    assert said("--help", "train.max_steps") == (
        "  train.max_steps: 120\n      Length in optimizer steps; null: num_epochs decides"
    )
    assert "  train.batch_size: 16\n" in said("--help", "train")
    assert "  optimizer.rank: null\n" in said("--help", "optimizer.rank")


def options() -> list[str]:
    files = [file.relative_to(CONF) for file in CONF.rglob("*.yaml") if file.parent != CONF]
    return sorted(f"{file.parent.as_posix()}={file.stem}" for file in files)


def quoted(value: str) -> str:
    return f"'{value}'" if "${" in value else value


@pytest.mark.parametrize("option", options())
def test_every_key_of_an_option_can_be_given_with_it(option: str) -> None:
    keys = re.findall(r"^  (\S+): (.*)$", said("--help", option), flags=re.MULTILINE)
    # Hydra takes a text with braces or parentheses in quotes only; in quotes a list is none
    plain = {key: "[]" if value.startswith("[") else value for key, value in keys}
    given = [f"{key}={quoted(value)}" for key, value in plain.items()]
    dataset = ["dataset=unpaired" if option.endswith("=labelled") else "dataset=file"]
    compose_anew(*(dataset if option.startswith("dataset/") else []), option, *as_typed(given))


def test_the_keys_of_a_tracker_stand_below_its_name() -> None:
    assert "  tracker.mlflow.uri: null\n" in said("--help", "tracker=mlflow")
    assert said("--help", "tracker.mlflow.uri").startswith("  tracker.mlflow.uri: null\n")
    text = said("--help", "tracker=[wandb, mlflow]")
    assert text.startswith("tracker=wandb: ")
    assert "\n\ntracker=mlflow: " in text
    assert "  tracker.entity: null\n" in text
    assert "tracker.project" not in said("--help", "tracker=trackio")


def write(folder: Path, name: str, content: bytes) -> Path:
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("content", [b"a: [\n", b"# \xff\n", b"- a\n", b"defaults: galore\n"])
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_shown(
    tmp_path: Path, content: bytes
) -> None:
    bad = write(tmp_path, "optimizer/bad", content)
    write(tmp_path, "optimizer/good", b"# Good.\n")
    for words in ([], ["optimizer"], ["optimizer.rank"]):
        text = said("--help", "--config-dir", str(tmp_path), *words)
        assert f"(not read: {bad} cannot be read: " in text
        assert ("Good." in text) == (words != ["optimizer.rank"])
        assert ("galore" in text) or ("  optimizer.rank: null" in text)
    with pytest.raises(UserError, match=re.escape(str(bad))) as refused:
        said("--help", "--config-dir", str(tmp_path), "optimizer=bad")
    assert "\n" not in str(refused.value)


def test_a_folder_that_does_not_exist_has_no_help() -> None:
    with pytest.raises(UserError, match="--config-dir=nowhere: there is no such folder"):
        said("--help", "--config-dir", "nowhere")


def test_a_recipe_shows_the_options_that_it_chooses(tmp_path: Path) -> None:
    recipe = b"""# @package _global_
# Mine.
defaults:
  - override /optimizer: galore
  - override /tracker: [wandb, mlflow]
  - _self_
beta: 0.2
"""
    write(tmp_path, "experiment/mine", recipe)
    text = said("--help", "--config-dir", str(tmp_path), "experiment=mine")
    assert "  optimizer: galore\n      " in text
    assert "  tracker: [wandb,mlflow]\n" in text
    assert text.endswith("  beta: 0.2")


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("tracker=[wandb,mlfow]", "tracker has no option mlfow.*Did you mean 'mlflow'"),
        ("optimizer=galor", "optimizer has no option galor.*Did you mean 'galore'"),
        ("lora_r", "there is no key lora_r. Did you mean 'optimizer.r'"),
    ],
)
def test_what_does_not_exist_has_no_help(word: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        said("--help", word)
