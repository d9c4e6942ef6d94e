"""Find secrets in texts, and replace them.

A secret is a text with the shape of a known token, a text after a name like `token=`, a value under
such a key, or the value of an environment variable with such a name. Everything that a run writes,
prints or sends about itself passes through `redact`. Rows of data do not, since the model is
trained on them unchanged.
"""

import logging
import os
import re
from typing import Any

HIDDEN = "***"

# Tokens with a recognisable shape
SHAPES = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{16,}                                     # Hugging Face
      | wandb_v1_\w{16,}                                        # W&B
      | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{20,}         # GitHub
      | glpat-[\w-]{16,}                                        # GitLab
      | sk-(?:proj|svcacct|admin|ant|or)-[\w-]{16,} | sk-[A-Za-z0-9]{20,}  # OpenAI and others
      | (?:AKIA|ASIA)[0-9A-Z]{16}                               # AWS
      | xox[abeoprs]-[\w-]{10,}                                 # Slack
      | AIza[\w-]{35}                                           # Google
      | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*                      # JSON Web Tokens
    )
    | (?<![A-Za-z0-9])[0-9a-f]{40}(?![A-Za-z0-9])                # W&B keys of old
    # Credentials in an address, also where one was taken for a path and has lost a slash
    | (?:(?<=://)|(?<=:/)(?!/))(?:[^/\s:@]+:[^/\s]+|[^/\s:@]{16,})(?=@)
    | (?<=\bBearer\ )[\w.~+/=-]{8,}
    """,
    re.VERBOSE,
)
_NAMES = r"(?:api[_-]?key|(?:access|private|secret)[_-]key|token|secret|password|passwd|passphrase)"
# Matches `token=abcd`, `WANDB_API_KEY=abcd`, `"password": "abcd"`; values of 4 characters or more
ASSIGNED = re.compile(
    rf"""(?i)((?<![a-z0-9])(?:\w*[_-])?{_NAMES}(?:["']?\s*=\s*|["']\s*:\s*)["']?)([^\s"'&,;)\]}}]{{4,}})"""
)
NAME = re.compile(rf"(?i)(?:^|[._-]){_NAMES}$")
# Keys that hold commits; a commit looks like an old W&B key
COMMIT_KEYS = ("revision", "git_commit")
COMMIT = re.compile(r"[0-9a-f]{40}( \(modified\))?")
# Shorter values of an environment variable are not masked, since words may contain them
MIN_LENGTH = 8


def redact(value: Any, key: str = "") -> Any:
    """Return a value with every secret in its texts replaced by ***.

    Args:
        value: a text, or a dictionary, list or tuple of values. Other values are not changed; a
            tuple becomes a list.
        key: the key that holds the value, if any.
    """
    if isinstance(value, str):
        return HIDDEN if value and NAME.search(key) else _redact_text(value, key)
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    return value


def _redact_text(text: str, key: str) -> str:
    for secret in _in_environment():
        text = text.replace(secret, HIDDEN)
    if key in COMMIT_KEYS and COMMIT.fullmatch(text):
        return text
    return ASSIGNED.sub(rf"\1{HIDDEN}", SHAPES.sub(HIDDEN, text))


def _in_environment() -> list[str]:
    """Return the values of environment variables whose names say that the value is secret."""
    found = [value for name, value in os.environ.items() if NAME.search(name)]
    # The longest first, since a secret may be a part of another secret
    return sorted((secret for secret in found if len(secret) >= MIN_LENGTH), key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """Formats a line of the log, with secrets replaced."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, with its traceback if it has one."""
        return redact(super().format(record))
