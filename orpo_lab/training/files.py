"""Write the files of a checkpoint; hash the bytes, and send them to the disk, as they come.

A checkpoint of a 7B model has 15 GB. If the bytes were hashed after the last byte is written, and
sent to the disk after that, training would wait for all three works, one after the other.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_128

from orpo_lab.records.run_folder import sync

# Bytes that are hashed, written and sent to the disk at a time
PIECE = 2**26
# XXH3 finds damage as surely as SHA-256, at several times the speed. Neither of them is proof
# against malice here: who can change a file can change its hash, too
HASH = "xxh3_128"
# The hash in the manifests of earlier versions of orpo_lab, which do not name the hash
EARLIER_HASH = "sha256"
HASHES: dict[str, Callable[[], Any]] = {HASH: xxh3_128, EARLIER_HASH: hashlib.sha256}


class HashedFile:
    """A file that is hashed while it is written; `torch.save` takes it for a file.

    Args:
        content: the file, new and open for writing.
    """

    def __init__(self, content: BinaryIO) -> None:
        self._content, self._hash = content, xxh3_128()
        self._written = self._sent = 0

    def write(self, some: bytes | memoryview) -> int:
        """Append bytes to the file.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        some = memoryview(some)
        for start in range(0, len(some), PIECE):
            piece = some[start : start + PIECE]
            self._hash.update(piece)
            self._content.write(piece)
            self._written += len(piece)
            self._send()
        return len(some)

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is complete."""

    def hash(self) -> str:
        """Return the hash of what has been written so far."""
        return self._hash.hexdigest()

    def _send(self) -> None:
        """Let the disk begin with what it has not got yet, once that is enough.

        The kernel alone would begin late: when a tenth of the memory waits for the disk.
        """
        length = self._written - self._sent
        if sys.platform == "linux" and length >= PIECE:
            # Pages that wait for the disk are not dropped, but their writing begins
            advice = os.POSIX_FADV_DONTNEED
            with contextlib.suppress(OSError):  # a file system need not take advice
                os.posix_fadvise(self._content.fileno(), self._sent, length, advice)
            self._sent = self._written


class Files:
    """The files of a checkpoint that is being written.

    Args:
        folder: the checkpoint's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[HashedFile]:
        """Inside this context, write a file; after the context the file is on the disk.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        with (self.folder / name).open("wb") as content:
            file = HashedFile(content)
            yield file
            content.flush()
            os.fsync(content.fileno())
        self._hashes[name] = file.hash()

    def hashes(self) -> dict[str, str]:
        """Return the hashes of all files in the folder by their names; all are on the disk then.

        Files that were not created here are read again. Those are small.
        """
        return {name: self._hashes.get(name) or self._read(name) for name in names(self.folder)}

    def _read(self, name: str) -> str:
        found = hash_of(self.folder / name)
        sync(self.folder / name)
        return found


def names(folder: Path) -> list[str]:
    """Return the names of all files in a folder and its folders, relative to the folder."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(str(file.relative_to(folder)) for file in found)


def link(source: str | Path, target: str | Path) -> None:
    """Make a hard link to a file; copy the file if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def hash_of(file: Path, new_hash: Callable[[], Any] = HASHES[HASH]) -> str:
    """Return the hash of a file; `new_hash` is a value of `HASHES`."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, new_hash).hexdigest()
