"""How the frozen base is stored: what is asked for, and what a folder holds already.

The config group `quantization` is read here. Its layers are those of bitsandbytes.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from orpo_lab import upstream
from orpo_lab.config import Config
from orpo_lab.config.quantization import Int8, Nf4, Quantization
from orpo_lab.errors import UserError

# What two 4-bit or two 8-bit models have to agree on to be stored alike
STORED_ALIKE = {
    "load_in_4bit": ("load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    "load_in_8bit": ("load_in_4bit", "llm_int8_threshold", "llm_int8_has_fp16_weight"),
}


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

    A folder that is quantized already brings a precision of its own to compute in. What is wrong
    with bitsandbytes' layers on CPUs is mended in `upstream`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            upstream.switch_off_repacking(module)
            setattr(module, "compute_dtype", dtype)  # noqa: B010
    upstream.mend_4bit_kernel()
