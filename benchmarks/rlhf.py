"""RLHF by TRL: a reward model, then RLOO. `python benchmarks/rlhf.py OUT START [override ...]`

START is the folder of a run that has trained adapters, such as a run of `method=sft`. The overrides
are those of `launch.py`; OUT becomes a run folder that `python -m orpo_lab compare` reads. The lab
makes the pairs, the base model and all held-out figures. TRL trains:

1. `RewardTrainer`: adapters on the base with a head of one output, on the training pairs.
2. `RLOOTrainer`: the adapters of START go on. Each step samples NUM_SAMPLES answers to each of
   `train.batch_size` training prompts. The reward model scores them. The reference is START.

Both stages take the steps, the batch, the learning rate and the schedule of the overrides. `beta`
is the weight of the KL penalty. Needs a dataset of prompts that the tokenizer reads back from text.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from orpo_lab import api, compose, data, memory
from orpo_lab.config import Config
from orpo_lab.config.model import local_path
from orpo_lab.data import Data
from orpo_lab.evaluate import evaluate
from orpo_lab.model.precision import resolve_device, resolve_dtype
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.records import results
from orpo_lab.records.run_folder import RunFolder, git_commit, groups, versions
from orpo_lab.training.trainer import TrainStats

# Sampled answers to a prompt; each is compared with the mean of the others
NUM_SAMPLES = 4


def arguments(config: Config, folder: Path, kind: type[TrainingArguments], **more: Any) -> Any:
    """Return TRL's settings that say the same as a run's configuration."""
    train, optimizer = config.train, config.optimizer
    return kind(
        output_dir=str(folder),
        seed=config.seed,
        max_steps=train.max_steps,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.logging_steps,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=resolve_device().type == "cpu",
        **more,
    )


def train_reward_model(config: Config, pairs: Data, tokenizer: Any, folder: Path) -> Any:
    """Return a reward model that was trained on the pairs; its adapters are saved in a folder."""
    model = AutoModelForSequenceClassification.from_pretrained(
        local_path(config.model.path), num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    lora: Any = config.optimizer
    whole = pairs.train.map(
        lambda row: {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments(
            config,
            folder,
            RewardConfig,
            per_device_train_batch_size=config.train.batch_size,
            max_length=config.dataset.max_length,
        ),
        train_dataset=whole.select_columns(["chosen_ids", "rejected_ids"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="SEQ_CLS",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear",
            modules_to_save=["score"],
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(folder)
    return trainer.model.eval()


class Reward:
    """Scores answers by a reward model, on the token ids that were sampled."""

    # TRL logs a reward by this name
    __name__ = "reward_model"

    def __init__(self, model: Any, pad: int) -> None:
        self.model = model
        self.pad = pad
        self.num_tokens = 0

    @torch.no_grad()
    def __call__(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """Return the reward of each of B answers."""
        rows = [prompt + answer for prompt, answer in zip(prompt_ids, completion_ids, strict=True)]
        self.num_tokens += sum(map(len, rows))
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        on = self.model.device
        scores = self.model(input_ids=ids.to(on), attention_mask=mask.to(on)).logits
        return scores[:, 0].float().tolist()


def train_policy(
    config: Config, pairs: Data, tokenizer: Any, policy: PeftModel, reward: Reward, folder: Path
) -> None:
    """Train the policy's adapters in place by RLOO."""
    prompts = tokenizer.batch_decode(pairs.train["prompt_ids"][:])
    if tokenizer(prompts)["input_ids"] != pairs.train["prompt_ids"][:]:
        raise SystemExit("the tokenizer does not read these prompts back from their text")
    num_answers = config.train.batch_size * NUM_SAMPLES
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=reward,
        args=arguments(
            config,
            folder,
            RLOOConfig,
            per_device_train_batch_size=num_answers,
            num_generations=NUM_SAMPLES,
            max_completion_length=config.dataset.max_new_tokens,
            beta=config.beta,
        ),
        train_dataset=pairs.train.select_columns(["prompt_ids"]).add_column("prompt", prompts),
        processing_class=tokenizer,
    )
    # TRL narrows the adapters on a quantized base to bf16; the lab's other roads train them in fp32
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    trainer.train()
    policy.delete_adapter("ref")


def count_tokens(pairs: Data, sides: tuple[str, ...]) -> float:
    """Return the mean number of tokens of a pair's given columns."""
    return sum(len(ids) for side in sides for ids in pairs.train[side]) / len(pairs.train)


def train(experiment: api.Experiment, start: Path, folder: Path) -> dict[str, Any]:
    """Train both models, measure, and write a run folder; return its summary."""
    config, place = experiment.config, RunFolder(folder)
    segment = place.check(config, experiment.overrides, resume=None)
    tokenizer = load_tokenizer(config.model, load_config(config.model))
    pairs = data.load(config.dataset, tokenizer)
    dtype = resolve_dtype(config.model.dtype, resolve_device())
    set_seed(config.seed)
    base: Any = load_model(config, tokenizer, dtype)
    policy = PeftModel.from_pretrained(base, start / "final", is_trainable=True)
    before = evaluate(policy, tokenizer, pairs, config, dtype=dtype, desc="before")
    place.begin(config, groups(experiment.choices), segment)
    place.write_json("data_report.json", pairs.report)

    memory.reset_peak()
    begin = time.perf_counter()
    reward = Reward(
        train_reward_model(config, pairs, tokenizer, folder / "reward"), tokenizer.pad_token_id
    )
    train_policy(config, pairs, tokenizer, policy, reward, folder / "rloo")
    wall = time.perf_counter() - begin
    peak = memory.peak_bytes()

    policy.save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    after = evaluate(policy, tokenizer, pairs, config, dtype=dtype, desc="after")
    assert config.train.max_steps is not None
    num_pairs = config.train.max_steps * config.train.batch_size
    # The reward model reads the prompt before each completion
    of_reward = num_pairs * count_tokens(pairs, ("prompt_ids", "prompt_ids", *SIDES))
    passes = num_pairs / len(pairs.train)
    stats = TrainStats(
        steps=2 * config.train.max_steps,
        wall_seconds=wall,
        tokens_per_second=(of_reward + reward.num_tokens) / wall,
        pairs_per_second=2 * num_pairs / wall,
        peak_memory_bytes=peak,
        skipped_steps=0,
        device=resolve_device().type,
        galore_memory_bytes=None,
    )
    summary = results.summarize(segment["config_hash"], before, after, stats, pairs, place)
    summary |= {"versions": versions(), "git_commit": git_commit()}
    summary["train"]["reads"] = {
        "stages": 2,
        "passes": 2 * passes,
        "tokens": of_reward + reward.num_tokens,
        # Sampled answers are read when they are sampled, by the reference and by the reward model
        "forward_passes": 3 * passes,
        "forward_tokens": 3 * reward.num_tokens,
    }
    results.save_scores(place, before, after)
    place.write_json("summary.json", summary)
    place.set_status("finished", exit_code=0)
    return summary


SIDES = ("chosen_ids", "rejected_ids")


def main(out: str, start: str, *overrides: str) -> None:
    """Train, and print the summary."""
    print(json.dumps(train(compose(*overrides), Path(start), Path(out))))


if __name__ == "__main__":
    main(*sys.argv[1:])
