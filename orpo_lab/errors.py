"""Errors that end a run early."""

from orpo_lab.redaction import redact


class UserError(ValueError):
    """An error that the user can put right: a key, a row, a path, a missing connection.

    The message is a single line that says what is wrong and what to change. `launch.py` prints the
    message without a traceback and exits with code 1. Every other exception is a defect of this
    package, and keeps its traceback.
    """


class NonFiniteError(UserError):
    """Training or a model has computed NaN or infinity; such numbers are not kept."""


LIKELY_CAUSES = (
    "Likely causes: optimizer.learning_rate or beta too high for this model, too short a "
    "train.warmup_steps, model.dtype=fp16 overflowing (try bf16 or fp32), or with engine=trl an "
    "answer that the model is certain of (try engine=shared_prefix)"
)


def one_line(error: BaseException | str) -> str:
    """Return an error's text on a single line, for messages that quote an error of a library.

    Secrets are redacted here, because the text may be cut later, and a part of a secret cannot be
    recognised.
    """
    return redact(" ".join(str(error).split()))
