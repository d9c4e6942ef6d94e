"""The command line, in processes of its own."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from orpo_lab import config, program
from orpo_lab import launch as command
from orpo_lab.compare.evidence import compare
from orpo_lab.compare.read import read_run
from orpo_lab.compare.ship import choose
from orpo_lab.errors import UserError
from orpo_lab.metrics import MARGINS
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.sweep.folder import Sweep
from orpo_lab.sweep.jobs import Jobs
from tests.conftest import ROOT, break_import_of_wandb
from tests.test_run_folder import start

Launch = Callable[..., subprocess.CompletedProcess[str]]
# One thread: processes that run side by side otherwise wait for each other
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_help_and_a_typo_answer_before_torch_would_be_imported() -> None:
    """In CPU time, whatever the machine; where torch takes 1.3 s that is within a second."""
    torch = min(cpu_seconds("-c", "import torch") for _ in range(2))
    for argument in ("--help", "betta=0.2"):
        answer = min(cpu_seconds(str(ROOT / "launch.py"), argument) for _ in range(2))
        assert answer < 0.75 * torch, argument


def test_help_of_an_option_is_asked_for_beside_it(launch: Launch) -> None:
    assert "  optimizer.rank: null\n" in launch("optimizer=galore", "--help").stdout
    said = launch("--help", "optimizer=galor", expect=1).stderr
    assert said.startswith("error: optimizer has no option galor; there are: adamw, galore, ")


def test_what_reads_the_help_may_go_away(tmp_path: Path) -> None:
    line = f"{sys.executable} {ROOT / 'launch.py'} --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# A run of two steps
TWO_STEPS = (
    "train.max_steps=2",
    "train.batch_size=4",
    "dataset.num_train=16",
    "dataset.num_eval=4",
    "dataset.num_generations=1",
    "dataset.max_new_tokens=4",
    "tracker=none",
)


@pytest.mark.slow
def test_a_run_needs_no_wandb_no_error_stream_and_no_unicode(tmp_path: Path) -> None:
    """In a new interpreter, since imports and streams are what is tested."""
    break_import_of_wandb(tmp_path / "broken")
    command = f"{sys.executable} {ROOT / 'launch.py'} -m {' '.join(TWO_STEPS)}"
    variables = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    done = subprocess.run(
        ["bash", "-c", f"{command} hydra.sweep.dir=\u00fcber 2>&-"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "job 1 of 1: \\xfcber/0" in done.stdout
    assert re.search(r"\| preference_accuracy +\|", done.stdout)
    place = RunFolder(tmp_path / "\u00fcber" / "0")
    assert place.is_complete()
    assert not place.file("wandb").exists()
    assert (tmp_path / "\u00fcber" / "report.html").exists()


@pytest.mark.parametrize("flag", ["--hydra-help", "--info=plugins", "--version"])
def test_hydras_own_flags_work(launch: Launch, flag: str) -> None:
    assert "ydra" in launch(flag).stdout


def test_a_sweep_may_go_over_all_options_that_a_pattern_names(launch: Launch) -> None:
    done = launch("-m", "beta_schedule=glob(c*)", "beta=-1", expect=1)
    assert done.stderr.count("error: beta=-1.0") == 2
    assert re.findall(r"job \d of 2: \S+beta_schedule=(\w+)", done.stdout) == ["constant", "cosine"]


@pytest.mark.parametrize("path", ["'*'", "*"])
def test_a_path_may_be_a_pattern_and_is_no_list(launch: Launch, path: str) -> None:
    for flags in ([], ["-m"]):
        line = refused(launch(*flags, "model=local", f"model.path={path}", expect=1))
        assert "model.path=* is neither a folder nor a hub name" in line


@pytest.mark.parametrize("flags", [["beta=-1", "-m", "seed=1,2"], ["beta=-1", "seed=1,2", "-m"]])
def test_a_flag_may_stand_anywhere(launch: Launch, flags: list[str]) -> None:
    assert launch(*flags, expect=1).stderr.count("error: beta=-1.0") == 2


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return a refusal's one line."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["betta=0.2"], "Could not override 'betta'. .* Did you mean 'beta'?"),
        (["+betta=0.2"], "unknown key: betta"),
        (["beta=abc"], "beta=abc .* could not be converted to Float"),
        (["beta=-1"], "beta=-1.0 must be a number of at least 0"),
        (["beta=nan"], "beta=nan must be a number of at least 0"),
        (["optimizer=galor"], "'optimizer/galor' .* adamw galore .* Did you mean 'galore'?"),
        (["optimizer=galore", "quantization=nf4"], "quantized weights cannot be trained"),
        (["experiment=null"], "experiment=null names no option of the group; leave it out"),
        (["tracker=null"], "tracker=null names no option of the group; write tracker=none"),
        (["tracker=[wandb,mlfow]"], "Could not load 'tracker/mlfow'.* Did you mean 'mlflow'?"),
        (["tracker.mlflow.uri=a"], "tracker.mlflow.uri is a key of tracker=mlflow; choose this"),
        (["model=hub"], "model.path has no value"),
        (["--betta=0.2"], "--betta=0.2 is no flag; --hydra-help lists those there are"),
        (["hydra.run.dir=/proc/nowhere"], "/proc/nowhere.* choose another folder"),
        (["hydra.run.dir=/proc/self"], "/proc/self is not empty and holds no run of this lab"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_ends_in_one_line(
    launch: Launch, tmp_path: Path, overrides: list[str], message: str
) -> None:
    line = refused(launch(*overrides, expect=1))
    assert re.search(message.replace("?", r"\?"), line), line
    assert not list(tmp_path.glob("outputs/*")), "a run that never began leaves nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "rows.jsonl cannot be read"),
        ("", "rows.jsonl holds no rows"),
        ('{"prompt": "a", "chosen": "b"}\n', "line 1: lacks column 'rejected'"),
        (GOOD + "null\n", "line 2: holds null"),
        (GOOD + "7\n", "line 2: holds 7"),
        (GOOD + '{"prompt": "a", "chosen": "b", "rejected": null}\n', "line 2: rejected is null"),
        (GOOD + '{"prompt": "a", "chosen": 7, "rejected": "c"}\n', "line 2: chosen is of type int"),
    ],
    ids=["missing", "empty", "lacks rejected", "null row", "int row", "null value", "int value"],
)
def test_a_bad_dataset_is_refused_and_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        start(
            "dataset=jsonl",
            "dataset.train_path=rows.jsonl",
            "dataset.eval_path=rows.jsonl",
            "dataset.max_length=128",
            "dataset.max_prompt_length=64",
            "tracker=none",
            "hydra.run.dir=run",
        )
    assert "\n" not in str(refusal.value)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert message in status["reason"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=local", "model.path=."], "not a model folder: no config.json"),
        (["model=local", "model.path=./nowhere"], "neither a folder nor a hub name"),
        (["model=mistral_7b"], "mistralai/Mistral-7B-v0.1 cannot be loaded"),
        ([*TWO_STEPS, "optimizer=galore", "optimizer.rank=128"], "there is nothing to project"),
        (["dataset.max_length=300"], "above the model's context of 256"),
        (["dataset.num_eval=100000"], "dataset.num_eval=100000 is more than"),
        ([*TWO_STEPS, "train.batch_size=17"], "train.batch_size=17 is above the 16 training pairs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        start("tracker=none", *overrides, "hydra.run.dir=run")
    assert "\n" not in str(refusal.value)
    assert not RunFolder(Path("run")).metrics()


def test_what_cannot_be_run_ends_in_one_line(launch: Launch) -> None:
    message = "above the model's context of 256"
    assert message in refused(launch("tracker=none", "dataset.max_length=300", expect=1))


# The hub's client asks again for most of a minute; what follows is tried on a hub that is offline
@pytest.mark.slow
@pytest.mark.long
def test_an_unreachable_hub_is_one_line_with_and_without_offline_mode(launch: Launch) -> None:
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    arguments = ("model=hub", "model.path=org/name", "tracker=none")
    line = refused(launch(*arguments, env=online, expect=1, fresh=True))
    assert "org/name cannot be loaded" in line


@pytest.mark.slow
def test_a_sweep_leaves_a_folder_and_a_wandb_run_for_every_job(
    launch: Launch, tmp_path: Path
) -> None:
    done = launch(
        "-m",
        "beta=0.05,0.2",
        "beta_schedule=constant,hold_then_anneal",
        "train.max_steps=5",
        "dataset.num_eval=16",
        "dataset.num_generations=4",
        "train.logging_steps=1",
    )
    assert not re.search("[\r\x1b]", done.stdout + done.stderr), "a file is no terminal"
    folders = sorted(path.parent for path in (tmp_path / "multirun").glob("*/*/config.yaml"))
    assert len(folders) == 4
    seen = set()
    for folder in folders:
        for name in (
            "config.yaml",
            "choices.yaml",
            "metrics.jsonl",
            "summary.json",
            "samples.md",
            "samples.json",
            "data_report.json",
            "plots/training.png",
            "final/adapter_model.safetensors",
            "final/README.md",
            "run.log",
        ):
            assert (folder / name).stat().st_size > 0, name
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        (run,) = (folder / "wandb").glob("offline-run-*")
        inspected = subprocess.run(
            ["wandb", "leet", "inspect", "--summary", str(next(run.glob("run-*.wandb")))],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": _path()},
            check=True,
        ).stdout
        beta = yaml.safe_load((folder / "config.yaml").read_text())["beta"]
        schedule = yaml.safe_load((folder / "choices.yaml").read_text())["choices"]["beta_schedule"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert lines[0]["beta"] == beta
        assert (lines[-1]["beta"] == beta) == (schedule == "constant")
        assert re.search(rf"beta\W+{lines[-1]['beta']:g}\b", inspected), inspected
        seen.add((beta, schedule, run.name))
    assert len(seen) == 4


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_a_failed_job_of_a_sweep_is_named_and_the_exit_code_is_not_zero(
    launch: Launch, tmp_path: Path
) -> None:
    done = launch("-m", "beta=-1,-2", expect=1)
    assert "error: beta=-1.0" in done.stderr
    assert "error: beta=-2.0" in done.stderr


def test_combinations_that_do_not_fit_fail_and_the_others_run(
    launch: Launch, tmp_path: Path
) -> None:
    token = "name=hf_" + "aB3" * 11
    done = launch("-m", "optimizer=qlora,galore", "optimizer.r=8,16", "beta=-1", token, expect=1)
    assert (
        len(re.findall("error: optimizer=galore optimizer.r=.*no|error: .*'r' not in", done.stderr))
        == 2
    )
    assert done.stderr.count("error: beta=-1.0") == 2
    assert "job 2 of 2" in done.stdout
    assert "2 of 2 jobs ended after" in done.stdout
    (saved,) = tmp_path.rglob("multirun.yaml")
    assert "name=***" in saved.read_text()
    assert token not in saved.read_text()


def test_a_number_in_a_recipe_where_text_belongs_is_refused(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\nmodel:\n  revision: 1.10\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(recipe)
    line = refused(launch("--config-dir", "own", "experiment=mine", expect=1))
    assert "model.revision is text, and 1.1 without quotes" in line


@pytest.mark.slow
def test_the_command_that_repeats_a_run_names_the_options_of_ones_own(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\nbeta: 0.37\ntrain:\n  max_steps: 2\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(recipe)
    small = ("dataset.num_eval=8", "dataset.num_generations=0", "hydra.run.dir=run")
    launch("--config-dir", "own", "experiment=mine", *small)
    found = read_run(tmp_path / "run")
    _, _, *given = shlex.split(choose(compare([found], MARGINS)).repeat)
    assert given[0] == f"--config-dir={tmp_path / 'own'}"
    assert yaml.safe_load(launch(*given, "--cfg", "job").stdout)["beta"] == 0.37


def test_a_sweep_that_left_jobs_out_has_failed() -> None:
    jobs = Jobs()
    jobs.count([OmegaConf.create()], [])
    assert jobs.close() == 0
    jobs.count([OmegaConf.create()], ["optimizer=galore optimizer.r=8"])
    assert jobs.close() == 1


def test_what_is_left_of_a_sweep_is_told_by_the_jobs_that_have_not_begun() -> None:
    jobs = Jobs(num=5, seconds=[10.0, 20.0])
    assert jobs.progress(2) == "2 of 5 jobs ended after 0:00:30, about 0:00:45 left"


ARGUMENTS = ["beta=0.2", "resume=auto", "hydra.run.dir=old", "model.path=a b"]


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("finished", 0, "report      {compare} run"),
        ("stopped", 75, "to go on  {train} beta=0.2 'model.path=a b' {again}"),
        ("failed", 1, "put that right, then  {train} beta=0.2 'model.path=a b' {again}"),
        ("finished", 1, ""),
    ],
)
def test_the_end_of_a_run_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = RunFolder(Path("run"))
    place.path.mkdir()
    place.set_status(state, exit_code=code)
    words = {
        "compare": program.command("compare"),
        "train": program.command("train"),
        "again": "hydra.run.dir=run resume=auto",
    }
    assert Jobs(place=place).next_step(ARGUMENTS, code) == said.format(**words)


def test_the_end_of_a_sweep_says_how_to_go_on_and_of_nothing_says_nothing(tmp_path: Path) -> None:
    jobs = Jobs(sweep=Sweep(tmp_path))
    given = ["-m", "seed=1,2", "hydra.sweep.dir=old"]
    assert jobs.next_step(given, 75).endswith(f" -m seed=1,2 hydra.sweep.dir={tmp_path}")
    assert jobs.next_step(given, 0) == "", "its report is named already"
    assert Jobs(sweep=Sweep(tmp_path / "gone")).next_step(given, 1) == ""
    assert Jobs().next_step(["--cfg", "job"], 0) == ""


@pytest.mark.parametrize(("given", "name"), [(None, "now-2"), ("now", None)])
def test_of_two_runs_in_a_second_one_gets_a_folder_beside_unless_it_has_chosen(
    load: Callable[..., config.Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    name: str | None,
) -> None:
    monkeypatch.setattr(command, "_given_folder", lambda: given)
    folder = tmp_path / "now"
    with RunFolder(folder).held() as is_free:
        assert is_free
        if name is None:
            with pytest.raises(UserError, match="another process is running"):
                command._alone(load(), folder).__enter__()
        else:
            with command._alone(load(), folder) as place:
                assert place is not None
                assert place.path.name == name


def test_of_a_folder_given_twice_the_last_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = SimpleNamespace(hydra=["hydra.run.dir=a", "hydra.verbose=x", "hydra.run.dir='b c'"])
    given = SimpleNamespace(overrides=overrides)
    monkeypatch.setattr(HydraConfig, "get", lambda: given)
    assert command._given_folder() == "b c"
