"""How often would A win if its answers were as long as B's? The length-controlled win rate.

Judges like long answers. So a logistic regression explains a prompt's score by the difference of
lengths d, and the win rate is read off at d = 0:

    score = sigmoid(a + b tanh(d / s)),  win rate at equal length = sigmoid(a),

with s the root mean square of d (Dubois et al. 2024, arXiv:2404.04475, Eq. 2, without the term for
how hard a prompt is, which two models alone do not tell). Scores may be halves and quarters: it is
the quasi-likelihood of Papke and Wooldridge (Journal of Applied Econometrics 11, 1996, 619-632),
with their robust standard errors over prompts. As for the plain interval, z^2 / 2 prompts that are
won and as many that are lost are added before the interval is computed, here at equal length.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from orpo_lab.compare.verdict import CONFIDENCE, Array, Interval

# Keeps a and b finite where length alone explains every score, and where one side wins all
RIDGE = 1e-2


def length_controlled(scores: Sequence[float], longer_by: Sequence[float]) -> Interval | None:
    """Return A's win rate at equal length, with its interval; None: all lengths are equal.

    Args:
        scores: what N prompts give A, from 0 to 1.
        longer_by: how much longer A's answers are, N numbers of any unit.
    """
    y, d = np.array(scores, dtype=float), np.array(longer_by, dtype=float)
    if not d.any():
        return None
    x = np.tanh(d / np.sqrt((d**2).mean()))
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    alone, _ = _fit(x, y, np.ones_like(y))
    added = np.full(2, z**2 / 2)
    centre, error = _fit(
        np.append(x, [0.0, 0.0]), np.append(y, [1.0, 0.0]), np.append(np.ones_like(y), added)
    )
    estimate, low, high = (float(expit(a)) for a in (alone, centre - z * error, centre + z * error))
    return Interval(estimate, min(estimate, low), max(estimate, high))


def _fit(x: Array, y: Array, nums: Array) -> tuple[float, float]:
    """Return a of the regression, and its robust standard error.

    Args:
        x: what a length says of N prompts, [N].
        y: their scores, [N].
        nums: how many prompts each of them stands for, [N].
    """
    design = np.stack([np.ones_like(x), x], 1)

    def loss(theta: Array) -> tuple[float, Array]:
        fitted = design @ theta
        value = -(nums * (y * log_expit(fitted) + (1 - y) * log_expit(-fitted))).sum()
        slope = design.T @ (nums * (expit(fitted) - y))
        return value + RIDGE * (theta @ theta) / 2, slope + RIDGE * theta

    theta = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    shares = expit(design @ theta)
    curvature = (design.T * (nums * shares * (1 - shares))) @ design + RIDGE * np.eye(2)
    spread = (design.T * (nums * (y - shares) ** 2)) @ design
    covariance = np.linalg.solve(curvature, np.linalg.solve(curvature, spread).T)
    return float(theta[0]), float(np.sqrt(covariance[0, 0]))
