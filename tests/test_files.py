"""The files of a checkpoint: hashed as they are written, on the disk before they are listed."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from xxhash import xxh3_128

from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stopped
from orpo_lab.training import checkpoint, files, tensors
from orpo_lab.training.checkpoint import Made, Spent
from orpo_lab.training.files import Files, HashedFile

SIZE = 1000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", SIZE)


@pytest.mark.parametrize("sizes", [[0], [1], [SIZE], [3 * SIZE + 1, 5, 2 * SIZE], [7] * 999])
def test_the_hash_is_that_of_the_bytes_in_the_file(tmp_path: Path, sizes: list[int]) -> None:
    written, contents = Files(tmp_path), [os.urandom(size) for size in sizes]
    with written.create("weights") as file:
        assert [file.write(some) for some in contents] == sizes
    assert (tmp_path / "weights").read_bytes() == b"".join(contents)
    assert written.hashes() == {"weights": xxh3_128(b"".join(contents)).hexdigest()}


def test_files_of_others_are_hashed_too(tmp_path: Path) -> None:
    written = Files(tmp_path)
    with written.create("weights") as file:
        file.write(b"w")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "tokenizer.json").write_bytes(b"t")
    found = {"deep/tokenizer.json": xxh3_128(b"t"), "weights": xxh3_128(b"w")}
    assert written.hashes() == {name: value.hexdigest() for name, value in found.items()}


def test_a_file_that_is_not_complete_has_no_hash_of_its_beginning(tmp_path: Path) -> None:
    written = Files(tmp_path)
    with contextlib.suppress(OSError), written.create("weights") as file:
        file.write(b"half")
        raise OSError
    (tmp_path / "weights").write_bytes(b"half and the rest")
    assert written.hashes() == {"weights": xxh3_128(b"half and the rest").hexdigest()}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux has it")
def test_the_disk_begins_before_the_last_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []

    def note(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        sent.append((start, length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    with Files(tmp_path).create("weights") as file:
        for _ in range(4):
            file.write(bytes(SIZE // 2))
        assert sent == [(0, SIZE), (SIZE, SIZE)]
        file.write(bytes(2 * SIZE))
    assert sent[2:] == [(2 * SIZE, SIZE), (3 * SIZE, SIZE)]


def test_all_is_on_the_disk_before_the_manifest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, events, sync = RunFolder(tmp_path), [], os.fsync
    place.append_metrics(1, {"loss": 1.0})

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append((path.name, path.stat().st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    path = tmp_path / "checkpoints" / "checkpoint-1"
    path.mkdir(parents=True)
    written = Files(path)
    with written.create("weights") as file:
        file.write(b"weights")
    (path / "config.json").write_text("{}")
    checkpoint.seal(written, place, Made("", "", ""), Spent())
    found = {name: number for number, (name, _) in enumerate(events)}
    manifest = found.pop("manifest.json.part")
    assert {"weights", "config.json", "metrics.jsonl"} <= found.keys()
    assert all(found[name] < manifest for name in ("weights", "config.json", "metrics.jsonl"))
    assert ("weights", 7) in events  # and not less of it


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Stopped("SIGTERM")])
@pytest.mark.parametrize("number", [1, 5, 12, 20])
def test_what_ends_a_write_is_what_torch_save_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, number: int
) -> None:
    write, calls = HashedFile.write, 0

    def fail(self: HashedFile, some: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return write(self, some)

    monkeypatch.setattr(HashedFile, "write", fail)
    with pytest.raises(type(error)) as raised:
        tensors.save({"moments": torch.ones(10_000)}, Files(tmp_path), "state.pt")
    assert raised.value is error
