"""Write tensors to the files of a checkpoint, piece by piece.

safetensors' own function copies all weights from the GPU to the host before the first byte is
written. The disk has nothing to do meanwhile, and the host needs memory for a second model.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.serialization import config as serialization

from orpo_lab import upstream
from orpo_lab.training.files import PIECE, Files, HashedFile

# The name in a header that is of no tensor
METADATA = "__metadata__"


def save_pretrained(model: Any, files: Files, folder: str = "", **options: Any) -> None:
    """Write a model or an adapter: the same files as those of its own `save_pretrained`.

    Args:
        model: the model or the adapter.
        files: the files of a checkpoint.
        folder: a folder inside the checkpoint; empty: the checkpoint's own folder.
        options: of the model's own `save_pretrained`.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """

    def save_file(
        tensors: Mapping[str, Tensor], filename: Path | str, metadata: dict[str, str] | None = None
    ) -> None:
        with files.create(str(Path(filename).relative_to(files.folder))) as file:
            write_safetensors(file, tensors, metadata)

    with upstream.tensors_written_by(save_file):
        model.save_pretrained(files.folder / folder, **options)


def save(value: Any, files: Files, name: str) -> None:
    """Write tensors and plain values by `torch.save`.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    # The file has a hash, so torch need not add its own checksums
    without_checksums = serialization.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
    with files.create(name) as file, without_checksums:
        try:
            torch.save(value, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            # After an error of `write`, torch.save fails once more when it ends the file. The first
            # error says what is wrong; it may also be a signal that was received
            raise error.__context__ or error from None


def write_safetensors(
    file: HashedFile, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None
) -> None:
    """Write tensors in the format of safetensors: the same bytes as safetensors itself writes.

    Args:
        file: an empty file.
        tensors: on any devices, by their names.
        metadata: texts for the file's header.
    """
    header = _header(tensors, metadata)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    # Pinned memory takes a copy from a GPU several times as fast as other memory does
    has_gpu = any(tensor.is_cuda for tensor in tensors.values())
    buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) if has_gpu else None
    for name in header:
        if name != METADATA:
            for piece in pieces(tensors[name], buffer if tensors[name].is_cuda else None):
                file.write(piece)


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> dict[str, Any]:
    """Return the header of a safetensors file; the tensors follow in the order of the header."""
    # safetensors itself sorts the tensors and names their dtypes. Empty tensors cost nothing
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    header: dict[str, Any] = json.loads(safetensors.torch.save(empty, metadata)[8:])
    end = 0
    for name, entry in header.items():
        if name != METADATA:
            begin, end = end, end + tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    return header


def pieces(tensor: Tensor, buffer: Tensor | None) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in order, at most `PIECE` of them at a time.

    Args:
        tensor: the tensor.
        buffer: memory of the host for every piece in turn, [PIECE] of uint8. None: the tensor is on
            the host itself, and its own memory is used.
    """
    for piece in tensor.detach().reshape(-1).view(torch.uint8).split(PIECE):
        if buffer is not None:
            piece = buffer[: len(piece)].copy_(piece)
        yield memoryview(piece.numpy())
