"""LoRA adapters on a base that may be quantized (arXiv:2106.09685, arXiv:2305.14314)."""

import logging
from collections.abc import Collection

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_lab.config.optimizer import Lora
from orpo_lab.errors import UserError, one_line
from orpo_lab.model.projections import projections

log = logging.getLogger(__name__)


def attach(model: PreTrainedModel, lora: Lora, *, gradient_checkpointing: bool) -> PeftModel:
    """Return the model with fp32 adapters on every attention and MLP projection, base frozen.

    The caller must seed torch first: the matrix A of an adapter is random (B is zero at first).

    Raises:
        UserError: the model has no such projections, or has layers that peft cannot adapt.
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing
        )
    layers = projections(model)
    targets = _names(model, layers)
    try:
        adapted = get_peft_model(
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
    trained, total = adapted.get_nb_trainable_parameters()
    log.info(
        "adapters on %s: %s of %s weights are trained",
        ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers})),
        f"{trained:,}",
        f"{total:,}",
    )
    return adapted


def _names(model: PreTrainedModel, layers: Collection[str]) -> list[str]:
    """Return names by which peft finds exactly these layers.

    These are the last parts of the layers' names, if no other layer has such a last part; otherwise
    the full names.
    """
    last = {name.rsplit(".", 1)[-1] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last}
    return sorted(last) if meant == set(layers) else sorted(layers)
