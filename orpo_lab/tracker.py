"""Weights & Biases, or nothing. A run never stops because its tracker does."""

import logging
import netrc
import os
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from orpo_lab.config import NoTracker, Tracker, WandbTracker
from orpo_lab.errors import UserError, one_line
from orpo_lab.masking import mask
from orpo_lab.run_folder import RunFolder

log = logging.getLogger(__name__)

# How long the server may take to answer before the run goes offline
PROBE_SECONDS = 3.0
# How long a run waits at its end for what is not uploaded yet; it stays on disk
FINISH_SECONDS = 30.0


class Run(Protocol):
    """One tracked run."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""

    def finish(self, exit_code: int) -> None:
        """Close the run as finished (0) or failed."""

    def report(
        self, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log what a finished run came to."""


class Untracked:
    """`tracker=none`: the run folder has it all."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""

    def report(self, *parts: Any) -> None:
        """Do nothing."""


def start(
    tracker: Tracker,
    *,
    folder: Path,
    name: str,
    config: dict[str, Any],
    sweep: str | None,
    history: list[dict[str, float]],
) -> Run:
    """Begin tracking a run.

    Args:
        tracker: which tracker, and its settings.
        folder: the run folder; W&B keeps its files in `wandb/` in it.
        name: what the run is called.
        config: our own configuration, under our own names, secrets masked.
        sweep: the group, unless the tracker's settings name one.
        history: the lines of metrics of a run that goes on, with their `step`; W&B gets again what
            it may not have of them.
    """
    match tracker:
        case NoTracker():
            return Untracked()
        case WandbTracker() if os.environ.get("WANDB_MODE") == "disabled":
            log.info("W&B: disabled by WANDB_MODE")
            return Untracked()
        case WandbTracker():
            choices = config["choices"]
            return WandbRun(
                tracker,
                folder=folder,
                name=name,
                config=config,
                group=tracker.group or sweep,
                job_type="train",
                tags=[
                    choices[group] for group in ("model", "dataset", "optimizer", "beta_schedule")
                ],
                history=history,
            )
    raise TypeError(f"no tracker: {tracker!r}")


def publish_comparison(
    tracker: Tracker, folder: Path, verdict: list[str], settings: list[dict[str, str]]
) -> None:
    """Log a sweep's comparison as a run of its own, where `tracker.summary_run` asks for it.

    Args:
        tracker: which tracker, and its settings.
        folder: the sweep's, with the reports in it.
        verdict: what it says.
        settings: the table of settings.
    """
    if not isinstance(tracker, WandbTracker) or os.environ.get("WANDB_MODE") == "disabled":
        return
    if not tracker.summary_run:
        return
    run = WandbRun(
        tracker,
        folder=folder,
        name=f"{folder.name}-comparison",
        config={},
        group=tracker.group or folder.name,
        job_type="comparison",
        tags=[],
        history=[],
    )
    run.report_comparison(folder, verdict, settings)
    run.finish(0)


class WandbRun:
    """A W&B run of its own, also where several runs share a process."""

    def __init__(
        self,
        tracker: WandbTracker,
        *,
        folder: Path,
        name: str,
        config: dict[str, Any],
        group: str | None,
        job_type: str,
        tags: list[str],
        history: list[dict[str, float]],
    ) -> None:
        import wandb

        self._wandb = wandb
        online, why = self._decide(tracker)
        options: dict[str, Any] = {
            **mask({"project": tracker.project, "entity": tracker.entity, "group": group}),
            "job_type": job_type,
            # One run in W&B for one folder, also where a sweep runs a job again
            "id": _run_id(folder),
            "tags": mask([*tags, *tracker.tags]),
            "name": name,
            "config": config,
            "dir": folder,
            # Two runs in one process (a sweep) would otherwise log into one
            "reinit": "finish_previous",
            "settings": wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                # Its metadata holds the command line, where a token may stand
                x_disable_meta=True,
                init_timeout=30,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=False,
            ),
        }
        if online:
            try:
                # With the id alone W&B would overwrite what a resumed run has logged before
                self._run = wandb.init(
                    mode="online", resume="allow" if history else None, **options
                )
            except Exception as error:  # whatever W&B's client or its service process raises
                online, why = False, f"the server does not take the run ({one_line(error)[:150]})"
                # W&B's service process still holds the id that was refused
                (folder / "wandb_id").unlink(missing_ok=True)
                options["id"] = _run_id(folder)
        if not online:
            self._run = wandb.init(mode="offline", **options)
            log.info(
                "W&B: offline, %s; to upload it: wandb sync %s", why, Path(self._run.dir).parent
            )
        else:
            log.info("W&B: online, %s", self._run.url)
        # What it has already W&B ignores; what a killed process did not send closes the gap
        for line in history:
            self.log(int(line["step"]), {key: line[key] for key in line if key != "step"})

    def _decide(self, tracker: WandbTracker) -> tuple[bool, str]:
        """Return whether to go online, and if not, why."""
        if tracker.mode == "offline" or os.environ.get("WANDB_MODE") == "offline":
            return False, "as asked"
        settings = self._wandb.setup().settings
        server = settings.base_url
        if not (settings.api_key or settings.identity_token_file or _in_netrc(server)):
            return False, "no key is configured (wandb login)"
        if tracker.mode == "auto" and not _answers(server):
            return False, f"{server} does not answer within {PROBE_SECONDS:g} s"
        return True, ""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""
        self._safely(lambda: self._run.log(metrics, step=step))

    def report(
        self, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log summary metrics, the plots and the samples as a table."""

        def send() -> None:
            self._run.summary.update(summary)
            images = {f"plots/{path.stem}": self._wandb.Image(str(path)) for path in plots}
            columns = list(samples[0]) if samples else []
            rows = [list(sample.values()) for sample in samples]
            table = self._wandb.Table(columns=columns, data=rows)
            self._run.log({**images, "samples": table})

        self._safely(send)

    def report_comparison(
        self, folder: Path, verdict: list[str], settings: list[dict[str, str]]
    ) -> None:
        """Log a sweep's reports as an artifact, its pictures, and its settings as a table."""

        def send() -> None:
            artifact = self._wandb.Artifact(f"comparison-{self._run.id}", type="report")
            for name in ("report.html", "report.md"):
                artifact.add_file(str(folder / name))
            artifact.add_dir(str(folder / "report"), name="report")
            self._run.log_artifact(artifact)
            pictures = sorted((folder / "report").glob("*.png"))
            images = {f"plots/{path.stem}": self._wandb.Image(str(path)) for path in pictures}
            columns = list(settings[0])
            rows = [[row.get(key, "") for key in columns] for row in settings]
            table = self._wandb.Table(columns=columns, data=rows)
            self._run.log({**images, "settings": table})
            self._run.summary.update({"verdict": " ".join(verdict)})

        self._safely(send)

    def finish(self, exit_code: int) -> None:
        """Close the run as finished (0) or failed."""
        self._safely(lambda: self._run.finish(exit_code=exit_code))

    def _safely(self, send: Any) -> None:
        """A tracker that fails is said and does not end the training it watches."""
        try:
            send()
        except Exception as error:
            log.warning(
                "W&B: %s; the run goes on, its folder has everything", one_line(error)[:200]
            )


def _run_id(folder: Path) -> str:
    """Return the folder's W&B run id, made once; or the one that `wandb agent` has given.

    Raises:
        UserError: W&B would not take it, in whose folder names it stands.
    """
    file = folder / "wandb_id"
    given = os.environ.get("WANDB_RUN_ID")
    if not given and not file.exists():
        RunFolder(folder).write("wandb_id", secrets.token_hex(4))
    run_id = given or file.read_text()
    if not re.fullmatch(r"[^:;,#?/'\\\s]+", run_id):
        raise UserError(
            f"{'WANDB_RUN_ID' if given else file} holds {run_id!r}, which is no W&B run id; remove "
            "it, and a new one is made"
        )
    return run_id


def _in_netrc(server: str) -> bool:
    """Return whether `wandb login` has left a key for the server."""
    host = urllib.parse.urlsplit(server).hostname or ""
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for file in (Path(place).expanduser() for place in places if place):
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _answers(server: str) -> bool:
    try:
        urllib.request.urlopen(server, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a page
    except (OSError, ValueError):
        return False
    return True
