"""Find the linear layers of a model that LoRA adapts and that GaLore projects."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_lab.errors import UserError

# The largest share of the layers' weights that may be outside linear layers: routers, scans
MAX_OUTSIDE = 0.1


def projections(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of attention and MLP by name: all linear layers but the output head.

    LoRA adapts these layers, and GaLore projects them; both use this function. Quantized layers are
    `nn.Linear` too, and `Conv1D` of GPT-2 is a linear layer. In a model that also reads images or
    sound, only the layers of its language model count.

    Raises:
        UserError: there are no linear layers, or too many weights are outside of linear layers.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = dict(_language_modules(model))
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    name = type(model).__name__
    if not found:
        raise UserError(
            f"{name} has no linear layers that could be adapted or projected; use optimizer=adamw"
        )
    inside = sum(num_weights(layer) for layer in found.values())
    outside = sum(
        weight.numel()
        for module in modules.values()
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding | _ConvNd)
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2
    )
    if outside > MAX_OUTSIDE * (inside + outside):
        raise UserError(
            f"{name} has {outside / (inside + outside):.0%} of its layers' weights outside of "
            "linear layers, as experts in one parameter are: adapters, GaLore and quantization "
            "would pass them by; use optimizer=adamw"
        )
    return found


def _language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules by name; in a model for images or sound too, only its language model's."""
    if isinstance(model, PreTrainedModel) and model.config.get_text_config() is not model.config:
        kept = {id(module) for module in model.get_decoder().modules()}
        return (named for named in model.named_modules() if id(named[1]) in kept)
    return model.named_modules()


def num_weights(layer: nn.Module) -> int:
    """Return the number of weights of a layer, also of a 4-bit layer (two weights in a byte)."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return sum(weight.numel() for weight in layer.parameters())
