"""The identity of a run: its settings, and the content of its data and model files in any place.

The policies of the keys in `config` say which keys belong to the identity. This module does not
import torch.
"""

import functools
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orpo_lab.config import SCHEMAS, Config, all_fields, kind, known_key
from orpo_lab.config.dataset import Files, expand
from orpo_lab.config.model import local_path
from orpo_lab.config.optimizer import Lora
from orpo_lab.config.policy import Policy

# How many evenly spaced blocks of a file of weights are read, and their size. To read a model of
# 70B parameters whole takes minutes
NUM_BLOCKS, BLOCK_BYTES = 1024, 4096


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one dictionary, with keys like `train.max_steps`."""
    pairs: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value
    return pairs


@functools.cache
def policies() -> dict[str, Policy]:
    """Return the policy of every key; see `config.all_fields`."""
    return {key: field.metadata["policy"] for key, field in all_fields().items()}


def policy_of(key: str) -> Policy:
    """Return the policy of a key, or of the dictionary that holds the key.

    A key that is not known now counts as a setting.
    """
    known = policies()
    key = known_key(key)
    return known.get(key) or known.get(key.rpartition(".")[0]) or Policy("setting")


def kinds(config: Config) -> dict[str, str]:
    """Return the chosen option of each group that a run's result depends on."""
    return {
        group: kind(getattr(config, group))
        for group in SCHEMAS
        # The keys of a group inside another group tell its options apart
        if "/" not in group and policies()[group].kind != "free"
    }


def values(config: Config) -> dict[str, Any]:
    """Return a flat configuration, together with the chosen option of each group."""
    return flat(asdict(config)) | kinds(config)


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a run's result depends on; locations are left out.

    Args:
        values: what `values` returns. The run may have been made by an earlier version; a key that
            is not known now counts as a setting.
    """
    return {key: value for key, value in values.items() if _is_setting(key, values)}


def told_apart_by(
    values: dict[str, Any],
    contents: dict[str, str],
    fingerprints: dict[str, str] | None,
    start: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what tells a run from runs that differ in more than their seeds.

    Models are told by the content of their files, data by their pairs. A start counts as the
    settings of the run that it is, so that its seed is left out, too.

    Args:
        values: what `values` returns, possibly of an earlier version.
        contents: what `contents` returns.
        fingerprints: those of the run's pairs, by split; None: not known.
        start: what `RunFolder.as_start` returns of the start; None: there is no start, or no record
            of it. Then the start is told by its content.
    """
    told = settings(values)
    told.pop("seed")
    model = [content for key, content in sorted(contents.items()) if key.startswith("model.")]
    begun = start["settings"] if start else contents.get("start_from")
    return told | {"model": model, "dataset": fingerprints, "start_from": begun}


def road(method: str, start: dict[str, Any] | None) -> str:
    """Return the stages by which a run's model is made, such as `sft 3fa1b2 > dpo`.

    The digits stand for all settings of a start without its seed: runs from several seeds of one
    start have one road.

    Args:
        method: the run's own.
        start: see `told_apart_by`.
    """
    stages = [method]
    begun = start and start["settings"]
    while isinstance(begun, dict):
        stages.insert(0, f"{begun.get('method', 'run')} {hash_of(begun)[:6]}")
        begun = begun["start_from"]
    return " > ".join(stages)


def _is_setting(key: str, values: dict[str, Any]) -> bool:
    policy = policy_of(key)
    of_group = policies().get(key.partition(".")[0], policy)
    unread_under = [*policy.unread_under.items(), *of_group.unread_under.items()]
    if any(values.get(other) in _as_tuple(value) for other, value in unread_under):
        return False
    return policy.kind in ("setting", "lasting")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def locations(config: Config) -> dict[str, list[str]]:
    """Return the locations of a run by key, one or several; a local one is an absolute path."""
    given = {
        key: value if isinstance(value, list) else [value]
        for key, value in flat(asdict(config)).items()
        if policy_of(key).kind == "location" and value is not None
    }
    return {
        key: [_absolute(path, policy_of(key)) for path in _expanded(key, values)]
        for key, values in given.items()
    }


def _expanded(key: str, values: list[str]) -> list[str]:
    """Return the files that patterns stand for; only keys of files hold patterns."""
    if all_fields()[known_key(key)].type != Files:
        return values
    return [path for value in values for path in expand(value)]


def _absolute(value: str, policy: Policy) -> str:
    path = local_path(value)
    # Not `path.exists`, which fails for a text as long as a chat template
    return str(path.resolve()) if policy.files and os.path.exists(path) else value


def contents(config: Config) -> dict[str, str]:
    """Return the content at each location of a run: a hash of the files, or a name.

    A name is returned for what is not on this machine, and for what cannot be read.
    """
    found = {}
    for key, places in locations(config).items():
        contents = [_content(place, policy_of(key).files) for place in places]
        found[key] = contents[0] if len(contents) == 1 else hash_of(contents)
    return found


def content_at(key: str, place: str) -> str:
    """Return what is now at the place that a run's record names for a key; see `contents`."""
    policy = policy_of(key)
    return _content(_absolute(place, policy), policy.files)


def _content(place: str, patterns: tuple[str, ...]) -> str:
    path = Path(place)
    if not (patterns and path.is_absolute() and os.path.exists(path)):
        return place
    digest = hashlib.sha256()
    try:
        for name, file in _files(path, patterns):
            digest.update(f"{name}\0{_digest_now(file)}\0".encode())
    except OSError:
        return place  # the code that needs the file reports the error
    return digest.hexdigest()


def _files(path: Path, patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return the files that are read at a path, with their names in it.

    The name of a single file is its last suffix alone. Hidden files of a folder are left out.
    """
    if path.is_file():
        return [(path.suffix, path)]
    found = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    named = sorted((str(file.relative_to(path)), file) for file in found)
    return [(name, file) for name, file in named if "/." not in f"/{name}"]


def _digest_now(file: Path) -> str:
    """Return the hash of a file's present content; an unchanged file is read only once."""
    now = file.stat()
    return _digest(file, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(file: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    with file.open("rb") as content:
        if file.suffix != ".safetensors" or size <= NUM_BLOCKS * BLOCK_BYTES:
            return hashlib.file_digest(content, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(NUM_BLOCKS):
            content.seek(block * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(content.read(BLOCK_BYTES))
        return digest.hexdigest()


def identity(config: Config, *groups: str) -> str:
    """Return a hash of all that a run's result depends on, or only of the keys of some groups."""
    return hash_of([_of(settings(values(config)), groups), _of(contents(config), groups)])


def identity_without_beta(config: Config) -> str:
    """Return a hash of all that a run's result depends on, except beta and its schedule."""
    read = {
        key: value
        for key, value in settings(values(config)).items()
        if key.split(".")[0] not in ("beta", "beta_end", "beta_schedule")
    }
    return hash_of([read, contents(config)])


def name_of(config: Config, *groups: str) -> str:
    """Return a hash of the settings and locations of some groups; contents are not read."""
    return hash_of([_of(settings(values(config)), groups), _of(locations(config), groups)])


def _of(pairs: dict[str, Any], groups: tuple[str, ...]) -> dict[str, Any]:
    if not groups:
        return pairs
    return {key: value for key, value in pairs.items() if key.split(".")[0] in groups}


def hash_of(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def start_of(config: Config) -> str:
    """Return a name for what the model before training computes of the pairs.

    Runs of one name differ in nothing that the figures of the untrained model depend on.
    """
    parts = identity(config, "dataset", "model", "quantization", "start_from")
    name = f"{kind(config.optimizer)}-{kind(config.engine)}-{parts}"
    if config.start_from and isinstance(config.optimizer, Lora):
        # An adapter of another shape is merged, which rounds
        name += f"-{config.optimizer.r}-{config.optimizer.alpha:g}"
    return name
