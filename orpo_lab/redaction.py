"""Secrets: what they look like, and values without them.

A secret is what looks like one, what stands after a name like `token=` or under such a key, and the
very value of an environment variable of such a name. All that a run writes, prints or sends about
itself passes through `redact`; rows of data do not, for they are what is trained on.
"""

import logging
import os
import re
from typing import Any

HIDDEN = "***"

# Tokens that their makers gave a recognisable shape
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
# As in `token=abc`, `WANDB_API_KEY=abc`, `"password": "abc"`
ASSIGNED = re.compile(
    rf"""(?i)((?<![a-z0-9])(?:\w*[_-])?{_NAMES}(?:["']?\s*=\s*|["']\s*:\s*)["']?)([^\s"'&,;)\]}}]{{4,}})"""
)
NAME = re.compile(rf"(?i)(?:^|[._-]){_NAMES}$")
# Commits, which look like W&B keys of old, under the keys that hold them
COMMIT_KEYS = ("revision", "git_commit")
COMMIT = re.compile(r"[0-9a-f]{40}( \(modified\))?")
# Shorter values of an environment variable would be masked inside of words
MIN_LENGTH = 8


def redact(value: Any, key: str = "") -> Any:
    """Return a value with every secret in its texts replaced by ***.

    Args:
        value: texts, and dictionaries, lists and tuples of them; all else is returned as it is.
        key: what it stands under.
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
    """Return the values of environment variables whose names say that they are secret."""
    found = [value for name, value in os.environ.items() if NAME.search(name)]
    # The longest first: one may be part of another
    return sorted((secret for secret in found if len(secret) >= MIN_LENGTH), key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """Formats a line of the log without the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback if there is one."""
        return redact(super().format(record))
