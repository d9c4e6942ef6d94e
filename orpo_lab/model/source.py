"""Find a model's files and read them; every failure becomes an error of one line."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import find_adapter_config_file

from orpo_lab.config.model import Model, local_path
from orpo_lab.errors import UserError, one_line

log = logging.getLogger(__name__)

# Exceptions of loading a model: because files are cut short, settings contradict each other, or a
# package is missing that the model needs
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)
# The beginning of a pointer file, which git-lfs leaves in place of a file that is stored elsewhere
LFS_POINTER = b"version https://git-lfs"


def locate(model: Model) -> str:
    """Return the hub name or the folder that holds the model.

    Raises:
        UserError: `model.path` is neither a folder nor a hub name, or the folder holds no model in
            safetensors.
    """
    folder = local_path(model.path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            return str(folder)  # `load_config` refuses it and says what to do
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={model.path} is not a model folder: no config.json in it")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"model.path={model.path} has no weights in safetensors; a .bin file is a pickle, "
                "which may run anything, and is not read: convert it where you trust it"
            )
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(
                        f"{file} is a pointer of git-lfs, not the weights: run git lfs pull there"
                    )
        return str(folder)
    if model.path.count("/") != 1 or model.path.startswith((".", "~", "/")):
        raise UserError(
            f"model.path={model.path} is neither a folder nor a hub name of the form org/name"
        )
    return model.path


def _refuse_adapter(model: Model) -> None:
    """Refuse a folder or hub name with an adapter.

    transformers would put the adapter on its base without saying so.

    Raises:
        UserError: there is an adapter.
    """
    file = find_adapter_config_file(locate(model), revision=model.revision)
    if file is None:
        return
    try:
        base = json.loads(Path(file).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise UserError(
        f"model.path={model.path} holds an adapter of {base or 'some base'}, not a model alone; to "
        "go on from the adapter, merge it into its base (peft's merge_and_unload) and save that in "
        "a folder; to begin from the base, give the base in a folder without adapter_config.json"
    )


def fetch(load: Any, model: Model, **options: Any) -> Any:
    """Call a `from_pretrained` function on the model's folder or hub name; return its result.

    Raises:
        UserError: the model cannot be loaded, or needs code of its own that is not trusted.
        OutOfMemoryError: the GPU has not enough memory.
    """
    place = locate(model)
    try:
        return load(
            place,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path={model.path} comes with code of its own, which is not run; take a "
                "model that transformers knows, or read that code and say "
                "model.trust_remote_code=true"
            ) from error
        remedy = "check that its files are whole and belong together"
        if not Path(place).is_dir():
            remedy = (
                "check the name, model.revision and the connection to the hub, or give a local "
                "folder"
            )
        raise UserError(
            f"model.path={model.path} cannot be loaded ({one_line(error)[:300]}); {remedy}"
        ) from error


def load_config(model: Model) -> PretrainedConfig:
    """Return the model's own configuration; it is small, and loaded before anything large.

    Raises:
        UserError: there is no such model, the hub cannot be reached, the model needs code of its
            own that is not trusted, or there is an adapter.
    """
    if model.trust_remote_code:
        log.warning(
            "model.trust_remote_code=true: WHATEVER CODE COMES WITH %s IS RUN, with all your "
            "rights",
            model.path,
        )
    _refuse_adapter(model)
    return fetch(AutoConfig.from_pretrained, model)
