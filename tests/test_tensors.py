"""Weights in files: the same bytes as those of safetensors, transformers and peft."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from orpo_lab import config
from orpo_lab.training import files, tensors
from orpo_lab.training.files import Files, hash_of

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.complex64,
    torch.float64,
    torch.int64,
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 64)
    monkeypatch.setattr(tensors, "PIECE", 64)


def some_tensors() -> dict[str, Tensor]:
    """Return tensors of all dtypes and unusual shapes, the names in no order."""
    torch.manual_seed(0)
    mixed = {str(dtype): (torch.randn(7, 11) * 9).to(dtype) for dtype in DTYPES}
    shapes = {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "b": torch.randn(100)}
    return {**mixed, **shapes, "a": torch.nn.Parameter(torch.randn(5, 5)), "ü": torch.ones(1)}


@pytest.mark.parametrize("metadata", [None, {"by": "ü"}])
@pytest.mark.parametrize("made", [some_tensors, dict])
def test_a_file_has_the_bytes_that_safetensors_writes(
    tmp_path: Path, made: Callable[[], dict[str, Tensor]], metadata: dict[str, str] | None
) -> None:
    with Files(tmp_path).create("ours") as file:
        tensors.write_safetensors(file, made(), metadata)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(made(), metadata)


@pytest.mark.parametrize("buffer", [None, torch.empty(64, dtype=torch.uint8)])
def test_pieces_are_all_of_a_tensors_bytes(buffer: Tensor | None) -> None:
    """The buffer is that of tensors on a GPU; it is filled from the host here."""
    for size in (0, 1, 16, 17, 64):
        tensor = torch.randn(size)
        found = [bytes(piece) for piece in tensors.pieces(tensor, buffer)]
        assert b"".join(found) == tensor.numpy().tobytes()
        assert all(len(piece) <= 64 for piece in found)
    transposed = torch.randn(3, 4).T
    found = [bytes(piece) for piece in tensors.pieces(transposed, buffer)]
    assert b"".join(found) == transposed.numpy().tobytes()


@pytest.mark.parametrize("optimizer", ["adamw", "lora", "qlora"])
def test_a_folder_is_the_one_of_save_pretrained(
    load: Callable[..., config.Config],
    build_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    network = build_model(load(f"optimizer={optimizer}"))
    network.save_pretrained(tmp_path / "theirs")

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("safetensors wrote a file")

    written = Files(tmp_path / "ours")
    monkeypatch.setattr(safetensors.torch, "serialize_file", refuse)
    tensors.save_pretrained(network, written)
    hashes = {
        name: hash_of(tmp_path / "theirs" / name) for name in files.names(tmp_path / "theirs")
    }
    assert written.hashes() == hashes
    assert any(name.endswith(".safetensors") for name in hashes)
    # What others save is written by safetensors again
    with pytest.raises(AssertionError, match="safetensors wrote"):
        network.save_pretrained(tmp_path / "again")


def test_a_value_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    value: Any = {"moments": [torch.randn(100), torch.ones(3, dtype=torch.uint8)], "step": 3}
    written = Files(tmp_path)
    tensors.save(value, written, "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found["step"] == 3
    for moment, saved in zip(found["moments"], value["moments"], strict=True):
        assert torch.equal(moment, saved)
    assert written.hashes() == {"state.pt": hash_of(tmp_path / "state.pt")}
    assert torch.serialization.get_crc32_options()
