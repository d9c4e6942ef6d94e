"""TRL's own ORPO step, fed with our token ids. The only module that imports its trainer."""

from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from orpo_lab.config import Config, TrlEngine
from orpo_lab.data import Data


class TrlTrainer(ORPOTrainer):
    """TRL's trainer, on rows tokenized already, with two metrics that beta cannot scale."""

    token_budget: int | None = None
    """None: its micro-batches are of so many pairs, and none can be made smaller."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """Return our ids under TRL's names; every row fits, so TRL has nothing to cut."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            completion = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + completion
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
            row[f"{side}_labels"] = [-100] * len(prompt) + completion
        return row

    def odds_ratio_loss(self, policy_chosen_logps: Any, policy_rejected_logps: Any) -> Any:
        """Keep what TRL's metrics lose: at beta = 0 its rewards, and so its accuracy, are all 0."""
        with torch.no_grad():
            self._beta_free = {
                "preference_accuracy": (policy_chosen_logps > policy_rejected_logps).float().mean(),
                "logp_margin": (policy_chosen_logps - policy_rejected_logps).mean(),
            }
        return super().odds_ratio_loss(policy_chosen_logps, policy_rejected_logps)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """TRL's, plus the two metrics."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        prefix = "eval_" if train_eval == "eval" else ""
        metrics |= {prefix + key: value.item() for key, value in self._beta_free.items()}
        # TRL's log_odds_ratio is the log-sigmoid of it, negative; this is Eq. 7
        metrics[f"{prefix}odds_ratio_loss"] = -metrics[f"{prefix}log_odds_ratio"]
        return loss, metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the card in `final/` says what was measured."""


def build(
    config: Config,
    *,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    arguments: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    callbacks: list[TrainerCallback],
) -> ORPOTrainer:
    """Return a trainer around TRL's step.

    Args:
        config: the run; `engine` is a `TrlEngine`.
        model: on its device, with adapters if it has any.
        tokenizer: with a pad token.
        data: tokenized pairs that fit `dataset.max_length`.
        arguments: what every engine hands to `transformers.TrainingArguments`.
        optimizer: of the model's trainable parameters; its schedule is the trainer's.
        callbacks: beside transformers' own.
    """
    assert isinstance(config.engine, TrlEngine)
    batch_size, micro_batch_size = config.train.batch_size, config.engine.micro_batch_size
    args = ORPOConfig(
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // micro_batch_size,
        beta=config.beta,
        max_length=config.dataset.max_length,
        # TRL would zero the adapters' dropout too; that of the base is off since model.load
        disable_dropout=False,
        remove_unused_columns=False,
        **arguments,
    )
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # TRL maps six times over rows that are ready
    try:
        return TrlTrainer(
            model=model,
            args=args,
            train_dataset=data.train.select_columns(ids),
            eval_dataset=data.held_out.select_columns(ids) if config.train.eval_steps else None,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            callbacks=callbacks,
        )
    finally:
        if not bars:
            datasets.enable_progress_bars()
