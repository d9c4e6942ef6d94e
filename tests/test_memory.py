"""What a run holds, and that nothing of it stays."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_lab import config, memory, run
from orpo_lab import optimizer as optimizers
from orpo_lab.errors import UserError
from orpo_lab.optimizer.updater import Updater
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.training import loop

Load = Callable[..., config.Config]
SMALL = (
    "tracker=none",
    "dataset.num_train=16",
    "dataset.num_eval=4",
    "dataset.num_generations=1",
    "dataset.max_new_tokens=4",
    "train.batch_size=8",
    "train.max_steps=2",
    "train.eval_steps=1",
    "train.save_steps=1",
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """References to every run's model, its weights and its optimizer, which keep nothing alive."""
    found: list[weakref.ref[Any]] = []
    build = optimizers.build

    def watched(loaded: config.Config, model: Any, **others: Any) -> Updater:
        made = build(loaded, model, **others)
        found.extend(map(weakref.ref, (made.optimizer, model, *model.parameters())))
        return made

    monkeypatch.setattr(optimizers, "build", watched)
    return found


def tensors() -> dict[int, weakref.ref[torch.Tensor]]:
    """Return references to the process's tensors by their identity, which keep nothing alive."""
    found = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
    return {id(item): weakref.ref(item) for item in found}


def num_new(before: dict[int, weakref.ref[torch.Tensor]]) -> int:
    """Count tensors made since, whatever becomes of others that tests before this test left."""
    gone = weakref.ref(torch.empty(0))
    return sum(before.get(key, gone)() is not ref() for key, ref in tensors().items())


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param("optimizer=qlora", marks=pytest.mark.slow),
        pytest.param("optimizer=adamw", marks=pytest.mark.slow),
        pytest.param("optimizer=galore", marks=pytest.mark.slow),
        pytest.param(
            "optimizer=galore optimizer.layerwise=true engine=trl", marks=pytest.mark.slow
        ),
    ],
)
def test_a_job_leaves_nothing_in_memory(
    load: Load, seen: list[weakref.ref[Any]], tmp_path: Path, overrides: str
) -> None:
    held, before = [], tensors()
    # What is freed is freed by the run itself, not by a collection that happens to come
    gc.disable()
    try:
        for seed in (1, 2):
            loaded = load(*overrides.split(), *SMALL, f"seed={seed}")
            run.train(loaded, tmp_path / str(seed), choices={}, overrides=[])
            held.append(num_new(before))
    finally:
        gc.enable()
    assert len(seen) > 80, "two models with their weights"
    assert [ref() for ref in seen if ref() is not None] == []
    assert held[0] == held[1], "batches, states and buffers"


def test_a_failed_job_leaves_nothing_in_memory_even_where_its_error_is_kept(
    load: Load, seen: list[weakref.ref[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop.Loop, "run", fails)
    loaded = load("optimizer=adamw", *SMALL)
    with pytest.raises(UserError) as kept:
        run.train(loaded, tmp_path, choices={}, overrides=[])
    assert kept.value.__cause__ is not None
    assert [ref() for ref in seen if ref() is not None] == []
    status = RunFolder(tmp_path).status()
    assert status["reason"].startswith("UserError: out of memory (CUDA out of memory. Tried")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "optimizer=adamw engine=trl train.gradient_checkpointing=false",
            "engine=shared_prefix, engine.micro_batch_size lower, "
            "train.gradient_checkpointing=true, dataset.max_length below 96, optimizer=qlora, ",
        ),
        (
            "optimizer=qlora",  # memory that runs out has switched gradient checkpointing on
            "in this order: dataset.max_length below 96, a smaller model",
        ),
    ],
)
def test_an_error_of_no_memory_names_what_takes_less(load: Load, overrides: str, says: str) -> None:
    with (
        pytest.raises(UserError, match="out of memory") as error,
        memory.trouble_said(load(*overrides.split())),
    ):
        torch.empty(1 << 50)  # torch's own error
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory is what this row is about"), False),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception, ran_out: bool) -> None:
    assert memory.ran_out(error) == ran_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is held of the GPU")
def test_the_peak_is_the_most_that_was_held_since_it_was_reset() -> None:
    size, exact = 2**27, 0.95  # Linux counts pages in batches
    memory.reset_peak()
    before = memory.peak_bytes()
    held = b"1" * size
    del held
    peak = memory.peak_bytes()
    assert peak >= before + exact * size
    memory.reset_peak()
    assert memory.peak_bytes() <= peak - exact * size
