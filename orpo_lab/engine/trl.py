"""TRL's own ORPO step, fed with our token ids. The only module that imports its trainer."""

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
    """TRL's trainer, on rows tokenized already, with metrics that beta cannot scale."""

    def tokenize_row(self, feature: Pair, model: Any = None) -> dict[str, list[int]]:
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
        """TRL's loss and metrics, and those that beta cannot scale."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        metrics |= {key: value.item() for key, value in self._beta_free.items()}
        # TRL's log_odds_ratio is the log-sigmoid of it, negative; this is Eq. 7
        metrics["odds_ratio_loss"] = -metrics["log_odds_ratio"]
        return loss, metrics


class Trl:
    """TRL's step: see `engine.base.Engine`. Its micro-batches are of so many pairs.

    Args:
        trainer: computes loss and metrics of a micro-batch; takes no step of its own.
        micro_batch_size: pairs of a micro-batch.
        devices: where the model computes.
    """

    token_budget: int | None = None
    """None: its micro-batches cannot be made smaller."""

    def __init__(self, trainer: TrlTrainer, micro_batch_size: int, devices: OneDevice) -> None:
        self.trainer, self.micro_batch_size, self.devices = trainer, micro_batch_size, devices
        # As transformers' loop does it: the forward pass in the run's precision, its results wide
        self.model = trainer.accelerator.prepare_model(trainer.model)

    def micro_batches(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return the pairs as TRL's batches, padded.

        `num_shares` is how many losses of a micro-batch's size make the loss of all pairs.
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
        """Return a context that does nothing: TRL's batches are plain sequences."""
        return contextlib.nullcontext()

    def score(self, micro_batch: MicroBatch, beta: float) -> Score:
        """Return the mean loss of the micro-batch as a share of the step's, and its metrics."""
        self.trainer.beta = beta
        loss, metrics = self.trainer.get_batch_loss_metrics(self.model, micro_batch)
        num_pairs = micro_batch["num_pairs"]
        sums = torch.tensor(list(metrics.values()), device=loss.device) * num_pairs
        return Score(loss / micro_batch["num_shares"], Sums(tuple(metrics), sums, num_pairs))

    def halve_budget(self, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Return False: the mean of two smaller micro-batches is not TRL's loss of both."""
        return False


def build(
    config: Config, *, model: Any, tokenizer: PreTrainedTokenizerBase, devices: OneDevice
) -> Trl:
    """Return TRL's engine; the parts are those of `engine.build`."""
    assert isinstance(config.engine, TrlEngine)
    with tempfile.TemporaryDirectory() as folder, _no_bars():
        trainer = TrlTrainer(
            model=model,
            args=ORPOConfig(
                output_dir=folder,
                max_length=config.dataset.max_length,
                # TRL would zero the adapters' dropout too; that of the base is off since model.load
                disable_dropout=False,
                remove_unused_columns=False,
                gradient_checkpointing=config.train.gradient_checkpointing,
                bf16=devices.dtype == torch.bfloat16,
                fp16=devices.dtype == torch.float16,
                use_cpu=devices.device.type == "cpu",
                report_to="none",
                disable_tqdm=True,
            ),
            # TRL asks for a dataset, of which it trains on nothing here
            train_dataset=datasets.Dataset.from_list([{name: [0] for name in COLUMNS}]),
            processing_class=tokenizer,
        )
    return Trl(trainer, config.engine.micro_batch_size, devices)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Show no bars of datasets meanwhile: TRL maps its dataset three times."""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
