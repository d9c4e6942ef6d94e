"""4-bit and 8-bit bases: the numbers they stand for, and folders that are quantized already."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor
from transformers import AutoConfig

from orpo_lab import config, upstream
from orpo_lab.errors import UserError
from orpo_lab.model import quantization
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model

Load = Callable[..., config.Config]

# Multiples of 16 that are none of a block of 64, where a kernel with AVX-512 goes wrong, and one
# that is no multiple of 16
WIDTHS = [96, 288, 352, 1000]
PRECISIONS = [torch.float32, torch.bfloat16]


def codes_times_absmax(codes: Tensor, state: Any, shape: tuple[int, ...]) -> Tensor:
    """What 4-bit codes stand for by QLoRA's definition (arXiv:2305.14314), in fp64: `[N, K]`.

    Two codes a byte, the high half first; one constant for every 64 numbers in a row, itself an
    8-bit code times a constant for every 256 of them, plus a mean.
    """
    constants = state.absmax.double()
    if state.nested:
        scales = state.state2.absmax.double().repeat_interleave(256)[: len(constants)]
        constants = state.state2.code.double()[state.absmax.long()] * scales + state.offset.double()
    bytes_ = codes.flatten().long()
    halves = torch.stack([bytes_ // 16, bytes_ % 16], 1).flatten()
    table = functional.get_4bit_type("nf4", device="cpu").double()
    return (table[halves] * constants.repeat_interleave(64)[: len(halves)]).view(shape)


def with_avx512(
    codes: Tensor, constants: Tensor, block_size: int, kind: str, shape: Any, dtype: torch.dtype
) -> Tensor:
    """The kernel of bitsandbytes 0.50.2 on a CPU with AVX-512, its fault included.

    As csrc/cpu_ops.cpp has it: a row's first block is sought at row * (width // block size).
    """
    rows, width = shape
    bytes_ = codes.flatten().long()
    halves = torch.stack([bytes_ // 16, bytes_ % 16], 1).view(rows, width)
    column, row = torch.arange(width), torch.arange(rows)[:, None]
    block = row * (width // block_size) + column // block_size
    if width % 16:  # its way without vectors
        block = (row * width + column) // block_size
    table = functional.get_4bit_type(kind, device="cpu")
    return (table[halves] * constants[block]).to(dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_4_bits_stand_for_codes_times_absmax(width: int, dtype: torch.dtype, nested: bool) -> None:
    upstream.mend_4bit_kernel()
    # 9 rows of any of these widths end in a block that is not full
    for num_rows in (64, 9):
        weight = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=nested
        )
        right = codes_times_absmax(codes, state, weight.shape)
        assert (right - weight).norm() < 0.12 * weight.double().norm()
        found = functional.dequantize_4bit(codes, state)
        assert found.dtype == dtype
        limit = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        assert ((found - right).abs() <= limit * right.abs() + 1e-9).all()


@pytest.mark.parametrize("width", [64, 128, *WIDTHS])
def test_rows_of_blocks_mend_the_kernel_with_avx512(width: int) -> None:
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    right = codes_times_absmax(codes, state, weight.shape).float()
    arguments = (codes, state.absmax, 64, "nf4", tuple(weight.shape), torch.float32)
    faulty = width % 64 != 0 and width % 16 == 0
    assert torch.allclose(with_avx512(*arguments), right, rtol=1e-6) != faulty
    mended = upstream.dequantize_by_block(with_avx512)
    assert torch.allclose(mended(*arguments), right, rtol=1e-6)


@pytest.fixture(params=["this CPU", "one with AVX-512"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The mended kernel, also as it would be on another CPU."""
    if request.param == "this CPU":
        yield request.param
        return
    mend = upstream.dequantize_by_block
    monkeypatch.setattr(upstream, "dequantize_by_block", lambda kernel: mend(with_avx512))
    library = upstream.mend_4bit_kernel.__wrapped__()
    yield request.param
    library._destroy()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_4_bit_layer_is_the_layer_of_its_dequantized_weights(
    kernel: str, width: int, dtype: torch.dtype
) -> None:
    """Forward in training and in evaluation, gradient, and after its state was saved."""
    generator = torch.Generator().manual_seed(0)
    layer = bnb.nn.Linear4bit(width, 48, bias=False, quant_type="nf4", compute_dtype=torch.float16)
    weight = torch.randn(48, width, generator=generator).to(dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    quantization.prepare(layer, dtype)
    state: Any = layer.weight.quant_state
    right = codes_times_absmax(layer.weight.data, state, weight.shape).to(dtype)
    given = torch.randn(5, width, generator=generator).to(dtype)
    passed_back = torch.randn(5, 48, generator=generator).to(dtype)
    for training in (True, False, True):
        layer.train(training)
        inputs = given.clone().requires_grad_(training)
        output = layer(inputs)
        assert_near(output, given @ right.T)
        if training:
            output.backward(passed_back)
            assert inputs.grad is not None
            assert_near(inputs.grad, passed_back @ right)
        layer.state_dict()


NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
DOUBLE: dict[str, Any] = {"bnb_4bit_use_double_quant": True}
INT8: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 3.0}
SINGLE = "quantization.double_quantization=false"
IN_8_BITS = "quantization=int8"
THRESHOLD = "quantization.outlier_threshold=3"


@pytest.mark.parametrize(
    ("found", "asked", "said"),
    [
        (NF4 | DOUBLE, [], None),
        (NF4 | DOUBLE, [SINGLE], "nf4 quantization.double_quantization=true, or"),
        (NF4, [SINGLE], None),
        (NF4, [], f"use optimizer=qlora quantization=nf4 {SINGLE}, or"),
        (NF4 | DOUBLE, ["optimizer=lora"], "use optimizer=qlora quantization=nf4"),
        (FP4 | DOUBLE, [], "otherwise than asked for; give the same model in bf16"),
        (FP4, [SINGLE], "otherwise than asked for; give the same model in bf16"),
        (INT8, [IN_8_BITS, THRESHOLD], None),
        (INT8, [IN_8_BITS], f"use optimizer=qlora {IN_8_BITS} {THRESHOLD}, or"),
        (INT8, [], f"use optimizer=qlora {IN_8_BITS} {THRESHOLD}, or"),
        ({"quant_method": "gptq", "bits": 4}, [], "is stored as gptq"),
    ],
)
@pytest.mark.parametrize("place", ["model", "model that also sees", "its language model"])
def test_a_folder_that_is_quantized_is_taken_where_it_is_so_as_asked(
    load: Load, found: dict[str, Any], asked: list[str], said: str | None, place: str
) -> None:
    own = AutoConfig.for_model("llama" if place == "model" else "gemma3")
    is_within = place == "its language model"
    (own.get_text_config() if is_within else own).quantization_config = found
    with pytest.raises(UserError, match=said) if said else nullcontext():
        quantization.check(load(*asked), own)


def test_settings_reach_bitsandbytes(load: Load) -> None:
    for asked, key, value in (
        ([], "bnb_4bit_quant_type", "nf4"),
        ([], "bnb_4bit_use_double_quant", True),
        ([SINGLE], "bnb_4bit_use_double_quant", False),
        ([IN_8_BITS], "llm_int8_threshold", 6.0),
        ([IN_8_BITS, THRESHOLD], "llm_int8_threshold", 3.0),
    ):
        made = quantization.settings(load(*asked).quantization, torch.bfloat16)
        assert getattr(made, key) == value


def test_a_base_in_4_bits_has_the_kernel_mended() -> None:
    upstream.mend_4bit_kernel.cache_clear()
    quantization.prepare(torch.nn.Linear(2, 2), torch.float32)
    assert upstream.mend_4bit_kernel.cache_info().currsize == 1


def assert_near(found: Tensor, right: Tensor) -> None:
    """Equal to the rounding of a sum of a thousand products."""
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[found.dtype]
    assert found.dtype == right.dtype
    assert (found - right).abs().max() <= limit * right.abs().max()


def test_a_4_bit_base_of_width_288_starts_where_the_unquantized_one_does(
    load: Load, assets: Any
) -> None:
    """stories15M: four bits cost little, other blocks' constants cost two nats."""
    nll = {}
    texts = ["Once upon a time, there was a little girl named Lily.", "Tom had a red ball."]
    for optimizer in ("lora", "qlora"):
        path = assets / "models" / "stories15M"
        loaded = load(f"optimizer={optimizer}", "model=local", f"model.path={path}")
        tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
        network = load_model(loaded, tokenizer, torch.float32)
        ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
        with torch.no_grad():
            losses = [network(input_ids=row, labels=row).loss.item() for row in ids]
        nll[optimizer] = sum(losses) / len(losses)
    assert abs(nll["qlora"] - nll["lora"]) < 0.3
