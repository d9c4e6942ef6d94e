"""What ends a run early against the user's wish."""

from orpo_lab.redaction import redact


class UserError(ValueError):
    """Something the user can put right: a key, a row, a path, a missing connection.

    The message is a single line that says what is wrong and what to change. `launch.py` prints it
    without a traceback and exits with code 1; every other exception is a defect of ours and keeps
    its traceback.
    """


class NonFiniteError(UserError):
    """Numbers that training or a model came to are NaN or infinite; nothing of them is kept."""


LIKELY_CAUSES = (
    "Likely causes: optimizer.learning_rate or beta too high for this model, too short a "
    "train.warmup_steps, model.dtype=fp16 overflowing (try bf16 or fp32), or with engine=trl an "
    "answer that the model is certain of (try engine=shared_prefix)"
)


def one_line(error: BaseException | str) -> str:
    """Return an error's text on a single line, for messages that quote another library's.

    Secrets are redacted, since the message may be cut, and half a secret has no shape.
    """
    return redact(" ".join(str(error).split()))
