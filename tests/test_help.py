"""The help: options, keys, and what they mean."""

import re
from pathlib import Path

import pytest

from orpo_lab.config.folder import CONF
from orpo_lab.config.help import help_text
from orpo_lab.errors import UserError


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


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("optimizer=galor", "optimizer has no option galor.*Did you mean 'galore'"),
        ("lora_r", "there is no key lora_r. Did you mean 'optimizer.r'"),
    ],
)
def test_what_does_not_exist_has_no_help(word: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        said("--help", word)
