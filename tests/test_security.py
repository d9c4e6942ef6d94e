"""Foreign files run nothing, names stay in their folder, and secrets are found nowhere.

Every file here is a real one that does what an attacker's would: it leaves a marker where it is
loaded.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_lab import config
from orpo_lab.data import sources
from orpo_lab.errors import UserError
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.training import checkpoint
from orpo_lab.training.files import hash_of
from tests.conftest import ROOT
from tests.test_guard import Bomb
from tests.test_launch import _path, refused
from tests.test_redaction import TOKENS
from tests.wandb_server import WandbServer

Launch = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., config.Config]
SHORT = (
    "train.max_steps=2",
    "train.batch_size=4",
    "dataset.num_train=32",
    "dataset.num_eval=8",
    "dataset.num_generations=2",
    "dataset.max_new_tokens=4",
)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder: the embedded one's files."""
    place = tmp_path / "model"
    place.mkdir()
    for file in (ROOT / "orpo_lab" / "tiny").iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(file, place)
    return place


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("is_archive", [True, False], ids=["torch.save", "pickle.dump"])
def test_weights_in_a_pickle_are_not_read(
    load: Load, folder: Path, marker: Path, name: str, is_archive: bool
) -> None:
    (folder / "model.safetensors").unlink()
    shards = folder / "pytorch_model.bin"
    if is_archive:
        torch.save({"weight": Bomb(marker)}, shards)
    else:
        shards.write_bytes(pickle.dumps(Bomb(marker)))
    if name.endswith("json"):
        shards.rename(folder / "part.bin")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.bin"}}
        (folder / name).write_text(json.dumps(index))
    loaded = load("model=local", f"model.path={folder}")
    with pytest.raises(UserError, match=r"no weights in safetensors; a \.bin file is a pickle"):
        load_config(loaded.model)
    # Nor where the first look is passed, as it is by a model of the hub
    (folder / "other.safetensors").touch()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_weights(loaded)
    assert not marker.exists()


def load_weights(loaded: config.Config) -> Any:
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    return load_model(loaded, tokenizer, torch.float32)


def test_an_adapter_in_a_pickle_is_not_read(load: Load, folder: Path, marker: Path) -> None:
    torch.save({"weight": Bomb(marker)}, folder / "adapter_model.bin")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="holds an adapter"):
        load_weights(load("model=local", f"model.path={folder}"))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pickle", "data.pt", "data.npy", "data.tar"])
def test_data_in_a_pickle_is_not_read(load: Load, tmp_path: Path, marker: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    content = pickle.dumps(Bomb(marker))
    if name.endswith("tar"):
        with tarfile.open(folder / name, "w") as archive:
            for member in ("0.pkl", "0.pickle", "0.pth", "0.pyd", "../../0.txt"):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError):
        sources.read(load("model=tiny", "dataset=hub", f"dataset.path={folder}").dataset)
    assert not marker.exists()


def test_a_datasets_own_script_is_not_run(load: Load, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        sources.read(load("dataset=hub", f"dataset.path={folder}").dataset)
    assert not marker.exists()


@pytest.mark.slow
def test_a_checkpoint_with_a_foreign_pickle_is_refused_even_if_its_seal_fits(
    launch: Launch, tmp_path: Path, marker: Path
) -> None:
    name = checkpoint.STATE
    arguments = (*SHORT, "tracker=none", "train.save_steps=1", "hydra.run.dir=run")
    launch(*arguments)
    # With all steps taken nothing of these files is read
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        torch.save({"state": Bomb(marker)}, path / name)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = hash_of(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
    edit(tmp_path / "run" / "status.json", state="stopped")
    line = refused(launch("resume=run", *arguments[:-1], expect=1))
    assert "holds more than a checkpoint of ours does" in line
    assert not marker.exists()


# Code that comes with a model

CODE = """
open({marker!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(folder: Path, marker: Path) -> Path:
    """A model folder that cannot be loaded without running its code."""
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=names)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


def test_code_that_comes_with_a_model_is_refused_by_the_keys_name(
    load: Load, with_code: Path, marker: Path
) -> None:
    with pytest.raises(UserError, match=r"code of its own.*model\.trust_remote_code=true"):
        load_config(load("model=local", f"model.path={with_code}").model)
    assert not marker.exists()


def test_code_that_comes_with_a_tokenizer_is_refused_by_the_keys_name(
    load: Load, folder: Path, marker: Path
) -> None:
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": [None, "own.Own"]},
    )
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    loaded = load("model=local", f"model.path={folder}").model
    with pytest.raises(UserError, match=r"code of its own.*model\.trust_remote_code=true"):
        load_tokenizer(loaded, load_config(loaded))
    assert not marker.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(
    load: Load, folder: Path, marker: Path
) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    for file in (folder / "own.py", folder / "custom_generate" / "generate.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(CODE.format(marker=str(marker)))
    load_weights(load("model=local", f"model.path={folder}"))
    assert not marker.exists()


@pytest.mark.slow
def test_trusted_code_is_run_and_said_loudly(
    launch: Launch, tmp_path: Path, with_code: Path, marker: Path
) -> None:
    done = launch(
        "model=local",
        f"model.path={with_code}",
        "model.trust_remote_code=true",
        "optimizer=lora",
        *SHORT,
        "tracker=none",
        "hydra.run.dir=run",
        env={"HF_MODULES_CACHE": str(tmp_path / "modules")},
        fresh=True,
    )
    assert marker.exists()
    loud = f"WHATEVER CODE COMES WITH {with_code} IS RUN"
    assert loud in done.stdout
    assert loud in (tmp_path / "run" / "run.log").read_text()
    assert (
        "Code that comes with it was run." in (tmp_path / "run" / "final" / "README.md").read_text()
    )


# Secrets

PLANTED = {
    **TOKENS,
    # What only its name says
    "WANDB_API_KEY": "q1w2e3r4t5" * 4,
    "HF_TOKEN": "huggingfacetokenofnoshape",
    "STORE_PASSWORD": "correct horse battery staple",
    "in an address": "mypassword1",
    "in a key=value": "shapelesssecret",
}
ENVIRONMENT = {name: PLANTED[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "STORE_PASSWORD")}
# One stands in the data, which are nobody's to change
IN_DATA = "hf_" + "Data" * 8
OWN_ROWS = (
    "dataset=jsonl",
    "dataset.train_path=rows.jsonl",
    "dataset.eval_path=rows.jsonl",
    "dataset.faults.leaked_prompt=keep",
    "dataset.max_length=250",
    "dataset.max_prompt_length=150",
)


HUB = ("dataset=hub", "dataset.max_length=250", "dataset.max_prompt_length=120")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    row = {"prompt": f"say {IN_DATA}", "chosen": "yes", "rejected": "no"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | {"chosen": f"yes {n}"}) + "\n" for n in range(32)))
    return file


def found_in(places: dict[str, bytes]) -> list[str]:
    """Return which planted secrets stand where, as they are or escaped."""
    found = []
    for place, content in places.items():
        for kind, secret in PLANTED.items():
            forms = {secret, secret.replace(" ", "%20"), secret.replace(" ", "-")}
            if any(form.encode() in content for form in forms):
                found.append(f"{kind} in {place}")
    return found


def everything(folder: Path, *said: str) -> dict[str, bytes]:
    """Return the bytes of every file, the names of all, and what was said."""
    paths = sorted(folder.rglob("*"))
    places = {str(path): path.read_bytes() for path in paths if path.is_file()}
    places |= {f"the name {path}": str(path).encode() for path in paths}
    return places | {f"said {number}": text.encode() for number, text in enumerate(said)}


def wandb_says(folder: Path) -> list[str]:
    """Return what W&B's own command line reads in the runs of a folder."""
    return [
        subprocess.run(
            ["wandb", "leet", "inspect", "--json", str(file)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": _path()},
        ).stdout
        for file in sorted(folder.rglob("run-*.wandb"))
        if not file.is_symlink()
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("rows")
def test_a_sweep_leaves_no_secret_in_any_file_or_line(launch: Launch, tmp_path: Path) -> None:
    done = launch(
        "-m",
        "beta=0.1,0.2",
        # Swept, they would be folder names
        f"tracker.tags=[a,{TOKENS['W&B']}],[{TOKENS['W&B of old']}]",
        f"name={TOKENS['Hugging Face']},{TOKENS['JWT']}",
        f"tracker.group={TOKENS['GitHub']}",
        f"tracker.project={TOKENS['OpenAI']}",
        f"tracker.entity={TOKENS['Slack']}",
        "tracker.summary_run=true",
        *SHORT,
        *OWN_ROWS,
        "hydra.sweep.dir=sweep",
        env=ENVIRONMENT,
    )
    sweep = tmp_path / "sweep"
    finished = [path.parent for path in sweep.glob("*/summary.json")]
    assert len(finished) == 2
    told = wandb_says(sweep)
    assert len(told) == 3
    assert not found_in(everything(sweep, done.stdout, done.stderr, *told))
    for name in ("multirun.yaml", "report.html", "sweep.json"):
        assert (sweep / name).stat().st_size > 0
    # What is trained on is shown as it is
    assert IN_DATA in (finished[0] / "samples.md").read_text()
    assert all("***" in text for text in told)


@pytest.mark.slow
@pytest.mark.usefixtures("rows")
def test_an_online_run_sends_no_secret(launch: Launch, tmp_path: Path) -> None:
    server = WandbServer()
    try:
        done = launch(
            f"tracker.tags=[{TOKENS['W&B']},{TOKENS['AWS']}]",
            "name='${oc.env:STORE_PASSWORD}'",
            f"tracker.group='password={PLANTED['in a key=value']}'",
            *SHORT,
            *OWN_ROWS,
            "hydra.run.dir=run",
            env={**ENVIRONMENT, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"},
        )
    finally:
        server.die()
    (arrived,) = server.runs.values()
    assert arrived["history"]
    assert arrived["upserts"][0]["displayName"] == "***"
    assert arrived["upserts"][0]["groupName"] == "password=***"
    sent = b"\n".join(server.received)
    places = everything(tmp_path / "run", done.stdout, done.stderr)
    assert not found_in({**places, "what was sent": sent})
    assert (tmp_path / "run" / "final" / "README.md").read_text().count("# ***\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [f"betta={TOKENS['Google']}"],
        [f"beta={TOKENS['Google']}"],
        [f"+{TOKENS['GitLab']}=1"],
        [f"optimizer={TOKENS['GitLab']}"],
        ["beta=-1", f"name={TOKENS['GitLab']}"],
        *(
            pytest.param(started, marks=pytest.mark.slow)
            for started in (
                [*HUB, "dataset.path=https://me:mypassword1@127.0.0.1:9/x"],
                [*OWN_ROWS, f"dataset.train_path=x/{TOKENS['AWS']}"],
                ["model=hub", f"model.path=org/{TOKENS['Hugging Face']}"],
            )
        ),
    ],
    ids=lambda value: value[-1].split("=")[0],
)
def test_a_run_that_fails_says_no_secret(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    done = launch(*arguments, "tracker=none", expect=1, env=ENVIRONMENT)
    assert refused(done)
    assert not found_in(everything(tmp_path, done.stdout, done.stderr))


# Names


@pytest.mark.slow
def test_names_do_not_leave_their_folder(launch: Launch, tmp_path: Path) -> None:
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    out = "../../../escaped"
    launch(
        f"name={out}",
        f"tracker.group={out}",
        f"tracker.tags=[{out}]",
        *SHORT,
        f"hydra.run.dir={work}/run",
    )
    launch("-m", f"name={out}-1,{out}-2", *SHORT, f"hydra.sweep.dir={work}/sweep")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in work.iterdir()) == ["run", "sweep"]
    assert len(list((work / "sweep").glob("*/config.yaml"))) == 1, "one run, whatever its name"
