"""Choose the device, the precision of weights and arithmetic, and the attention kernel."""

import importlib.util
import logging

import torch

from orpo_lab.config.optimizer import Galore, Lora, Optimizer

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, on: torch.device) -> torch.dtype:
    """Return the precision of the arithmetic: `name`, if the device supports this precision.

    Otherwise return the next supported precision of bf16, fp16, fp32.
    """
    chain = list(DTYPES)
    for candidate in chain[chain.index(name) :]:
        if _has_dtype(candidate, on):
            if candidate != name:
                log.info("model.dtype: this %s has no %s, using %s", on.type, name, candidate)
            return DTYPES[candidate]
    raise AssertionError("every device has fp32")


def _has_dtype(name: str, on: torch.device) -> bool:
    if name == "fp32":
        return True
    if on.type == "cuda":
        return name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    # Training in fp16 needs loss scaling, which transformers offers on GPUs only
    return name == "bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_attention(
    name: str, on: torch.device, dtype: torch.dtype, *, has_flash: bool = True
) -> str | None:
    """Return the attention kernel: flash_attention_2, if `name` allows it and it is possible.

    Args:
        name: the value of `model.attention`.
        on: the device.
        dtype: precision of the arithmetic.
        has_flash: whether the model's architecture supports flash attention.

    Returns:
        The kernel's name. None: transformers chooses sdpa, or eager for a model that has no sdpa.
    """
    possible = (
        has_flash
        and on.type == "cuda"
        and dtype != torch.float32
        and importlib.util.find_spec("flash_attn") is not None
    )
    if name in ("auto", "flash_attention_2") and possible:
        return "flash_attention_2"
    if name == "flash_attention_2":
        log.info(
            "model.attention: flash_attention_2 needs its package, a GPU, bf16 or fp16, and a "
            "model that knows it; using sdpa"
        )
    return "eager" if name == "eager" else None


def weight_dtype(optimizer: Optimizer, dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which the weights are stored, for arithmetic in `dtype`.

    Frozen weights are stored in `dtype`. Trained weights are stored in fp32 (master weights), since
    a bf16 weight loses small updates. Our GaLore is an exception: it rounds bf16 weights
    stochastically, so no update is lost on average.
    """
    match optimizer:
        case Lora():
            return dtype
        case Galore(implementation="orpo_lab") if dtype == torch.bfloat16:
            return dtype
    return torch.float32
