"""Where a model lies, and how its files are read: every failure in one line."""

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

# What loading somebody's files may end in: files cut short, settings that contradict each other,
# a package that a model needs
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)
# What Git leaves in the place of a file that is stored elsewhere begins like this
LFS_POINTER = b"version https://git-lfs"


def locate(model: Model) -> str:
    """Return the hub name or the folder that holds the model.

    Raises:
        UserError: `model.path` looks like a folder and is none, or the folder holds no model in
            safetensors.
    """
    folder = local_path(model.path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            return str(folder)  # and `load_config` says what to do
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
    """Refuse a place with an adapter: transformers would put it on a base without a word."""
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
    """Call a `from_pretrained` on the model's place; its many exceptions become one clear line."""
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
    """Return the model's own configuration: small, fetched before anything heavy.

    Raises:
        UserError: there is no such model, the hub cannot be reached, the model needs code of its
            own, which is not trusted, or there is an adapter.
    """
    if model.trust_remote_code:
        log.warning(
            "model.trust_remote_code=true: WHATEVER CODE COMES WITH %s IS RUN, with all your "
            "rights",
            model.path,
        )
    _refuse_adapter(model)
    return fetch(AutoConfig.from_pretrained, model)
