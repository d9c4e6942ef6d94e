import shutil
from collections.abc import Callable
from pathlib import Path

from orpo_lab import config
from orpo_lab.run_folder import RunFolder, git_commit, versions

Load = Callable[..., config.Config]


def test_metrics_are_appended_and_cut_back_to_a_checkpoint(load: Load, tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    for step in (1, 2):
        place.append_metrics(step, {"loss": 1 / step})
    kept = shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl")
    place.append_metrics(3, {"loss": 1 / 3})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "lo')  # killed here
    start = {"config_hash": "one", "overrides": []}
    place.begin(load(), {}, start, metrics=Path(kept))
    place.append_metrics(3, {"loss": 9.0})
    assert [line["step"] for line in place.metrics()] == [1, 2, 3]
    assert place.metrics()[-1]["loss"] == 9.0


def test_versions_name_what_a_result_depends_on() -> None:
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes"} <= versions().keys()
    commit = git_commit()
    assert commit is None or len(commit.split()[0]) == 40
