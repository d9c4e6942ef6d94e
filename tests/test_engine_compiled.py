"""Compiled decoder layers: one graph, the same gradients, and a way on where compiling fails."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orpo_lab import config, engine
from orpo_lab.config.optimizer import Lora
from orpo_lab.engine import attention, shared_prefix
from orpo_lab.model.adapter import attach
from orpo_lab.model.causal import without_adapters
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.loop import Loop
from tests.test_engine_shared_prefix import assert_same, make_loop, make_model, make_pairs, step

Load = Callable[..., config.Config]
Make = Callable[..., Loop]

UNCOMPILED = "engine.compile=false"
COMPILED = "engine.compile=true"


@pytest.fixture
def make(load: Load, tokenizer: Any, tmp_path: Path) -> Make:
    """Make loops of a step on the same model with adapters."""

    def built(num_pairs: int, *overrides: str) -> Loop:
        lora = load("optimizer=lora", "optimizer.dropout=0").optimizer
        assert isinstance(lora, Lora)
        torch.manual_seed(0)
        model = attach(make_model("llama"), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, 0, 0.1)
        return make_loop(load, tmp_path, tokenizer, model, make_pairs(num_pairs), *overrides)

    return built


# torch's compiler instantiates autograd functions, of which torch warns (2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_all_layers_share_a_graph_and_rows_of_any_length_use_it(
    make: Make, checkpointing: str
) -> None:
    """With the real compiler, and with flash attention as on a GPU, whose kernel is a mock."""
    keys = f"train.gradient_checkpointing={checkpointing}"
    loop, plain = make(3, COMPILED, keys), make(3, UNCOMPILED, keys)
    for both in (loop, plain):
        computing: Any = both.engine
        computing.attention_implementation = attention.VARLEN
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for num in (3, 2, 5):
        for both in (loop, plain):
            both.train = both.train.from_list(make_pairs(num, seed=num))
            both.state.model.zero_grad()
        assert_same(step(loop), step(plain), 1e-5)
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("own", [None, "/elsewhere"])
def test_what_was_compiled_is_kept_for_the_next_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own or "")
    if own is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    make(1, COMPILED)
    kept = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert kept == (own or str(Path("~/.cache/orpo_lab/torchinductor").expanduser()))


class FailingCompiler:
    """Stands for a compiler that fails when it is first called, and may not be called again."""

    is_tried = False

    def __call__(self, call: Any, **options: Any) -> Any:
        def compile_and_call(*args: Any, **kwargs: Any) -> Any:
            if self.is_tried:
                pytest.fail("compiled layers are tried again")
            self.is_tried = True
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return compile_and_call


def test_where_compiling_fails_the_run_says_so_once_and_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", FailingCompiler())
    loop, plain = make(4, COMPILED), make(4, UNCOMPILED)
    found, right = step(loop), step(plain)
    loop.state.model.zero_grad()
    again = step(loop)
    assert found[0] == right[0] == again[0]
    for name, gradient in right[1].items():
        assert torch.equal(found[1][name], gradient)
    said = [record.message for record in caplog.records if "compile" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 1: failed with compiled layers (TorchDynamoException: no comp")


def test_an_error_without_compiled_layers_goes_on(make: Make) -> None:
    loop = make(2, UNCOMPILED)
    base: Any = without_adapters(loop.state.model)  # type: ignore[arg-type]
    base.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(loop)


def test_layers_are_compiled_in_training_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(call: Any, **options: Any) -> Any:
        assert options == {"dynamic": True}

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(call)
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(torch, "compile", counting)
    loop = make(2, COMPILED)
    step(loop)
    assert len(calls) == 2, "one for each layer"
    loop.evaluate()
    loop.state.model(input_ids=torch.arange(3, 9)[None])
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("asked", "device", "num_weights", "expected"),
    [
        ("auto", "cpu", 10**9, False),
        ("auto", "cuda", 10**9, True),
        ("auto", "cuda", 10**6, False),
        ("true", "cpu", 10**6, True),
        ("false", "cuda", 10**9, False),
    ],
)
def test_by_default_large_models_are_compiled_on_a_gpu(
    load: Load, asked: str, device: str, num_weights: int, expected: bool
) -> None:
    class Model:
        """Stands for a model on a GPU, which there is none of here."""

        def __init__(self) -> None:
            self.device = torch.device(device)

        def num_parameters(self) -> int:
            return num_weights

    model: Any = Model()
    loaded = load(f"engine.compile={asked}").engine
    assert isinstance(loaded, config.engine.SharedPrefixEngine)
    assert shared_prefix._compiles(loaded, model) is expected


def test_the_budget_is_what_fits_by_the_first_steps_memory(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "orpo_lab")
    built: Any = make(4).engine
    before = built.collator.budget
    built.micro_batches(make_pairs(4))
    widest = built._widest
    built.fit_budget(used=1000 * widest, room=3_000_000)
    assert built.token_budget == int(shared_prefix.SHARE * 3000) > before
    assert built.collator.budget == built.token_budget
    assert f"engine.tokens_per_microbatch={built.token_budget} from step 2 on" in caplog.text
    # A budget is chosen once
    built.fit_budget(used=1, room=10**12)
    assert built.token_budget == int(shared_prefix.SHARE * 3000)


@pytest.mark.parametrize(
    ("overrides", "room", "expected"),
    [
        ((), 10**12, shared_prefix.MAX_BUDGET),
        ((), 1, None),  # less room than the default budget needs: halved where memory runs out
        (("engine.tokens_per_microbatch=300",), 10**12, None),
    ],
)
def test_a_budget_is_never_above_the_largest_nor_other_than_asked_for(
    make: Make, overrides: tuple[str, ...], room: int, expected: int | None
) -> None:
    built = make(2, *overrides).engine
    built.micro_batches(make_pairs(2))
    built.fit_budget(used=1000, room=room)
    assert built.token_budget == expected


def test_trls_micro_batches_stay_as_they_are(load: Load, tokenizer: Any) -> None:
    loaded = load("engine=trl", "engine.micro_batch_size=2", "train.batch_size=2")
    devices = OneDevice(torch.device("cpu"), torch.float32)
    built = engine.build(loaded, model=make_model("llama"), tokenizer=tokenizer, devices=devices)
    built.fit_budget(used=1000, room=10**12)
    assert built.token_budget is None
