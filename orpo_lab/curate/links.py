"""The links by which annotators and the owner come in.

A token is a keyed hash of a name. The key is a file of its own, so `votes.sqlite` holds no secret
and may be handed on. The same links are printed after a restart. Who deletes the key ends all
links, and gets new links.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from orpo_lab.errors import UserError

KEY = "votes.key"
OWNER = "owner"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


class Links:
    """The tokens of the people who may come in.

    Args:
        folder: the folder of the curation; `votes.key` is made there where it is missing, and only
            its owner may read it.
        annotators: the names of the annotators.

    Raises:
        UserError: `votes.key` does not hold a key.
    """

    def __init__(self, folder: Path, annotators: Iterable[str]) -> None:
        self._key = _read_key(folder / KEY)
        self._tokens = {name: self._hash(f"token {name}") for name in (*annotators, OWNER)}
        # Browsers send a cookie to every port of a host: each curation has names of its own, and
        # the owner may vote in the same browser
        curation = self._hash("cookie")[:8]
        self.cookie, self.owner_cookie = f"votes_{curation}", f"votes_owner_{curation}"

    def paths(self) -> dict[str, str]:
        """Return the path of everybody's link, by name."""
        return {name: f"/enter/{token}" for name, token in self._tokens.items()}

    def whose(self, token: str) -> str | None:
        """Return whose token it is; the time that this takes does not depend on the token."""
        given = token.encode()
        found = None
        for name, expected in self._tokens.items():
            if hmac.compare_digest(given, expected.encode()):
                found = name
        return found

    def _hash(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:32]


def read_names(given: str) -> list[str]:
    """Read the names of annotators, which commas separate.

    Raises:
        UserError: a name is empty, has characters other than letters, digits, "_", "." and "-", is
            the owner's, or is there twice.
    """
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if not _NAME.fullmatch(name) or name == OWNER:
            raise UserError(
                f"--annotators: {name!r} cannot be a name; take letters, digits, '_', '.' and '-', "
                f"and not {OWNER!r}"
            )
    if len(set(names)) < len(names):
        raise UserError("--annotators names somebody twice; give each person a name of their own")
    return names


def _read_key(path: Path) -> bytes:
    with suppress(FileExistsError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as made:
            made.write(secrets.token_hex(32))
    try:
        key = bytes.fromhex(path.read_text())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise UserError(f"{path} does not hold a key; delete the file: new links are made")
    return key
