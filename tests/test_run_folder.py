import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from orpo_lab import config, data, launch, run, tracker
from orpo_lab.config.identity import identity
from orpo_lab.errors import UserError
from orpo_lab.model import tokenizer, weights
from orpo_lab.records import run_folder
from orpo_lab.records.run_folder import RunFolder, git_commit, natural_order, versions
from orpo_lab.stop import Stop, Stopped
from tests.conftest import compose_job, ours

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


# What lies in a folder when a start in it is refused, or fails before its first step

TWO_STEPS = (
    "optimizer=lora",
    "dataset=file",
    "dataset.train_path=pairs.jsonl",
    "dataset.num_eval=4",
    "dataset.num_generations=2",
    "dataset.max_new_tokens=4",
    "dataset.max_length=128",
    "dataset.max_prompt_length=64",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.logging_steps=1",
    "tracker=none",
)


def start(*overrides: str) -> None:
    """Start a run as launch.py does once Hydra has composed its configuration."""
    composed = compose_job(*overrides)
    HydraConfig.instance().set_config(composed)
    folder = Path(composed.hydra.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    launch.run_job(ours(composed), folder, None)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def write_pairs(file: Path, chosen: str = "good") -> None:
    rows = [
        {"prompt": f"{i}?", "chosen": f" {i} is {chosen}", "rejected": f" {i} is bad"}
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs, and in `run` a finished run that has kept no checkpoint."""
    place = tmp_path_factory.mktemp("finished")
    write_pairs(place / "pairs.jsonl")
    before = Path.cwd()
    os.chdir(place)
    try:
        start(*TWO_STEPS, "hydra.run.dir=run")
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


Patch = pytest.MonkeyPatch
AGAIN = ("hydra.run.dir=run", "resume=auto")
NAMED = ("resume=run",)
# What is started, what happens first, and what is said. Each is over the run that has finished.
REFUSED: list[tuple[tuple[str, ...], Callable[[Patch], object] | None, str]] = [
    (("hydra.run.dir=run",), None, "holds a run already"),
    (("hydra.run.dir=run", "seed=1"), None, "holds a run already"),
    (("hydra.run.dir=run", "train.max_steps=4"), None, "holds a run already"),
    (("hydra.run.dir=", "resume=auto"), None, "hydra.run.dir is empty"),
    (("resume=run", "hydra.run.dir=other"), None, "name two folders"),
    (("resume=auto",), None, "give hydra.run.dir="),
    ((*AGAIN, "beta=0.5"), None, "beta: 0.1 -> 0.5"),
    ((*AGAIN, "beta_schedule=linear"), None, "beta_schedule: constant -> linear"),
    ((*AGAIN, "seed=1"), None, "seed: 42 -> 1"),
    ((*AGAIN, "train.max_steps=4"), None, "train.max_steps: 2 -> 4"),
    ((*AGAIN, "optimizer=adamw", "accept_changes=true"), None, "no checkpoint fits another"),
    ((*AGAIN, "optimizer.r=4", "accept_changes=true"), None, "no checkpoint fits another"),
    ((*AGAIN, "beta=-1"), None, "beta=-1.0 must be"),
    ((*AGAIN, "+betta=1"), None, "unknown key: betta"),
    ((*AGAIN, "quantization=nf4"), None, "optimizer=lora keeps the base unquantized"),
    ((*AGAIN, "train.max_steps=4", "accept_changes=true"), None, "holds the results of a run"),
    ((*AGAIN, "beta=0.5", "accept_changes=true"), None, "holds the results of a run"),
    ((*NAMED, "train.max_steps=4", "accept_changes=true"), None, "no valid checkpoint"),
    ((*NAMED, "beta=0.5"), None, "beta: 0.1 -> 0.5"),
    (AGAIN, lambda _: Path("pairs.jsonl").unlink(), "other contents now"),
    ((*AGAIN, "dataset.train_path=nowhere.jsonl"), None, "other contents now"),
    (
        AGAIN,
        lambda _: write_pairs(Path("pairs.jsonl"), "fine"),
        "other contents now",
    ),
    ((*AGAIN, "model.path=./nowhere"), None, "other contents now"),
    ((*AGAIN, "seed=1"), lambda _: Path("run/segments.json").write_text("[{"), "is damaged"),
    ((*AGAIN, "seed=1"), lambda _: Path("run/config.yaml").write_text("a: [1"), "is damaged"),
    ((*AGAIN, "seed=1"), lambda _: Path("run/segments.json").unlink(), "is missing"),
]
# Another configuration is accepted, so that the start goes as far as it can
GOING = ("hydra.run.dir=run", "resume=auto", "beta=0.5", "accept_changes=true")
FAILING: list[tuple[tuple[str, ...], Callable[[Patch], object], str]] = [
    (GOING, lambda p: p.setattr(data, "load", raising(UserError("no rows"))), "no rows"),
    (GOING, lambda p: p.setattr(weights, "load_model", raising(MemoryError("no room"))), "no room"),
    (
        GOING,
        lambda p: p.setattr(weights, "load_model", raising(RuntimeError("CUDA out of memory"))),
        "CUDA out of memory",
    ),
    (
        (*GOING, "tracker=wandb"),
        lambda p: p.setattr(tracker, "start", raising(UserError("no such project"))),
        "no such project",
    ),
    (
        GOING,
        lambda p: p.setattr(
            tokenizer, "load_tokenizer", raising(OSError(28, "No space left", "/dev/shm/cache"))
        ),
        "/dev/shm/cache cannot be",
    ),
    (
        GOING,
        lambda p: p.setattr(tokenizer, "check_context", raising(UserError("too long"))),
        "long",
    ),
    (
        GOING,
        lambda p: p.setattr(tokenizer, "check_ids", raising(UserError("no such id"))),
        "such id",
    ),
]


@pytest.mark.parametrize(("overrides", "happen", "said"), REFUSED)
def test_a_refused_start_leaves_a_finished_run_as_it_was(
    here: Path,
    monkeypatch: Patch,
    overrides: tuple[str, ...],
    happen: Callable[[Patch], object] | None,
    said: str,
) -> None:
    if happen:
        happen(monkeypatch)
    before = hashes(here / "run")
    assert {"final/adapter_model.safetensors", "summary.json", "run.log"} <= before.keys()
    with pytest.raises(UserError, match=said):
        start(*TWO_STEPS, *overrides)
    assert hashes(here / "run") == before


@pytest.mark.parametrize(("overrides", "happen", "said"), FAILING)
def test_a_start_that_fails_before_its_first_step_leaves_a_finished_run_as_it_was(
    here: Path,
    monkeypatch: Patch,
    overrides: tuple[str, ...],
    happen: Callable[[Patch], object],
    said: str,
) -> None:
    happen(monkeypatch)
    # A model of the last step, to go on from
    from orpo_lab import run
    from orpo_lab.training import checkpoint

    path = here / "run" / "checkpoints" / "checkpoint-2"
    found = checkpoint.Checkpoint(path, checkpoint.Made("", "", ""), checkpoint.Spent(), {})
    monkeypatch.setattr(run, "_find_start", lambda *_: found)
    monkeypatch.setattr(run, "_check_made", lambda *_, **__: None)
    monkeypatch.setattr(run, "_check_steps_left", lambda *_: None)
    before = hashes(here / "run")
    with pytest.raises(Exception, match=said):
        start(*TWO_STEPS, *overrides)
    assert hashes(here / "run") == before


@pytest.mark.parametrize("overrides", [(), ("resume=auto",), ("dataset.train_path=nowhere",)])
@pytest.mark.parametrize("name", ["final/thesis.tex", "config.yaml", "status.json", ".lock"])
def test_a_folder_with_a_users_files_is_refused_and_left_as_it_is(
    here: Path, name: str, overrides: tuple[str, ...]
) -> None:
    mine = here / "mine"
    (mine / name).parent.mkdir(parents=True)
    (mine / name).write_text('{"state": "of mine"}')
    before = hashes(mine)
    with pytest.raises(UserError, match="is not empty and holds no run"):
        start(*TWO_STEPS, "hydra.run.dir=mine", *overrides)
    assert hashes(mine) == before


def test_the_same_start_again_has_nothing_to_do(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(here / "run")
    start(*TWO_STEPS, *AGAIN)
    assert "finished already" in capsys.readouterr().out
    assert hashes(here / "run") == before


def test_a_folder_of_a_failed_start_may_be_used_again(here: Path) -> None:
    with pytest.raises(UserError):
        start(*TWO_STEPS, "dataset.train_path=nowhere.jsonl", "hydra.run.dir=new")
    assert RunFolder(here / "new").status()["state"] == "failed"
    start(*TWO_STEPS, "hydra.run.dir=new")
    assert RunFolder(here / "new").is_complete()
    assert len(RunFolder(here / "new").segments()) == 1


def test_a_run_is_not_gone_on_with_by_other_code_unless_told(
    here: Path, monkeypatch: Patch, load: Load
) -> None:
    place = RunFolder(here / "run")
    place.set_status("stopped")
    loaded = load(*TWO_STEPS)
    before = place.segments()[-1]["code"]
    monkeypatch.setattr(run_folder, "code_hash", lambda: "other")
    with pytest.raises(UserError, match=r"made by other code .* accept_changes=true"):
        place.check(loaded, [], resume="auto")
    accepted = place.check(load(*TWO_STEPS, "accept_changes=true"), [], resume="auto")
    assert accepted["changes"] == {"code": [before, "other"]}
    assert accepted["started"] == place.segments()[0]["started"]


def test_a_version_that_cannot_be_told_is_none(monkeypatch: Patch) -> None:
    monkeypatch.setattr(run_folder, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] is None


def test_a_commit_is_of_the_repository_that_holds_the_lab(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    ours = git_commit()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / ".gitignore").write_text("lab/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "unrelated"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert git_commit() == ours
    lab = tmp_path / "lab" / "orpo_lab" / "records" / "run_folder.py"
    lab.parent.mkdir(parents=True)
    lab.touch()
    monkeypatch.setattr(run_folder, "__file__", str(lab))
    assert git_commit() is None


def test_a_commit_is_the_one_that_pip_has_installed(tmp_path: Path, monkeypatch: Patch) -> None:
    noted = tmp_path / "orpo_lab-0.1.0.dist-info"
    noted.mkdir()
    (noted / "METADATA").write_text("Name: orpo-lab\nVersion: 0.1.0\n")
    origin = {"url": "file:///clone", "vcs_info": {"vcs": "git", "commit_id": "ab" * 20}}
    (noted / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    for lab, commit in (("orpo_lab", "ab" * 20), ("copy/orpo_lab", None)):
        file = tmp_path / lab / "records" / "run_folder.py"
        file.parent.mkdir(parents=True)
        monkeypatch.setattr(run_folder, "__file__", str(file))
        assert git_commit() == commit
    (noted / "direct_url.json").unlink()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "orpo_lab/records/run_folder.py"))
    assert git_commit() is None


@pytest.mark.parametrize("made_here", [True, False])
def test_results_beside_a_lost_status_are_kept_for_the_run_that_they_name(
    tmp_path: Path, made_here: bool
) -> None:
    place = RunFolder(tmp_path)
    place.write_json("segments.json", [{"config_hash": "ours"}])
    place.write_json("summary.json", {"config_hash": "ours" if made_here else "another"})
    place.set_status("running", config_hash="ours")
    if made_here:
        place._check_results()
    else:
        with pytest.raises(UserError, match=r"summary.json is not of the run"):
            place._check_results()


TOKEN = "hf_" + "aB3" * 11


def begin(place: RunFolder, loaded: config.Config, **options: Any) -> dict[str, Any]:
    """Put a start on record, as a run does before its first step, and take that step."""
    on_record = place.check(loaded, [f"name={TOKEN}"], **options)
    place.begin(loaded, {"beta_schedule": "linear"}, on_record)
    place.append_metrics(1, {"loss": 0.5})
    return on_record


def test_no_secret_is_on_record(load: Load, tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    begin(place, load(f"name={TOKEN}"), resume=None)
    place.write_json("summary.json", {"said": f"it ends in {TOKEN}"})
    for name in ("config.yaml", "choices.yaml", "segments.json", "summary.json"):
        assert "***" in (tmp_path / name).read_text()
        assert TOKEN not in (tmp_path / name).read_text()


def test_every_start_of_a_run_is_on_record_and_the_first_says_when(
    load: Load, tmp_path: Path
) -> None:
    place = RunFolder(tmp_path)
    first = begin(place, load("beta=0.1"), resume=None, started="2026-01-01")
    accepted = load("beta=0.2", "accept_changes=true")
    second = begin(place, accepted, resume="auto", started="2026-02-02")
    assert place.segments() == [first, second]
    assert second["started"] == place.started() == "2026-01-01"
    assert second["changes"] == {"beta": [0.1, 0.2]}
    assert place.config_hashes() == {first["config_hash"], second["config_hash"]}
    assert len(place.config_hashes()) == 2


def test_a_signal_right_behind_the_first_record_is_on_record(
    load: Load, tmp_path: Path, monkeypatch: Patch
) -> None:
    place, loaded = RunFolder(tmp_path), load()
    on_record = place.check(loaded, [], resume=None)
    set_status = RunFolder.set_status

    def interrupted(self: RunFolder, state: str, *rest: Any, **more: Any) -> None:
        set_status(self, state, *rest, **more)
        if state == "running":
            raise Stopped("SIGTERM")

    monkeypatch.setattr(RunFolder, "set_status", interrupted)
    with pytest.raises(Stopped), run._status_kept(place, Stop()):
        place.begin(loaded, {}, on_record)
    assert (place.status()["state"], place.status()["reason"]) == ("stopped", "SIGTERM")


def test_a_signal_while_a_failure_is_recorded_does_not_break_the_record_off(
    load: Load, tmp_path: Path, monkeypatch: Patch
) -> None:
    place, loaded, stop = RunFolder(tmp_path), load(), Stop()
    on_record = place.check(loaded, [], resume=None)
    write_json = RunFolder.write_json

    def interrupted(self: RunFolder, name: str, value: Any) -> None:
        if value.get("state") == "failed":
            os.kill(os.getpid(), signal.SIGTERM)
        write_json(self, name, value)

    def fail() -> None:
        place.begin(loaded, {}, on_record)
        monkeypatch.setattr(RunFolder, "write_json", interrupted)
        raise RuntimeError("Connection closed by peer")

    # As torchrun does, when another process of the run was lost
    with pytest.raises(RuntimeError), stop.listening(), run._status_kept(place, stop):
        fail()
    assert place.status()["state"] == "failed"
    assert "Connection closed by peer" in place.status()["reason"]


def test_what_lasts_may_not_change_and_a_key_that_is_new_is_a_change(
    load: Load, tmp_path: Path
) -> None:
    place = RunFolder(tmp_path)
    begin(place, load("optimizer=lora"), resume=None)
    other = load("optimizer=lora", "optimizer.r=3", "accept_changes=true")
    with pytest.raises(UserError, match=r"no checkpoint fits another optimizer\.r"):
        place.check(other, [], resume="auto")
    older = place.read_yaml("config.yaml")
    del older["optimizer"]["weight_decay"]
    place.write("config.yaml", yaml.safe_dump(older))
    accepted = load("optimizer=lora", "accept_changes=true")
    assert place.check(accepted, [], resume="auto")["changes"] == {
        "optimizer.weight_decay": [None, accepted.optimizer.weight_decay]
    }


def test_a_finished_run_on_other_data_is_another(load: Load, tmp_path: Path) -> None:
    place, pairs = RunFolder(tmp_path / "run"), tmp_path / "pairs.jsonl"
    pairs.write_text("some pairs")
    loaded = load("dataset=file", f"dataset.train_path={pairs}")
    begin(place, loaded, resume=None)
    place.set_status("finished")
    place.check(loaded, [], resume="auto")
    pairs.write_text("other pairs, and more")
    with pytest.raises(UserError, match=r"finished on something else \(dataset\.train_path"):
        place.check(loaded, [], resume="auto")


def test_a_run_that_begins_anew_has_no_metrics_of_before(load: Load, tmp_path: Path) -> None:
    place, loaded = RunFolder(tmp_path), load()
    on_record = begin(place, loaded, resume=None)
    place.append_metrics(2, {"loss": 0.25})
    assert [line["step"] for line in place.metrics()] == [1, 2]
    place.begin(loaded, {}, on_record)
    assert place.metrics() == []


def test_a_run_has_finished_where_it_is_this_run_and_nothing_is_missing(
    load: Load, tmp_path: Path
) -> None:
    place, loaded = RunFolder(tmp_path), load()
    place.set_status("finished", config_hash=identity(loaded))
    assert place.has_finished(loaded)
    place.set_status("finished")
    assert place.has_finished(loaded)
    place.set_status("finished", missing={"samples.md": "no words"})
    assert not place.is_complete()
    place.set_status("finished", config_hash="another")
    assert not place.has_finished(loaded)


def test_checkpoints_are_a_sign_of_training_and_empty_folders_are_none(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert place.is_untrained()
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir()
    assert not place.is_untrained()


def test_a_folder_holds_one_process(tmp_path: Path) -> None:
    with RunFolder(tmp_path).held() as first, RunFolder(tmp_path).held() as second:
        assert (first, second) == (True, False)


def test_jobs_stand_in_the_order_of_their_numbers_and_hydras_groups_are_not_ours() -> None:
    in_order = [Path(name) for name in ("run", "9-beta=1", "10-beta=1")]
    assert sorted(in_order, key=natural_order) == in_order
    chosen = {"model": "tiny", "hydra/launcher": "basic"}
    assert run_folder.groups(chosen) == {"model": "tiny"}


def test_the_codes_hash_is_of_every_room(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("records/run_folder.py", "engine/head.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("code")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "records" / "run_folder.py"))
    before = run_folder.code_hash()
    (tmp_path / "engine" / "head.py").write_text("other code")
    assert run_folder.code_hash() != before
