"""LoRA adapters on a base that may be quantized (arXiv:2106.09685, arXiv:2305.14314)."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_lab.config.optimizer import Lora
from orpo_lab.errors import UserError, one_line
from orpo_lab.model.projections import projections
from orpo_lab.model.weights import check_loaded

log = logging.getLogger(__name__)

# peft's name for the file of an adapter's weights
ADAPTER = "adapter_model.safetensors"
NARROW = (torch.bfloat16, torch.float16)
# Layers whose weights are stored as they were loaded, quantized or in 16 bits
STORED_NARROW = (nn.Linear, Conv1D, nn.Embedding)


def attach(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Return the model with fp32 adapters on every attention and MLP projection, base frozen.

    The caller must seed torch first: the matrix A of an adapter is random (B is zero at first).

    Raises:
        UserError: the model has no such projections, or has layers that peft cannot adapt.
    """
    widen(model)
    adapted = put_on(model, lora)
    trained, total = adapted.get_nb_trainable_parameters()
    names = adapted.base_model.targeted_module_names
    log.info(
        "adapters on %s: %s of %s weights are trained",
        ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})),
        f"{trained:,}",
        f"{total:,}",
    )
    return adapted


def put_on(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Return the model with adapters, and leave the precision of its own weights as it is.

    Raises:
        UserError: see `attach`.
    """
    layers = projections(model)
    targets = _names(model, layers)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                # The layers of GPT-2 hold their weights transposed
                fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
            ),
        )
    except ValueError as error:
        raise UserError(
            f"adapters cannot be put on {type(model).__name__} ({one_line(error)[:200]}); use "
            "optimizer=adamw"
        ) from error


def load_adapter(adapted: PeftModel, folder: Path) -> None:
    """Load the weights of the adapters from a folder.

    Raises:
        UserError: the folder holds adapters for another model, or none that can be read.
    """
    file = folder / ADAPTER
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)[:200]}") from error
    found: Any = set_peft_model_state_dict(adapted, weights, adapter_name=adapted.active_adapter)
    check_loaded(adapted, found.missing_keys, found.unexpected_keys)


def widen(model: PreTrainedModel) -> None:
    """Let a model compute its norms and its sum of layers (the residual stream) in fp32.

    In 16 bits the residual stream alone doubles the error of the adapters' gradients
    (`benchmarks/exactness.py`). Linear layers and embeddings stay in the precision that they are
    stored in. The embeddings' output is cast to fp32, which gives the numbers of fp32 embeddings.
    """
    embedding = model.get_input_embeddings()
    for module in model.modules():
        is_scaled = isinstance(module, nn.Embedding) and type(module) is not nn.Embedding
        # An embedding of a class of its own (Gemma 3) rounds its scale to its weight's precision
        if is_scaled or not isinstance(module, STORED_NARROW):
            for weight in module.parameters(recurse=False):
                if weight.dtype in NARROW:
                    weight.data = weight.data.float()
    if embedding.weight.dtype in NARROW:
        embedding.register_forward_hook(_to_fp32)


def _to_fp32(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()


def _names(model: PreTrainedModel, layers: Collection[str]) -> list[str]:
    """Return names by which peft finds exactly these layers.

    These are the last parts of the layers' names, if no other layer has such a last part; otherwise
    the full names.
    """
    last = {name.rsplit(".", 1)[-1] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last}
    return sorted(last) if meant == set(layers) else sorted(layers)
