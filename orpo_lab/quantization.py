"""How the frozen base is stored: what is asked for, what a folder holds already, and two mends.

The config group `quantization` is read here. Its layers are those of bitsandbytes.
"""

import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from orpo_lab.config import Config, Int8, Nf4, Quantization
from orpo_lab.errors import UserError

# What two 4-bit or two 8-bit models have to agree on to be stored alike
STORED_ALIKE = {
    "load_in_4bit": ("load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    "load_in_8bit": ("load_in_4bit", "llm_int8_threshold", "llm_int8_has_fp16_weight"),
}

# A kernel that takes codes, their blocks' constants, block size, type, shape and precision
Dequantize = Callable[[Tensor, Tensor, int, str, tuple[int, ...], torch.dtype], Tensor]


def settings(config: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what transformers hands to bitsandbytes; None for weights as they are."""
    match config:
        case Nf4(double_quantization=double):
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=dtype,
            )
        case Int8(outlier_threshold=threshold):
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return None


def stored(model: PretrainedConfig) -> dict[str, Any] | None:
    """Return how a folder's weights are quantized already; None: they are not."""
    for config in (model, model.get_text_config()):
        own = getattr(config, "quantization_config", None)
        if own:
            return dict(own if isinstance(own, dict) else own.to_dict())
    return None


def check(config: Config, model: PretrainedConfig) -> None:
    """Refuse weights that are quantized already, unless they are so in the way that is asked for.

    transformers takes a folder's own quantization whatever it is told, or trains on raw codes.

    Args:
        config: the run.
        model: the model's own configuration.

    Raises:
        UserError: the weights are stored in another way than `quantization` says.
    """
    own = stored(model)
    if own is None:
        return
    asked = settings(config.quantization, torch.float32)
    found = _of_bitsandbytes(own)
    if found is None:
        raise UserError(
            f"model.path={config.model.path} is stored as {own.get('quant_method', 'codes')}, "
            "which is not trained here; give the same model in bf16, fp16 or fp32"
        )
    if asked is None or _way(asked) != _way(found):
        raise UserError(
            f"model.path={config.model.path} is quantized already, otherwise than asked for; "
            f"{_remedy(found)}"
        )


def _of_bitsandbytes(own: dict[str, Any]) -> BitsAndBytesConfig | None:
    """Return a folder's quantization as bitsandbytes knows it; None: it is another library's."""
    if own.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if not own.get("load_in_4bit") and not own.get("load_in_8bit"):
        return None
    return BitsAndBytesConfig.from_dict(own)


def _way(config: BitsAndBytesConfig) -> dict[str, Any]:
    """Return what tells one way of storing weights from another."""
    kind = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    return {name: getattr(config, name) for name in (kind, *STORED_ALIKE[kind])}


def _remedy(found: BitsAndBytesConfig) -> str:
    """Return what to change so that a folder's own quantization is the one asked for."""
    if found.load_in_4bit and found.bnb_4bit_quant_type == "nf4":
        double = str(found.bnb_4bit_use_double_quant).lower()
        keys = f"quantization=nf4 quantization.double_quantization={double}"
    elif found.load_in_8bit and not found.llm_int8_has_fp16_weight:
        keys = f"quantization=int8 quantization.outlier_threshold={found.llm_int8_threshold:g}"
    else:
        return "give the same model in bf16, fp16 or fp32"
    return f"use optimizer=qlora {keys}, or give the same model in bf16, fp16 or fp32"


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the 4-bit layers of a loaded model compute rightly, and in `dtype`.

    - A folder that is quantized already brings a precision of its own to compute in.
    - Where the CPU has avx512_bf16, `Linear4bit.forward` repacks its weights in evaluation mode and
      the next backward pass misreads them: the loss looks right and the gradients are noise
      (bitsandbytes 0.50.2). The attribute is the switch that its own code asks.
    - On CPUs with AVX-512 some widths are dequantized wrongly: see `dequantize_by_block`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (not in its type)
            setattr(module, "compute_dtype", dtype)  # noqa: B010
    mend_cpu_kernel()


def dequantize_by_block(kernel: Dequantize) -> Dequantize:
    """Return `kernel`, given its weights as rows of one block each where rows cut blocks.

    With AVX-512 the CPU kernel of bitsandbytes 0.50.2 looks for the constants of a row's blocks
    at `row * (width // block size)`. Blocks run on from row to row, so that is another block's
    constant where the width is no multiple of the block size (csrc/cpu_ops.cpp,
    `dequantizeBlockwise4bitCpu`). Which numbers share a block does not depend on the shape: a
    shape whose rows are blocks gives the right constants, and the same bits.

    This can go when tests/test_quantization.py passes without it on a CPU with AVX-512.
    """

    def dequantize(
        codes: Tensor,
        constants: Tensor,
        block_size: int,
        kind: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        size = prod(shape)
        if shape[-1] % block_size == 0:
            rows = tuple(shape)
        else:  # a block that is not full has no row: then all is one row
            rows = (1, size) if size % block_size else (size // block_size, block_size)
        return kernel(codes, constants, block_size, kind, rows, dtype).view(*shape)

    return dequantize


@cache
def mend_cpu_kernel() -> torch.library.Library:
    """Put `dequantize_by_block` in the place of bitsandbytes' own kernel, once a process.

    Returns:
        What holds it there for as long as it lives.
    """
    import bitsandbytes  # noqa: F401  (its kernels are registered by the import)

    name = "bitsandbytes::dequantize_4bit"
    theirs = torch.library.get_kernel(name, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def kernel(*arguments: Any) -> Tensor:
        return theirs.call_boxed(keys, *arguments)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # torch says that a kernel is overridden; that is what this is for
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, dequantize_by_block(kernel), "CPU")
    return library
