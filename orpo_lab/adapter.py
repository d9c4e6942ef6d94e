"""LoRA adapters on a base that may be quantized (arXiv:2106.09685, arXiv:2305.14314)."""

import logging

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from orpo_lab.config import Lora
from orpo_lab.model import projections

log = logging.getLogger(__name__)


def attach(model: PreTrainedModel, lora: Lora, *, gradient_checkpointing: bool) -> PeftModel:
    """Return the model with fp32 adapters on every attention and MLP projection, base frozen.

    The caller seeds torch first: A is drawn at random (B starts at zero).
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing
        )
    targets = sorted({name.rsplit(".", 1)[-1] for name in projections(model)})
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
        ),
    )
    trained, total = adapted.get_nb_trainable_parameters()
    log.info(
        "adapters on %s: %s of %s weights are trained",
        ", ".join(targets),
        f"{trained:,}",
        f"{total:,}",
    )
    return adapted
