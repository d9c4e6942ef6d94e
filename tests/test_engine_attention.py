"""Attention functions for rows, against each other."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from orpo_lab.engine import attention, packing, shared_prefix
from orpo_lab.engine.attention import BY_PAIR, FLEX, VARLEN, possible_on
from orpo_lab.errors import UserError
from tests import flash_kernel
from tests.test_engine_shared_prefix import make_model, make_pairs

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS, KEY_HEADS, SIZE = 4, 2, 8


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_size", "bounds_scores", "knows_flex", "expected"),
    [
        (HOPPER, BF16, 128, False, True, [VARLEN, FLEX, BY_PAIR]),
        (AMPERE, FP16, 64, False, True, [VARLEN, FLEX, BY_PAIR]),
        (AMPERE, BF16, 256, False, False, [VARLEN, BY_PAIR]),
        ((12, 0), BF16, 80, False, True, [VARLEN, FLEX, BY_PAIR]),
        (AMPERE, BF16, 8, False, True, [VARLEN, BY_PAIR]),
        (TURING, FP16, 128, False, True, [FLEX, BY_PAIR]),
        (HOPPER, FP32, 128, False, True, [FLEX, BY_PAIR]),
        (HOPPER, BF16, 128, True, True, [FLEX, BY_PAIR]),
        (HOPPER, BF16, 264, False, True, [FLEX, BY_PAIR]),
        (HOPPER, BF16, 100, False, True, [FLEX, BY_PAIR]),
        (TURING, FP16, 8, False, True, [BY_PAIR]),
        (None, BF16, 128, False, True, [BY_PAIR]),
        (None, FP32, 64, False, False, [BY_PAIR]),
    ],
)
def test_implementations_are_those_that_device_precision_and_model_allow(
    gpu: Any, dtype: Any, head_size: int, bounds_scores: bool, knows_flex: bool, expected: list[str]
) -> None:
    settings = {"bounds_scores": bounds_scores, "knows_flex": knows_flex}
    assert possible_on(gpu, dtype, head_size=head_size, **settings) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [VARLEN, BY_PAIR]),
        ("mistral_sliding", [VARLEN, BY_PAIR]),
        ("gemma2", [BY_PAIR]),  # bounded scores, and heads of 8
        ("gemma3", [VARLEN, BY_PAIR]),
    ],
)
def test_a_models_configuration_tells_what_is_possible(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    """Only device and capability are made up: there is no GPU here."""
    model = make_model(name)
    assert attention.possible(model, BF16) == [BY_PAIR]
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert attention.possible(model, BF16) == expected


def lay_out(pairs: list[dict[str, list[int]]], multiple: int = 1) -> dict[str, Any]:
    collator = packing.Collator(
        budget=1000, multiple=multiple, prompt_is_scored=True, pad_token_id=0
    )
    return collator.lay_out(pairs)


def layer_of(window: int | None) -> Any:
    return SimpleNamespace(
        row_window=window, num_key_value_groups=HEADS // KEY_HEADS, is_causal=True
    )


def states_for(row: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    numbers, width = torch.Generator().manual_seed(0), row["input_ids"].shape[1]
    return [
        torch.randn(1, heads, width, SIZE, generator=numbers, dtype=torch.float64).to(dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def results(name: str, row: dict[str, Any], states: list[Tensor], window: int | None) -> Any:
    """Output, then gradients of queries, keys and values."""
    function = {VARLEN: attention.varlen, BY_PAIR: attention.by_pair}[name]
    told = attention.inputs(name, row, make_model("llama").config)
    return attention.with_gradients(function, layer_of(window), states, told)


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 200])
@pytest.mark.parametrize("num", [1, 4])
def test_flash_attention_and_its_gradients_are_those_pair_by_pair(
    num: int, window: int | None
) -> None:
    """With the shortest pair there is, grouped heads, and fewer tokens than a window has."""
    row = lay_out(make_pairs(num))
    states = states_for(row)
    for seen, exact in zip(
        results(VARLEN, row, states, window), results(BY_PAIR, row, states, window), strict=True
    ):
        assert torch.allclose(seen, exact, atol=1e-6)


def test_the_longest_length_is_rounded_up_for_the_kernel() -> None:
    """A length of its own for every row would be a compilation, and a single query another way."""
    config = make_model("llama").config
    for longest, expected in ((2, 128), (128, 128), (129, 256)):
        row = lay_out(make_pairs(2)) | {"longest": longest}
        assert attention.inputs(VARLEN, row, config)["sequences"].longest == expected


@pytest.mark.usefixtures("flash_kernel")
def test_padding_is_a_sequence_of_its_own() -> None:
    """What the kernel leaves out is undefined, and would spoil the gradients of weights."""
    pairs = make_pairs(3)
    plain, padded = lay_out(pairs), lay_out(pairs, multiple=attention.BLOCK)
    width = plain["input_ids"].shape[1]
    longer = states_for(padded)
    seen = results(VARLEN, padded, longer, None)
    expected = results(VARLEN, plain, [heads[:, :, :width] for heads in longer], None)
    assert all(torch.isfinite(each).all() for each in seen)
    assert torch.allclose(seen[0][:, :width], expected[0])
    for with_padding, without in zip(seen[1:], expected[1:], strict=True):
        assert torch.allclose(with_padding[:, :, :width], without)


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_flash_attention_computes_in_the_precision_of_autocast(dtype: torch.dtype) -> None:
    """Queries and keys leave the rotary embedding in fp32, values the projection in 16 bits."""
    row = lay_out(make_pairs(3))
    query, key, value = states_for(row, FP32)
    told = attention.inputs(VARLEN, row, make_model("llama").config)
    query.requires_grad_()
    with torch.autocast("cpu", dtype):
        output, _ = attention.varlen(layer_of(None), query, key, value.to(dtype), None, 0.3, **told)
    assert output.dtype == dtype
    output.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == FP32
    exact, _ = attention.varlen(layer_of(None), query, key, value, None, 0.3, **told)
    assert 0 < float((output - exact).detach().abs().max()) < 0.05


@pytest.mark.parametrize("extra", ["s_aux", "position_bias"])
def test_flash_attention_refuses_what_it_cannot_compute(extra: str) -> None:
    row = lay_out(make_pairs(2))
    given: Any = (layer_of(None), *states_for(row), None)
    told = attention.inputs(VARLEN, row, make_model("llama").config)
    varlen: Any = attention.varlen
    with pytest.raises(UserError, match=rf"cannot compute {extra}; use engine=trl"):
        varlen(*given, **told, **{extra: torch.zeros(4)})
    with pytest.raises(NotImplementedError, match="cannot bound scores"):
        varlen(*given, softcap=30.0, **told)


def without_copies(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return gradient.index_select(0, ctx.saved_tensors[0]), None, None, None


# What a wrong kernel does to the settings that it gets
WRONG: dict[str, dict[str, Callable[[Any], Any]]] = {
    "looks_ahead": {"window_size_right": lambda right: right + 1},
    "forgets_the_window": {"window_size_left": lambda left: -1},
    "a_window_of_a_token_more": {"window_size_left": lambda left: left + (left >= 0)},
    "another_scale": {"scale": lambda scale: 2 * scale},
}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all three implementations possible, as on a GPU."""
    monkeypatch.setattr(attention, "possible", lambda model, dtype: [VARLEN, FLEX, BY_PAIR])
    shared_prefix._warn_once.cache_clear()


@pytest.mark.usefixtures("on_a_gpu", "flash_kernel")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "qwen2_moe_sliding", "gemma3"])
def test_flash_attention_is_chosen_where_its_results_are_right(
    name: str, dtype: torch.dtype
) -> None:
    model = make_model(name)
    before = model.config._attn_implementation
    assert shared_prefix.choose_attention(model, dtype) == VARLEN
    assert model.config._attn_implementation == before
    assert model.training


@pytest.mark.usefixtures("on_a_gpu", "flash_kernel")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    plain = flash_kernel.attend

    def attend(query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Any:
        wrong = {setting: change(settings[setting]) for setting, change in WRONG[name].items()}
        return plain(query, key, value, settings | wrong)

    monkeypatch.setattr(flash_kernel, "attend", attend)
    assert shared_prefix.choose_attention(make_model("mistral_sliding"), BF16) == FLEX
    assert "its output or a gradient is off by" in caplog.text


@pytest.mark.usefixtures("on_a_gpu", "flash_kernel")
def test_a_kernel_is_not_given_up_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flash_kernel, "attend", attend)
    with pytest.raises(torch.OutOfMemoryError):
        shared_prefix.choose_attention(make_model("llama"), BF16)


@pytest.mark.usefixtures("on_a_gpu", "flash_kernel")
def test_a_wrong_gradient_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention._Spread, "backward", staticmethod(without_copies))
    assert shared_prefix.choose_attention(make_model("llama"), BF16) == FLEX
    assert "its output or a gradient is off by" in caplog.text


@pytest.mark.usefixtures("on_a_gpu", "flash_kernel")
def test_a_model_that_does_not_pass_the_sequences_on_is_read_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    plain = model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda sequences=None, **inputs: plain(**inputs)
    )
    assert shared_prefix.choose_attention(model, BF16) == FLEX
    assert "missing 1 required keyword-only argument: 'sequences'" in caplog.text


@pytest.mark.usefixtures("on_a_gpu")
def test_a_kernel_that_does_not_run_is_said_once_and_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a CPU, where torch has no kernel."""
    model = make_model("llama")
    for _ in range(2):
        assert shared_prefix.choose_attention(model, BF16) == FLEX
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("flash attention is not used, which is slower: ")
    assert "_flash_attention_forward" in record.getMessage()


# torch's compiler itself makes an object of an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("flash_kernel")
def test_compiled_once_flash_attention_fits_every_row_and_every_layer_of_a_kind() -> None:
    model = make_model("qwen2_sliding", num_hidden_layers=6, max_window_layers=3)
    attention.tell_windows(model)
    torch._dynamo.reset()
    varlen: Any = attention.varlen
    graphs = CompileCounter()
    compiled = torch.compile(varlen, backend=graphs, dynamic=True)
    counts = []
    for num in (3, 1, 4, 30):
        row = lay_out(make_pairs(num, seed=num))
        states = [heads.requires_grad_() for heads in states_for(row)]
        told = attention.inputs(VARLEN, row, model.config)
        for layer in model.model.layers:
            given: Any = (layer.self_attn, *states, None)
            output, _ = compiled(*given, scaling=0.3, **told)
            output.sum().backward()
            assert torch.equal(output, varlen(*given, scaling=0.3, **told)[0])
        counts.append(graphs.frame_count)
    assert [layer.self_attn.row_window for layer in model.model.layers] == [None] * 3 + [5] * 3
    assert counts == [2] * 4, "a graph for each kind of layer"
