"""From the network of a run to a model that transformers alone loads.

An adapter changes a layer's weight by s B A (LoRA, arXiv:2106.09685, Eq. 3). A merge adds this
change to the weight in fp32, and rounds the sum once. To bf16 the sum is rounded up or down at
random so that its mean is kept: the nearest bf16 number is often that of the base alone, since a
short training changes a weight by less than half a step of bf16 (docs/export.md has figures).

The base of a quantized run is one of two:

- dequantized: the numbers that the codes stand for. The adapter was trained on these.
- 16bit: the weights before they were quantized. The adapter has never seen these.
"""

from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from orpo_lab.config.optimizer import Lora
from orpo_lab.config.quantization import Unquantized
from orpo_lab.model.causal import without_adapters
from orpo_lab.model.layers import dense_weight
from orpo_lab.model.quantization import dequantize, plain_layer
from orpo_lab.model.start import Origin
from orpo_lab.optimizer.write_back import round_to

Into = Literal["dequantized", "16bit"]


def plain(network: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without adapters and without quantization, all its weights in `dtype`.

    Args:
        network: as a run left it; changed in place.
        dtype: precision of the result.
    """
    model = without_adapters(network)
    generator = torch.Generator(model.device).manual_seed(0)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            own = layer.get_base_layer()
            weight = dense_weight(own, torch.float32) + change(layer)
            model.set_submodule(name, plain_layer(own, round_to(weight, dtype, generator)))
    if getattr(model, "hf_quantizer", None) is not None:
        dequantize(model, dtype)  # layers without an adapter, and what the model says of itself
    for weight in model.parameters():
        if weight.dtype != dtype:
            weight.data = round_to(weight.data.float(), dtype, generator)
    return model


def change(layer: LoraLayer) -> Tensor:
    """Return what the adapters of a layer add to its weight, in fp32, in the weight's shape."""
    wide: Tensor = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
    return wide.float()


def on_16bit(origin: Origin) -> Origin:
    """Return the origin of a run with its adapter on the base before it was quantized."""
    assert isinstance(origin.config.optimizer, Lora)
    lora = Lora(**asdict(origin.config.optimizer))
    config, base = (
        replace(one, optimizer=lora, quantization=Unquantized())
        for one in (origin.config, origin.base)
    )
    return replace(origin, config=config, base=base)
