"""The table of metrics: name, unit, better direction, how each is computed, and who shows it.

The terminal, plots, the comparison, the search, W&B's workspace and the page about curves read this
table, and list no metric of their own. To add a metric of the held-out pairs, add a row to
`HELD_OUT`. To add a metric of training, add a row to `TRAINING` and let the engine return it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from orpo_lab.compare.verdict import Array
    from orpo_lab.evaluate import Generation, Scores
    from orpo_lab.judge.win_rate import WinRate

# The metric by which runs are compared
PREFERENCE = "preference_accuracy"
# What a guess by length alone reaches, without any model; see `data.length_bias`
LENGTH_GUESS = "length_guess_accuracy"
# How much of the gradient is preference
PREFERENCE_SHARE = "meter/preference_share"
# Where answers were checked, the only quality that is compared
CHECKED = "exact_match"
# How often a judge prefers the answers after training to those before; no part of any verdict
JUDGED_PREFIX = "judge/"
WIN_RATE = f"{JUDGED_PREFIX}win_rate"
# Whether that says something about the answers, and not only about the judge
IS_EVIDENCE = f"{JUDGED_PREFIX}is_evidence"
# Prefix of a training metric's name when the metric is measured on held-out pairs
HELD_OUT_PREFIX = "eval_"

# Prefix of the figures of lm-evaluation-harness; see `harness_name`
HARNESS = "harness/"
# Ends of names: of a figure's standard error, and of the number of a task's documents
STDERR, NUM_DOCUMENTS = "_stderr", "num_documents"

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True, kw_only=True)
class TrainingMetric:
    """A figure of a line of `metrics.jsonl`."""

    name: str
    unit: str = ""
    better: Better = ""
    is_beta_free: bool = True
    """Whether the figure can be compared across betas, and along an annealed run."""
    is_method_free: bool = True
    """Whether the figure can be compared across methods."""
    is_setting: bool = False
    """Whether the figure says how the run trains, not how well."""
    panel: str = ""
    """Title of the panel with this curve in a run's plot; empty: no curve is drawn."""
    curve: str = ""
    """Name of this curve where several curves share the panel."""
    compared: str = ""
    """Axis label of this metric's picture in a comparison; empty: there is no picture."""
    bar: str = ""
    """Short name in the progress bar; empty: the bar does not show the metric."""
    is_said: bool = False
    """Whether the log line of a step shows the metric."""


@dataclass(frozen=True, kw_only=True)
class HeldOutMetric:
    """A figure of the held-out pairs; `summary.json` has it before and after training."""

    name: str
    unit: str = ""
    better: Better = ""
    about: str = ""
    """The text of a table, in place of the unit and the better direction."""
    is_tabled: bool = True
    """Whether a run's table and model card show the metric."""
    is_brief: bool = False
    """Whether tables with one row per run show the metric."""
    is_noted: bool = False
    """Whether the comparison's table of settings shows the metric even where it is no quality."""
    margin: float | None = None
    """How much worse than the best setting's this quality may be and still count as good. None:
    the metric is not a quality. Preference accuracy may not rise at the cost of a quality."""
    of_scores: "Callable[[Scores], Any] | None" = None
    """Computes the metric from the log-probabilities of N pairs."""
    of_answers: "Callable[[list[Generation]], Any] | None" = None
    """Computes the metric from one or more greedy answers."""
    of_guesses: "Callable[[Array], Any] | None" = None
    """Computes the metric from whether a guess by length is right at each pair, [N]."""
    of_pair: "Callable[[dict[str, Array]], Array] | None" = None
    """Computes the metric of each pair, [N], from columns [N] of `scores.parquet`; required of a
    quality."""
    is_share: bool = False
    """Whether the metric is 0 or 1 for each pair."""

    @property
    def said(self) -> str:
        """The text about the metric in a table."""
        direction = f"{self.better} is better" if self.better else ""
        return self.about or ", ".join(filter(None, (self.unit, direction)))

    @property
    def sign(self) -> int:
        """1 if higher is better or neither is, -1 if lower is better."""
        return -1 if self.better == "lower" else 1


@dataclass(frozen=True, kw_only=True)
class JudgedMetric:
    """A figure of what a judge says of the answers after training against those before.

    `summary.json` has the figures of an interval under `name`, `name_low` and `name_high`.
    """

    name: str
    better: Better = ""
    of_win_rate: "Callable[[WinRate], Any]"
    """Takes the figure, or an interval, from a win rate; None: there is no such figure."""


TRAINING = (
    TrainingMetric(
        name="loss",
        unit="nats",
        better="lower",
        is_beta_free=False,
        is_method_free=False,
        panel="loss (nats)",
        curve="total",
        bar="loss",
        is_said=True,
    ),
    TrainingMetric(
        name="nll_loss",
        unit="nats per token",
        better="lower",
        # Over prompt and completion, or over the completion alone, as the method says
        is_method_free=False,
        panel="loss (nats)",
        curve="SFT (NLL)",
        compared="SFT loss (nats)",
    ),
    TrainingMetric(
        name="odds_ratio_loss",
        unit="nats",
        better="lower",
        is_method_free=False,
        panel="preference loss (nats)",
    ),
    TrainingMetric(
        name="preference_loss",
        unit="nats",
        better="lower",
        is_beta_free=False,
        is_method_free=False,
        panel="preference loss (nats)",
    ),
    TrainingMetric(
        name=PREFERENCE,
        unit="0 to 1",
        better="higher",
        panel="preference accuracy",
        compared="training preference accuracy",
        bar="accuracy",
        is_said=True,
    ),
    TrainingMetric(
        name="logp_margin",
        unit="nats per token",
        better="higher",
        panel="logp margin (nats)",
        compared="training logp margin (nats)",
        bar="margin",
        is_said=True,
    ),
    TrainingMetric(
        name="beta",
        is_method_free=False,
        is_setting=True,
        panel="beta",
        compared="beta",
        is_said=True,
    ),
    TrainingMetric(name="learning_rate", is_setting=True, panel="learning rate"),
    TrainingMetric(name="grad_norm", is_beta_free=False, is_method_free=False, is_setting=True),
    # What the meter of preference measures, `train.meter_steps`
    TrainingMetric(
        name="meter/likelihood_norm",
        is_method_free=False,
        is_setting=True,
        panel="gradient norm of each term",
        curve="likelihood",
    ),
    TrainingMetric(
        name="meter/preference_norm",
        is_beta_free=False,
        is_method_free=False,
        is_setting=True,
        panel="gradient norm of each term",
        curve="preference",
    ),
    TrainingMetric(
        name=PREFERENCE_SHARE,
        unit="0 to 1",
        is_setting=True,
        panel="preference share of the gradient",
        compared="preference share of the gradient",
    ),
    TrainingMetric(
        name="meter/cosine",
        unit="-1 to 1",
        is_setting=True,
        panel="cosine of the two gradients",
    ),
    # The other metrics of TRL
    TrainingMetric(name="log_odds_ratio", unit="nats", better="higher"),
    TrainingMetric(name="log_odds_chosen", unit="nats", better="higher"),
    TrainingMetric(name="logps/chosen", unit="nats per token"),
    TrainingMetric(name="logps/rejected", unit="nats per token"),
    TrainingMetric(name="kl", unit="nats"),
    TrainingMetric(name="logits/chosen"),
    TrainingMetric(name="logits/rejected"),
    TrainingMetric(name="rewards/chosen", is_beta_free=False, is_method_free=False),
    TrainingMetric(name="rewards/rejected", is_beta_free=False, is_method_free=False),
    TrainingMetric(
        name="rewards/margins", better="higher", is_beta_free=False, is_method_free=False
    ),
    TrainingMetric(name="rewards/accuracies", unit="0 to 1", better="higher", is_method_free=False),
)


def _log_odds(scores: "Scores") -> Any:
    from orpo_lab.methods.odds import log_odds_ratio  # imports torch

    return log_odds_ratio(scores.chosen_logps, scores.rejected_logps).mean()


def _chosen_nll(scores: "Scores") -> Any:
    sizes = scores.chosen_sizes
    return -(scores.chosen_logps * sizes).sum() / sizes.sum()


def _chosen_nll_of_pair(columns: "dict[str, Array]") -> "Array":
    # Scaled so that the mean over pairs is the mean over all tokens of the pairs
    sizes = columns["chosen_tokens"]
    return -columns["chosen_logp"] * sizes / sizes.mean()


def _share_right(answers: "list[Generation]") -> float | None:
    checked = [answer.correct for answer in answers if answer.correct is not None]
    return _mean(checked) if checked else None


def _num_checked(answers: "list[Generation]") -> int | None:
    return sum(answer.correct is not None for answer in answers) or None


def _share_cut(answers: "list[Generation]") -> float | None:
    # An earlier version of orpo_lab did not note it
    known = [answer.is_cut for answer in answers if answer.is_cut is not None]
    return _mean(known) if known else None


def _mean(values: "Sequence[float]") -> float:
    return sum(values) / len(values)


HELD_OUT = (
    HeldOutMetric(name="num_pairs", is_tabled=False, of_scores=lambda s: len(s.chosen_logps)),
    HeldOutMetric(
        name=PREFERENCE,
        better="higher",
        is_brief=True,
        of_scores=lambda s: (s.chosen_logps > s.rejected_logps).double().mean(),
    ),
    HeldOutMetric(
        name=LENGTH_GUESS,
        about="a guess by length alone",
        is_brief=True,
        of_guesses=lambda guesses: float(guesses.mean()),
    ),
    HeldOutMetric(
        name="logp_margin",
        unit="nats",
        better="higher",
        of_scores=lambda s: (s.chosen_logps - s.rejected_logps).mean(),
    ),
    HeldOutMetric(name="log_odds", better="higher", of_scores=_log_odds),
    HeldOutMetric(name="chosen_logp", is_tabled=False, of_scores=lambda s: s.chosen_logps.mean()),
    HeldOutMetric(
        name="rejected_logp", is_tabled=False, of_scores=lambda s: s.rejected_logps.mean()
    ),
    HeldOutMetric(name="num_generations", is_tabled=False, of_answers=len),
    HeldOutMetric(name="num_checked", is_tabled=False, of_answers=_num_checked),
    HeldOutMetric(
        name=CHECKED,
        better="higher",
        is_brief=True,
        margin=0.03,
        of_answers=_share_right,
        of_pair=lambda columns: columns["correct"],
        is_share=True,
    ),
    HeldOutMetric(
        name="chosen_nll",
        unit="nats",
        better="lower",
        is_brief=True,
        is_noted=True,
        margin=0.03,
        of_scores=_chosen_nll,
        of_pair=_chosen_nll_of_pair,
    ),
    HeldOutMetric(
        name="chosen_perplexity",
        better="lower",
        of_scores=lambda s: math.exp(min(float(_chosen_nll(s)), 700.0)),
    ),
    HeldOutMetric(
        name="generated_tokens",
        about="mean length",
        is_noted=True,
        of_answers=lambda answers: _mean([answer.num_tokens for answer in answers]),
    ),
    HeldOutMetric(
        name="cut_answers",
        about="share cut at max_new_tokens",
        of_answers=_share_cut,
    ),
    HeldOutMetric(
        name="repetition",
        better="lower",
        is_noted=True,
        margin=0.05,
        of_answers=lambda answers: _mean([answer.repetition for answer in answers]),
        of_pair=lambda columns: columns["repetition"],
    ),
)

JUDGED = (
    JudgedMetric(name=WIN_RATE, better="higher", of_win_rate=lambda w: w.win_rate),
    JudgedMetric(name=IS_EVIDENCE, of_win_rate=lambda w: w.is_evidence),
    JudgedMetric(name="judge/first_place_bias", of_win_rate=lambda w: w.first_place_bias),
    JudgedMetric(name="judge/follows_place", better="lower", of_win_rate=lambda w: w.follows_place),
    JudgedMetric(name="judge/longer_wins", of_win_rate=lambda w: w.longer_wins),
    JudgedMetric(
        name="judge/length_controlled_win_rate",
        better="higher",
        of_win_rate=lambda w: w.length_controlled,
    ),
    JudgedMetric(name="judge/num_prompts", of_win_rate=lambda w: w.num_prompts),
    JudgedMetric(name="judge/num_ties", of_win_rate=lambda w: w.num_ties),
    JudgedMetric(name="judge/num_equal", of_win_rate=lambda w: w.num_equal),
    JudgedMetric(name="judge/num_unreadable", of_win_rate=lambda w: w.num_unreadable),
    JudgedMetric(name="judge/num_missing", of_win_rate=lambda w: w.num_missing),
)

# How much worse than the best setting's each quality may be and still count as good
MARGINS = {metric.name: metric.margin for metric in HELD_OUT if metric.margin is not None}


def qualities_among(present: Collection[str]) -> list[HeldOutMetric]:
    """Return the qualities among some figures; preference accuracy may not rise at their cost.

    If answers were checked, exact match is the only quality: whether answers are right says more
    than how likely or how repetitive they are.

    Args:
        present: names of the figures that exist.
    """
    found = [metric for metric in HELD_OUT if metric.name in MARGINS and metric.name in present]
    return [metric for metric in found if metric.name == CHECKED] or found


def brief(after: dict[str, Any]) -> dict[str, str]:
    """Return, as text, the few figures for which a table with one row per run has room.

    Args:
        after: the held-out figures after training.
    """
    names = [metric.name for metric in HELD_OUT if metric.is_brief]
    return {name: f"{after[name]:.3f}" for name in names if name in after}


def harness_name(task: str, metric: str, kind: str = "none") -> str:
    """Return the name of a figure of lm-evaluation-harness.

    Args:
        task: the task, or the group of tasks.
        metric: the harness's name of the figure.
        kind: the harness's filter of the answers; `none` is not named.
    """
    return f"{HARNESS}{task}/{metric}" + ("" if kind == "none" else f"/{kind}")


def harness_figures(names: Iterable[str]) -> list[str]:
    """Return the harness's figures among some names, without standard errors and counts."""
    return [
        name
        for name in names
        if name.startswith(HARNESS) and not name.endswith((STDERR, f"/{NUM_DOCUMENTS}"))
    ]


def num_documents(name: str, figures: dict[str, float]) -> int:
    """Return the number of documents that a figure of the harness is over; 0: not known."""
    task = name.split("/")[1]
    return int(figures.get(harness_name(task, NUM_DOCUMENTS), 0))


def harness_said(name: str, figures: dict[str, Any]) -> str:
    """Return, as text, the standard error of a figure of the harness, and its documents' number.

    Args:
        name: the name of the figure.
        figures: figures by name, this one among them.
    """
    error = f"± {figures[name + STDERR]:.3f}, " if name + STDERR in figures else ""
    return f"{error}{num_documents(name, figures)} documents"
