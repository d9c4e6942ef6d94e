"""The tracker Weights & Biases (W&B). A failure of W&B never stops a run."""

import contextlib
import logging
import netrc
import os
import re
import secrets
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from orpo_lab.config.tracker import WandbTracker
from orpo_lab.errors import UserError, one_line
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.tracker import leet
from orpo_lab.tracker.base import PROJECT, Run, Untracked

log = logging.getLogger(__name__)
# Seconds that the server may take to answer. After that a run with tracker.mode=auto goes offline
PROBE_SECONDS = 3.0
# Seconds that a run waits at its end for uploads; what is not uploaded by then stays on the disk
FINISH_SECONDS = 30.0
# The largest number of characters of a tag in W&B
MAX_TAG = 64
# Keys of the tracker, and the settings of W&B's client that check them
CHECKED = {"project": "project", "entity": "entity", "group": "run_group", "tags": "run_tags"}


def check(tracker: WandbTracker, *, folder: Path, sweep: str | None) -> None:
    """Refuse settings that W&B's client does not accept, before anything heavy is loaded.

    Args:
        tracker: which tracker, and its settings.
        folder: the run folder.
        sweep: the name of the sweep that the run belongs to, if any.

    Raises:
        UserError: W&B does not accept a key of the tracker, one of its own variables or settings
            files, or the run's id.
    """
    try:
        import wandb
    except Exception:  # `start` raises the error again, and the run reports it
        return
    if _disabled():
        return
    for key, setting in CHECKED.items():
        try:
            wandb.Settings(**{setting: getattr(tracker, key)})
        except Exception as error:
            hint = "; a team goes to tracker.entity" if key == "project" else ""
            raise UserError(f"W&B does not take tracker.{key}: {_reason(error)}{hint}") from error
    _known_id(folder, sweep)


def start(
    tracker: WandbTracker,
    *,
    folder: Path,
    name: str | None,
    config: dict[str, Any],
    sweep: str | None,
    history: list[dict[str, float]],
) -> Run:
    """Begin tracking a run.

    What the tracker's settings leave open is decided by W&B's own variables and settings files
    (WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_NOTES, and for a run
    outside of a sweep WANDB_NAME and WANDB_RUN_ID). The tags in WANDB_TAGS are added.

    The arguments are those of `tracker.start`. W&B keeps its files in the subfolder `wandb/` of the
    run folder. The lines of `history` are sent again, since W&B may not have all of them.

    Raises:
        UserError: see `check`.
        Exception: W&B's client cannot even write to the disk, and raises any exception.
    """
    if _disabled():
        log.info("W&B: disabled, by its own settings (WANDB_MODE, wandb disabled)")
        return Untracked()
    own, choices = _settings(), config["choices"]
    groups = ("model", "dataset", "method", "optimizer", "beta_schedule")
    run = WandbRun(
        tracker,
        folder=folder,
        # The jobs of a sweep cannot share a name or an id
        name=name or (own.run_name if sweep is None else None) or folder.resolve().name,
        run_id=_run_id(folder, sweep),
        config=config,
        group=tracker.group or own.run_group or sweep,
        job_type=own.run_job_type or "train",
        tags=[choices[group] for group in groups],
        history=history,
    )
    if sweep is not None:
        with contextlib.suppress(OSError):  # some file systems have no links
            leet.show(folder, run.logged, run.id)
    return run


def publish_comparison(
    tracker: WandbTracker, folder: Path, verdict: list[str], settings: list[dict[str, str]]
) -> None:
    """Log a sweep's comparison as a separate run, if `tracker.summary_run` is true.

    Args:
        tracker: which tracker, and its settings.
        folder: the sweep's folder, with the reports in it.
        verdict: the sentences of the verdict.
        settings: the table of settings, a row for each.
    """
    if not tracker.summary_run or _disabled():
        return
    try:
        run = WandbRun(
            tracker,
            folder=folder,
            name=f"{folder.name}-comparison",
            run_id=_run_id(folder, folder.name),
            config={},
            group=tracker.group or _settings().run_group or folder.name,
            job_type="comparison",
            tags=[],
            history=[],
        )
    except Exception as error:  # whatever W&B's client or its service process raises
        log.warning("W&B: %s; the sweep's folder has its report", _reason(error))
        return
    run.log_comparison(folder, verdict, settings)
    run.finish(0)


def _settings() -> Any:
    """Return the settings that W&B reads from its own variables and settings files.

    Raises:
        UserError: a variable or a file holds a value that W&B does not accept.
    """
    import wandb

    try:
        return wandb.setup().settings
    except Exception as error:  # pydantic's errors, and several types of W&B's own
        raise UserError(
            f"W&B does not take its own settings: {_reason(error)}; put right the WANDB_ variable, "
            "or say tracker=none"
        ) from error


def _disabled() -> bool:
    """Return whether W&B's own settings, or transformers' WANDB_DISABLED, switch W&B off."""
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "true", "yes")
    return is_off or _settings().mode == "disabled"


def _reason(error: Exception) -> str:
    """Return an error of W&B's client on one line; of pydantic's longer report, the first error."""
    if not hasattr(error, "errors"):
        return one_line(error)[:200]
    first = error.errors()[0]
    return one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")[:200]


class WandbRun:
    """A W&B run; several runs of one process stay separate."""

    def __init__(
        self,
        tracker: WandbTracker,
        *,
        folder: Path,
        name: str,
        run_id: str,
        config: dict[str, Any],
        group: str | None,
        job_type: str,
        tags: list[str],
        history: list[dict[str, float]],
    ) -> None:
        import wandb

        self._wandb = wandb
        own = _settings()
        online, why = self._decide(tracker, own)
        project = tracker.project or own.project or PROJECT
        labels = redact([*tags, *tracker.tags, *(own.run_tags or ())])
        options: dict[str, Any] = {
            **redact({"project": project, "entity": tracker.entity, "group": group, "name": name}),
            "job_type": job_type,
            # A folder has one run in W&B, also if a sweep runs its job again
            "id": run_id,
            "tags": list(dict.fromkeys(label[:MAX_TAG] for label in labels)),
            "config": config,
            "dir": folder,
            # Otherwise two runs in one process (a sweep) would log into the same run
            "reinit": "finish_previous",
            "settings": wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                # W&B's metadata holds the command line, which may contain a token
                x_disable_meta=True,
                init_timeout=30,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=False,
            ),
        }
        if online:
            try:
                # With an id but no `resume`, W&B would overwrite the earlier log of a resumed run
                self._run = wandb.init(
                    mode="online", resume="allow" if history else None, **options
                )
            except Exception as error:  # whatever W&B's client or its service process raises
                online, why = False, f"the server does not take the run ({one_line(error)[:150]})"
                # W&B's service process still holds the id that was refused
                (folder / "wandb_id").unlink(missing_ok=True)
                options["id"] = _new_id(folder)
        if not online:
            self._run = wandb.init(mode="offline", **options)
            log.info("W&B: offline, %s; to upload it: wandb sync %s", why, self.logged)
        else:
            log.info("W&B: online, %s", self._run.url)
        # W&B ignores lines that it has already. The others, not sent by a killed process, are added
        for line in history:
            self.log(int(line["step"]), {key: line[key] for key in line if key != "step"})

    @property
    def id(self) -> str:
        """The run's id in W&B."""
        return self._run.id

    @property
    def logged(self) -> Path:
        """The folder in which W&B keeps the run."""
        return Path(self._run.dir).parent

    def _decide(self, tracker: WandbTracker, own: Any) -> tuple[bool, str]:
        """Return whether the run goes online, and if not, the reason."""
        if tracker.mode == "offline":
            return False, "as asked"
        if own.mode in ("offline", "dryrun"):
            return False, "by its own settings (WANDB_MODE, wandb offline)"
        if not (own.api_key or own.identity_token_file or _in_netrc(own.base_url)):
            return False, "no key is configured (wandb login)"
        if tracker.mode == "auto" and not _answers(own.base_url, insecure=own.insecure_disable_ssl):
            return False, f"{own.base_url} does not answer within {PROBE_SECONDS:g} s"
        return True, ""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""
        self._safely(lambda: self._run.log(metrics, step=step))

    def log_results(
        self, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the summary metrics, the plots, and the samples as a table."""

        def send() -> None:
            self._run.summary.update(summary)
            images = {f"plots/{path.stem}": self._wandb.Image(str(path)) for path in plots}
            columns = list(samples[0]) if samples else []
            rows = [list(sample.values()) for sample in samples]
            table = self._wandb.Table(columns=columns, data=rows)
            self._run.log({**images, "samples": table})

        self._safely(send)

    def log_comparison(
        self, folder: Path, verdict: list[str], settings: list[dict[str, str]]
    ) -> None:
        """Log a sweep's reports as an artifact, its pictures, and its settings as a table."""

        def send() -> None:
            artifact = self._wandb.Artifact(f"comparison-{self._run.id}", type="report")
            for name in ("report.html", "report.md", "report.json"):
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
        """Call `send`; if it fails, log a warning, so that training goes on."""
        try:
            send()
        except Exception as error:
            log.warning(
                "W&B: %s; the run goes on, its folder has everything", one_line(error)[:200]
            )


def _run_id(folder: Path, sweep: str | None) -> str:
    """Return the W&B run id of `_known_id`; without such an id, make a new one.

    Raises:
        UserError: see `_known_id`.
    """
    return _known_id(folder, sweep) or _new_id(folder)


def _known_id(folder: Path, sweep: str | None) -> str | None:
    """Return the W&B run id in WANDB_RUN_ID, or in the folder; None: there is no id yet.

    WANDB_RUN_ID does not count for a job of a sweep.

    Raises:
        UserError: W&B would not accept the id, since W&B uses ids as names of folders.
    """
    file = folder / "wandb_id"
    given = os.environ.get("WANDB_RUN_ID") if sweep is None else None
    if not given and not file.exists():
        return None
    run_id = given or file.read_text()
    if not re.fullmatch(r"[^:;,#?/'\\\s]+", run_id):
        raise UserError(
            f"{'WANDB_RUN_ID' if given else file} holds {run_id!r}, which is no W&B run id; remove "
            "it, and a new one is made"
        )
    return run_id


def _new_id(folder: Path) -> str:
    """Make a new W&B run id, write it to the folder, and return it."""
    run_id = secrets.token_hex(4)
    RunFolder(folder).write("wandb_id", run_id)
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


def _answers(server: str, *, insecure: bool) -> bool:
    # Like W&B's client, accept any certificate if the settings say so
    context = ssl._create_unverified_context() if insecure else None
    try:
        urllib.request.urlopen(server, timeout=PROBE_SECONDS, context=context).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a page
    except (OSError, ValueError):
        return False
    return True
