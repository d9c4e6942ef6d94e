"""The rows of a split: a small record of each row in memory, and its pair in a temporary file.

A source may be far larger than memory. So a pair waits in a file until it is drawn. What tells
whether two rows repeat each other, or whether one leaks the other, are digests. A record has a
fixed size: RECORD, and DIGEST_BYTES for every message of its prompt but the last.
"""

import hashlib
import json
import pickle
import tempfile
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Content, Pair, text_of

Digests = npt.NDArray[np.bytes_]

# So many bytes of a SHA-256 tell a billion rows apart: two of them agree with a chance of 1e-21
DIGEST_BYTES = 16
# What waits to be drawn is held in memory up to this size, and in a temporary file beyond it
MAX_WAITING_BYTES = 64 * 2**20
# `pair`: prompt, context and both answers; `swapped`: the same with the answers exchanged;
# `asked`: prompt and context, exactly; `begun`: where the beginnings of the prompt are
RECORD = np.dtype(
    [
        ("number", "<i8"),
        ("offset", "<i8"),
        ("begun", "<i8"),
        ("num_begun", "<i4"),
        ("label", "<i1"),
        ("prompt", f"S{DIGEST_BYTES}"),
        ("asked", f"S{DIGEST_BYTES}"),
        ("pair", f"S{DIGEST_BYTES}"),
        ("swapped", f"S{DIGEST_BYTES}"),
    ]
)
# A pair that has no label, as a number beside those of false and true
NO_LABEL = -1


@dataclass(eq=False)
class Row:
    """A pair, the number of its row in the source, and the faults despite which it is kept."""

    number: int
    pair: Pair
    # Columns with which an answer is checked
    checks: dict[str, Any]
    kept_despite: list[Fault] = field(default_factory=list)
    # After tokenizing: the place of the row among all tokenized rows, and the faults found then
    place: int | None = None
    found: list[Fault] = field(default_factory=list)


class _Waiting:
    """A file of rows that vanishes with this object, and with the process however that ends."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MAX_WAITING_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def put(self, row: Row) -> int:
        """Write a row behind the others, and return its offset. No row is put after a `get`."""
        offset = self._file.tell()
        pickle.dump(row, self._file)
        return offset

    def get(self, offset: int) -> Row:
        """Return the row at an offset."""
        self._file.seek(offset)
        row: Row = pickle.load(self._file)
        return row


class Rows:
    """Rows that wait to be drawn, in the order of their source; a row is read when asked for.

    Args:
        rows: the rows; each is written to the file before the next one is asked for.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._waiting = _Waiting()
        self._despite: dict[int, list[Fault]] = {}
        # Rows that are tokenized already; they know their place
        self._tokenized: dict[int, Row] = {}
        records, beginnings = bytearray(), bytearray()
        for row in rows:
            offset = self._waiting.put(row)
            *begun, prompt = beginnings_of(row.pair.prompt)
            records += np.array(
                (
                    row.number,
                    offset,
                    len(beginnings) // DIGEST_BYTES,
                    len(begun),
                    NO_LABEL if row.pair.label is None else row.pair.label,
                    prompt,
                    *_digests(row.pair, prompt),
                ),
                RECORD,
            ).tobytes()
            beginnings += b"".join(begun)
        self._records: npt.NDArray[np.void] = np.frombuffer(records, RECORD)
        # Which of the records these rows are; a copy of the records would take ten times as much
        self._places = np.arange(len(self._records))
        self._beginnings: Digests = np.frombuffer(beginnings, f"S{DIGEST_BYTES}")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: int) -> Row:
        """Return a row; it is read from the file, with the faults noted since."""
        offset = int(self._records["offset"][self._places[at]])
        if offset in self._tokenized:
            return self._tokenized[offset]
        row = self._waiting.get(offset)
        row.kept_despite += self._despite.get(offset, [])
        return row

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a field of the record of each row, [N]."""
        return self._records[name][self._places]

    def __iter__(self) -> Iterator[Row]:
        return (self[at] for at in range(len(self)))

    def keep(self, rows: list[Row]) -> None:
        """Keep all these rows in memory, in their order, since they are tokenized already."""
        self._tokenized |= zip(self.column("offset").tolist(), rows, strict=True)

    def note(self, at: int, despite: list[Fault]) -> None:
        """Note faults in spite of which a row is kept; each fault once, however often found."""
        offset = int(self._records["offset"][self._places[at]])
        noted = self._despite.setdefault(offset, [])
        names = [fault.name for fault in noted]
        new = [fault for fault in despite if fault.name not in names]
        noted += new
        if offset in self._tokenized:
            self._tokenized[offset].kept_despite += new

    def select(self, which: npt.NDArray[Any]) -> "Rows":
        """Return some of the rows, which stay where they are.

        Args:
            which: [N] of booleans, or places.
        """
        chosen = object.__new__(Rows)
        chosen.__dict__ |= self.__dict__ | {"_places": self._places[which]}
        return chosen

    def begun(self) -> tuple[Digests, npt.NDArray[np.int64]]:
        """Return the beginnings of all prompts but the whole prompts, and the place of each's row.

        Those of a row stand together, the shortest first.
        """
        num = self.column("num_begun").astype(np.int64)
        owners = np.repeat(np.arange(len(self)), num)
        within = np.arange(num.sum()) - np.repeat(num.cumsum() - num, num)
        return self._beginnings[np.repeat(self.column("begun"), num) + within], owners

    def roots(self) -> Digests:
        """Return the root of each row, [N]: the shortest prompt that begins its conversation."""
        roots = self.column("prompt")
        begun, owners = self.begun()
        is_prompt = are_in(begun, roots)
        rows, first = np.unique(owners[is_prompt], return_index=True)
        roots[rows] = begun[is_prompt][first]
        return roots

    def make_pairs(self) -> npt.NDArray[np.bool_]:
        """Return whether a held-out pair can be made of each row and others, [N].

        It can of a pair, and of a completion whose prompt has both labels.
        """
        asked, label = self.column("asked"), self.column("label")
        both = np.intersect1d(asked[label == 1], asked[label == 0])
        return (label == NO_LABEL) | are_in(asked, both)


def are_in(digests: Digests, others: Digests) -> npt.NDArray[np.bool_]:
    """Return whether each digest is one of the others, [N]; takes less memory than numpy's own."""
    if not len(digests) or not len(others):
        return np.zeros(len(digests), bool)
    known = np.sort(others)
    return known[np.minimum(np.searchsorted(known, digests), len(known) - 1)] == digests


def normalize(text: str) -> str:
    """Return a text without differences in case, white space and Unicode form (NFKC)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def beginnings_of(prompt: Content, form: Callable[[str], str] = normalize) -> Iterator[bytes]:
    """Yield the digest of every beginning of a conversation, shortest first, the whole one last.

    A beginning is the first messages of the conversation. A string has only itself.

    Args:
        prompt: the conversation.
        form: applied to each text before its digest is computed.
    """
    if isinstance(prompt, str):
        yield digest(form(prompt))
    else:
        for size in range(1, len(prompt) + 1):
            yield digest(form(text_of(prompt[:size])))


def digest(text: str) -> bytes:
    """Return the first bytes of a text's SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def _digests(pair: Pair, prompt: bytes) -> tuple[bytes, bytes, bytes]:
    """Return `asked`, `pair` and `swapped` of a record.

    A single completion has no other answer. So a completion that is desirable in one row and not in
    another is the same pair with its answers exchanged.
    """
    chosen, rejected = (digest(text_of(side)) for side in (pair.chosen, pair.rejected))
    asked = b""
    if pair.label is not None:
        asked = digest(json.dumps([pair.prompt, pair.context], sort_keys=True))
        chosen, rejected = (chosen, b"") if pair.label else (b"", rejected)
    context = digest(json.dumps(pair.context, sort_keys=True))
    known, swapped = (
        _joined(prompt, context, *sides) for sides in ((chosen, rejected), (rejected, chosen))
    )
    return asked, known, swapped


def _joined(*parts: bytes) -> bytes:
    sizes = b"".join(bytes([len(part)]) for part in parts)
    return hashlib.sha256(sizes + b"".join(parts)).digest()[:DIGEST_BYTES]
