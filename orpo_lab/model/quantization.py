"""Quantization of the frozen base: the one in the configuration, and the one of the folder.

This module reads the config group `quantization`. The quantized layers are those of bitsandbytes.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from orpo_lab import upstream
from orpo_lab.config import Config
from orpo_lab.config.quantization import Int8, Nf4, Quantization
from orpo_lab.errors import UserError
from orpo_lab.model.layers import dense_weight

# The settings that must be equal for two 4-bit or two 8-bit models to be stored in the same way
STORED_ALIKE = {
    "load_in_4bit": ("load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    "load_in_8bit": ("load_in_4bit", "llm_int8_threshold", "llm_int8_has_fp16_weight"),
}


def settings(config: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the settings that transformers passes to bitsandbytes; None: no quantization."""
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
    """Return the quantization settings that a folder's weights are stored with; None: no such."""
    for config in (model, model.get_text_config()):
        own = getattr(config, "quantization_config", None)
        if own:
            return dict(own if isinstance(own, dict) else own.to_dict())
    return None


def check(config: Config, model: PretrainedConfig) -> None:
    """Refuse weights that are stored in another quantization than the run's configuration says.

    transformers would silently use the quantization of the folder, or train on raw codes.

    Args:
        config: the run's configuration.
        model: the model's own configuration.

    Raises:
        UserError: the weights are quantized already, in another way than `quantization` says.
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
    """Return a folder's quantization as bitsandbytes settings; None: another library made it."""
    if own.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if not own.get("load_in_4bit") and not own.get("load_in_8bit"):
        return None
    return BitsAndBytesConfig.from_dict(own)


def _way(config: BitsAndBytesConfig) -> dict[str, Any]:
    """Return the settings that decide how weights are stored."""
    kind = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    return {name: getattr(config, name) for name in (kind, *STORED_ALIKE[kind])}


def _remedy(found: BitsAndBytesConfig) -> str:
    """Return, in words, what to change so that the configuration fits the folder's quantization."""
    if found.load_in_4bit and found.bnb_4bit_quant_type == "nf4":
        double = str(found.bnb_4bit_use_double_quant).lower()
        keys = f"quantization=nf4 quantization.double_quantization={double}"
    elif found.load_in_8bit and not found.llm_int8_has_fp16_weight:
        keys = f"quantization=int8 quantization.outlier_threshold={found.llm_int8_threshold:g}"
    else:
        return "give the same model in bf16, fp16 or fp32"
    return f"use optimizer=qlora {keys}, or give the same model in bf16, fp16 or fp32"


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the 4-bit layers of a loaded model compute correctly, and in `dtype`.

    A folder that is quantized already has its own precision of the arithmetic, which is replaced
    here. `upstream` mends the faults of bitsandbytes' layers on CPUs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            upstream.switch_off_repacking(module)
            setattr(module, "compute_dtype", dtype)  # noqa: B010
    upstream.mend_4bit_kernel()


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace a model's quantized layers by plain ones, with the weights that the engine reads.

    Args:
        model: changed in place; a folder that it is saved to then says nothing of quantization.
        dtype: precision of the new layers' weights.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit | Linear8bitLt):
            model.set_submodule(name, plain_layer(layer, dense_weight(layer, dtype)))
    model.hf_quantizer.remove_quantization_config(model)


def plain_layer(layer: Any, weight: torch.Tensor) -> nn.Module:
    """Return a layer with another weight: the layer itself, or a plain one if it is quantized.

    Args:
        layer: a base layer of adapters.
        weight: as the layer stores it: [out, in], or transposed in GPT-2.
    """
    if isinstance(layer, Linear4bit | Linear8bitLt):
        bias = layer.bias
        layer = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        layer.bias = bias
    layer.weight = nn.Parameter(weight)
    return layer
