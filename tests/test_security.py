"""Foreign files run nothing, names stay in their folder, and secrets are found nowhere.

Every file here is a real one that does what an attacker's would: it leaves a marker where it is
loaded.
"""

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_lab import config, model
from orpo_lab.data import sources
from orpo_lab.errors import UserError
from tests.conftest import ROOT
from tests.test_guard import Bomb
from tests.test_launch import refused

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
    with pytest.raises(UserError, match="no weights in safetensors; a .bin file is a pickle"):
        model.load_config(loaded.model)
    # Nor where the first look is passed, as it is by a model of the hub
    (folder / "other.safetensors").touch()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_weights(loaded)
    assert not marker.exists()


def load_weights(loaded: config.Config) -> Any:
    tokenizer = model.load_tokenizer(loaded.model, model.load_config(loaded.model))
    return model.load(loaded, tokenizer, torch.float32)


def test_an_adapter_in_a_pickle_is_not_read(load: Load, folder: Path, marker: Path) -> None:
    torch.save({"weight": Bomb(marker)}, folder / "adapter_model.bin")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="cannot be loaded"):
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
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_foreign_pickle_is_refused_even_if_its_seal_fits(
    launch: Launch, tmp_path: Path, marker: Path, name: str
) -> None:
    arguments = (*SHORT, "tracker=none", "train.save_steps=1", "hydra.run.dir=run")
    launch(*arguments)
    for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        torch.save({"state": Bomb(marker)}, path / name)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
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
        model.load_config(load("model=local", f"model.path={with_code}").model)
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
        model.load_tokenizer(loaded, model.load_config(loaded))
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
    )
    assert marker.exists()
    loud = f"WHATEVER CODE COMES WITH {with_code} IS RUN"
    assert loud in done.stdout
    assert loud in (tmp_path / "run" / "run.log").read_text()
    assert (
        "Code that comes with it was run." in (tmp_path / "run" / "final" / "README.md").read_text()
    )
