"""The files of a run folder: what a run leaves is here (docs/configuration.md lists them)."""

import dataclasses
import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from orpo_lab.config import FREE, Config, identity
from orpo_lab.errors import UserError, one_line
from orpo_lab.masking import mask

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "galore-torch",
    "datasets",
    "hydra-core",
    "wandb",
)


class RunFolder:
    """A run's folder; every file is written whole and renamed into place, or appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self, config: Config, choices: dict[str, str], overrides: list[str]
    ) -> dict[str, Any]:
        """Write what the run is, and that it runs; return the configuration as written.

        Raises:
            UserError: the folder cannot be written to or holds another run, or the run to resume
                had another configuration.
        """
        resolved = mask(dataclasses.asdict(config))
        if config.resume:
            self._check_same(resolved)
        elif self._file("config.yaml").exists():
            raise UserError(f"{self.path} holds a run already; choose another with hydra.run.dir")
        groups = {group: one for group, one in choices.items() if "/" not in group}
        chosen = {"choices": groups, "overrides": mask(overrides)}
        try:
            self.write("config.yaml", yaml.safe_dump(resolved, sort_keys=False))
            self.write("choices.yaml", yaml.safe_dump(chosen, sort_keys=False))
            self.set_status("running", config_hash=identity(config))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written to: {one_line(error)}") from error
        return {**resolved, "choices": groups}

    def _check_same(self, resolved: dict[str, Any]) -> None:
        if not self._file("config.yaml").is_file():
            raise UserError(f"resume={self.path} is not a run folder: no config.yaml in it")
        before = flat(self.read_yaml("config.yaml"))
        now = flat(resolved)
        changed = [
            f"{key}: {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(FREE)
        ]
        if changed:
            raise UserError(
                f"resume={self.path} continues another run: {'; '.join(changed)}; "
                "give the overrides it was started with (choices.yaml)"
            )

    def _file(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, text: str) -> None:
        """Write a file whole: a reader sees the old one or the new one."""
        part = self._file(name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, self._file(name))

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Return what `config.yaml` or `choices.yaml` says."""
        return yaml.safe_load(self._file(name).read_text(encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, secrets masked."""
        self.write(name, json.dumps(mask(value), indent=2) + "\n")

    def set_status(
        self,
        state: str,
        reason: str = "",
        exit_code: int | None = None,
        config_hash: str | None = None,
    ) -> None:
        """Write `status.json`: running, finished, failed or stopped, why, and the exit code.

        Args:
            state: what the run has come to.
            reason: one line, for people.
            exit_code: the process's.
            config_hash: see `config.identity`; None: as it was.
        """
        status = {"state": state, "reason": reason, "exit_code": exit_code}
        status["config_hash"] = config_hash or self.status().get("config_hash")
        self.write("status.json", json.dumps(status | {"reason": mask(reason)}, indent=2) + "\n")

    def status(self) -> dict[str, Any]:
        """Return `status.json`; before there is one, the run has not begun."""
        file = self._file("status.json")
        if not file.exists():
            return {"state": "missing", "reason": "", "exit_code": None}
        return json.loads(file.read_text(encoding="utf-8"))

    def append_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`."""
        with self._file("metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of `metrics.jsonl`."""
        file = self._file("metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key: numbers in a name by their value, so that job 10 comes after job 9."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with keys like `train.max_steps`."""
    pairs: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value
    return pairs


def versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on."""
    return {name: version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Return the commit of this checkout, marked where files differ from it; None outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" (modified)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
