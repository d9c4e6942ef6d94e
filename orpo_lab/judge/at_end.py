"""A judge at the end of a run: its answers after training against those before.

Whatever happens to the judge, the run has its results, and ends as it would have ended.
"""

import logging
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orpo_lab import program
from orpo_lab.config.judge import EndpointJudge, Judge
from orpo_lab.errors import one_line
from orpo_lab.judge.answers import Sample, after_and_before
from orpo_lab.judge.verdicts import compare, open_judge
from orpo_lab.judge.win_rate import figures
from orpo_lab.stop import Stop, Stopped

log = logging.getLogger(__name__)

# The folder inside the run folder that holds the verdicts
FOLDER = "judge"
AFTER, BEFORE = "the model after training", "the model before training"


def check(judge: Judge) -> None:
    """Refuse a judge that cannot be asked, before anything heavy is loaded; nothing is asked yet.

    Raises:
        UserError: see `open_judge`.
    """
    if isinstance(judge, EndpointJudge):
        open_judge(judge)


def ask(judge: Judge, run: Path, stop: Stop, samples: Iterable[Sample]) -> dict[str, Any]:
    """Return what a judge says of a run's answers, as figures of `summary.json`.

    Without a judge or answers there are no figures. A judge that is not heard costs no more than
    its figures, and a line of the log says how to ask it later. A signal ends the asking at once,
    and not the run.

    Args:
        judge: who judges.
        run: the run folder.
        stop: receives the signals.
        samples: the answers before and after training.
    """
    pairs = after_and_before(samples)
    if not isinstance(judge, EndpointJudge) or not pairs:
        return {}
    later = f"{program.command('winrate')} {shlex.quote(str(run))} --before"
    waited, stop.waits = stop.waits, False
    try:
        stop.check()
        asked = open_judge(judge)
        found, tally = compare(
            asked, pairs[: judge.num_prompts], run / FOLDER, judge.max_new_tokens
        )
    except (Exception, Stopped) as error:
        why = one_line(error)[:300]
        log.warning("warning: no win rate (%s); the run is whole without; later: %s", why, later)
        log.debug("", exc_info=True)
        return {}
    finally:
        stop.waits = waited
    log.info("\n%s", "\n".join(found.sentences(AFTER, BEFORE, asked.name)))
    if tally.failed:
        log.warning("warning: %d questions have no reply; later: %s", tally.failed.total(), later)
    return figures(found, asked.name)
