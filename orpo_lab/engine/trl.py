"""TRL's own ORPO step, fed with our token ids. No other module imports TRL's trainer."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from orpo_lab.config import Config
from orpo_lab.config.engine import TrlEngine
from orpo_lab.engine.base import COLUMNS, MicroBatch, Pair, Score, Sums
from orpo_lab.training.devices import OneDevice


class TrlTrainer(ORPOTrainer):
    """TRL's trainer, for rows that are tokenized already, with added metrics free of beta."""

    def tokenize_row(self, feature: Pair, model: Any = None) -> dict[str, list[int]]:
        """Return our token ids under TRL's names; every row fits, so TRL cuts nothing off."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            completion = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + completion
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
            row[f"{side}_labels"] = [-100] * len(prompt) + completion
        return row

    def odds_ratio_loss(self, policy_chosen_logps: Any, policy_rejected_logps: Any) -> Any:
        """Return what TRL returns, and keep the metrics that TRL's own lose at beta = 0.

        TRL multiplies the rewards by beta, so at beta = 0 its rewards and accuracy are all 0.
        """
        with torch.no_grad():
            self._beta_free = {
                "preference_accuracy": (policy_chosen_logps > policy_rejected_logps).float().mean(),
                "logp_margin": (policy_chosen_logps - policy_rejected_logps).mean(),
            }
        return super().odds_ratio_loss(policy_chosen_logps, policy_rejected_logps)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return TRL's loss, and TRL's metrics together with those that are free of beta."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        metrics |= {key: value.item() for key, value in self._beta_free.items()}
        # TRL's log_odds_ratio is the log-sigmoid of the log odds ratio; Eq. 7 is its negative
        metrics["odds_ratio_loss"] = -metrics["log_odds_ratio"]
        return loss, metrics


class Trl:
    """TRL's engine, with the methods of `engine.base.Engine`; micro-batches have a fixed size.

    Args:
        trainer: computes loss and metrics of a micro-batch; its own training loop is not used.
        micro_batch_size: the number of pairs in a micro-batch.
        devices: the device that the model computes on.
    """

    token_budget: int | None = None
    """None: the micro-batches of this engine cannot be made smaller."""

    def __init__(self, trainer: TrlTrainer, micro_batch_size: int, devices: OneDevice) -> None:
        self.trainer, self.micro_batch_size, self.devices = trainer, micro_batch_size, devices
        # As in transformers' loop: the forward pass runs in the run's precision and returns fp32
        self.model = trainer.accelerator.prepare_model(trainer.model)

    def micro_batches(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return the pairs as TRL's batches, padded.

        Added to a batch are `num_pairs`, its number of pairs, and `num_shares`: the number by which
        its mean loss is divided to get its share of the step's loss.
        """
        size = self.micro_batch_size
        parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        found = []
        for part in parts:
            batch = self.trainer.data_collator([self.trainer.tokenize_row(pair) for pair in part])
            shares = {"num_pairs": len(part), "num_shares": len(pairs) / len(part)}
            found.append(self.devices.place(batch) | shares)
        return found

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that does nothing: TRL's batches are plain sequences."""
        return contextlib.nullcontext()

    def score(self, micro_batch: MicroBatch, beta: float) -> Score:
        """Return the micro-batch's share of the step's loss, and the micro-batch's metrics."""
        self.trainer.beta = beta
        loss, metrics = self.trainer.get_batch_loss_metrics(self.model, micro_batch)
        num_pairs = micro_batch["num_pairs"]
        sums = torch.tensor(list(metrics.values()), device=loss.device) * num_pairs
        nums = torch.full_like(sums, num_pairs)
        return Score(loss / micro_batch["num_shares"], Sums(tuple(metrics), sums, nums))

    def recover(self, error: BaseException, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Return False: the mean loss of two halves is not TRL's loss of the whole micro-batch."""
        return False

    def fit_budget(self, used: int, room: int) -> None:
        """Do nothing: these micro-batches have a fixed number of pairs."""


def build(
    config: Config, *, model: Any, tokenizer: PreTrainedTokenizerBase, devices: OneDevice
) -> Trl:
    """Return TRL's engine; the arguments are those of `engine.build`."""
    assert isinstance(config.engine, TrlEngine)
    with tempfile.TemporaryDirectory() as folder, _no_bars():
        trainer = TrlTrainer(
            model=model,
            args=ORPOConfig(
                output_dir=folder,
                max_length=config.dataset.max_length,
                # TRL would switch off the adapters' dropout too. `load_model` has switched off the
                # dropout of the base already
                disable_dropout=False,
                remove_unused_columns=False,
                gradient_checkpointing=config.train.gradient_checkpointing == "true",
                bf16=devices.dtype == torch.bfloat16,
                fp16=devices.dtype == torch.float16,
                use_cpu=devices.device.type == "cpu",
                report_to="none",
                disable_tqdm=True,
            ),
            # TRL requires a dataset; nothing is trained on this one
            train_dataset=datasets.Dataset.from_list([{name: [0] for name in COLUMNS}]),
            processing_class=tokenizer,
        )
    return Trl(trainer, config.engine.micro_batch_size, devices)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` inside this context: TRL maps its dataset 3 times."""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
