"""Make the tiny model in the folder of this file: `python -m orpo_lab.tiny.make [--output FOLDER]`.

The model is a Llama of 1.1 M parameters with its own byte-level tokenizer and chat template. It is
pretrained on the embedded task families. Half of the answers in pretraining are right and half are
wrong, with one wrong answer per prompt. So the model knows both answers and prefers neither: a base
that ORPO can improve. Pretraining never shows the contents of held-out prompts. It takes about
eight minutes on two CPU cores.
"""

import argparse
import itertools
import platform
import random
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_lab.data import embedded

HERE = Path(__file__).parent
SEED = 0
CONTEXT = 256
NUM_STEPS = 3500
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
# Weight of a prompt token in the loss; a completion token has weight 1. Prompts are mostly random
# words. With weight 1 their loss would hide that of the few tokens that can be learnt.
PROMPT_WEIGHT = 0.2
NUM_HELD_OUT = 400
NUM_THREADS = 2

Row = dict[str, Any]


def main() -> None:
    """Make tokenizer and model, measure the model on held-out pairs, and write all files."""
    parser = argparse.ArgumentParser(description="Makes the tiny model.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write (default: here)")
    folder: Path = parser.parse_args().output
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    start = time.perf_counter()
    loss = pretrain(model, tokenizer)
    minutes = (time.perf_counter() - start) / 60
    figures = {
        "parameters": f"{model.num_parameters():,}",
        "pretraining": f"{NUM_STEPS} steps of {BATCH_SIZE} dialogues, {minutes:.1f} minutes",
        "final training loss": f"{loss:.3f} nats per token, prompt tokens at {PROMPT_WEIGHT}",
        **measure(model, tokenizer),
        "made": f"{date.today()} on {cpu_model()}, {NUM_THREADS} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}",
    }
    model.save_pretrained(folder)
    # By default only the owner can read the file, so other users of a checkout could not.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(figures))
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"written to {folder}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on the texts of the tasks.

    It can encode any text, and each word of the tasks is one token. A number is one token too, so
    an answer that is off by one differs in one token. The prompt ends in a special token, which
    never merges with other text. So the prompt's tokens are a prefix of the dialogue's tokens.
    """
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    pieces = Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The vocabulary size is only a limit: merging stops when every task word is one token.
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = itertools.islice(embedded.stream("train", seed=SEED), 40_000)
    corpus = (text for row in rows for text in _texts(row))
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=(HERE / "chat_template.jinja").read_text(),
    )


def _texts(row: Row) -> list[str]:
    return [row[side][0]["content"] for side in ("prompt", "chosen", "rejected")]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with random weights; its widths are multiples of 64, the block size of nf4."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Train on whole dialogues, prompts included; return the mean loss of the last 100 steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[Row] = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, NUM_STEPS)
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(batches(tokenizer), start=1):
        loss = weighted_loss(model, batch, completion_mask(tokenizer, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-99:], loss.item()]
        if step % 100 == 0:
            mean, seconds = sum(losses) / len(losses), time.perf_counter() - start
            print(f"step {step}/{NUM_STEPS}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
    model.eval()
    return sum(losses) / len(losses)


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Tensor]]:
    """Yield NUM_STEPS batches of dialogues; half end in a right answer, half in a wrong one."""
    rng = random.Random(SEED)
    rows = embedded.stream("train", seed=SEED)
    sides = ["chosen", "rejected"] * (BATCH_SIZE // 2)
    for _ in range(NUM_STEPS):
        rng.shuffle(sides)
        batch = zip(itertools.islice(rows, BATCH_SIZE), sides, strict=True)
        yield encode(tokenizer, [row["prompt"] + row[side] for row, side in batch])


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: list[Any]) -> dict[str, Tensor]:
    """Return right-padded `input_ids` and `attention_mask` of whole dialogues, each `[B, T]`."""
    rendered = tokenizer.apply_chat_template(dialogues, tokenize=False)
    batch = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def completion_mask(tokenizer: PreTrainedTokenizerFast, batch: dict[str, Tensor]) -> Tensor:
    """Return which tokens belong to the answer, end-of-sequence included, as bool `[B, T]`."""
    is_marker = batch["input_ids"].eq(tokenizer.get_vocab()["<|assistant|>"])
    after_marker = is_marker.cumsum(1) > is_marker.long()
    return after_marker & batch["attention_mask"].bool()


def weighted_loss(model: LlamaForCausalLM, batch: dict[str, Tensor], completion: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of real tokens; prompt tokens weigh PROMPT_WEIGHT."""
    weights = torch.where(completion, 1.0, PROMPT_WEIGHT) * batch["attention_mask"]
    weights = weights[:, 1:]
    return -(next_token_logps(model, batch) * weights).sum() / weights.sum()


def next_token_logps(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of every token but the first, `[B, T - 1]`, in nats."""
    logps = model(**batch).logits[:, :-1].log_softmax(-1)
    return logps.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return preference accuracy and exact match on held-out pairs, overall and per wording."""
    rows = embedded.pairs("eval", num=NUM_HELD_OUT, seed=SEED)
    chosen = mean_logps(model, tokenizer, rows, "chosen")
    rejected = mean_logps(model, tokenizer, rows, "rejected")
    preferred = (chosen > rejected).tolist()
    answers = generate(model, tokenizer, rows)
    correct = [embedded.is_correct(answer, row) for answer, row in zip(answers, rows, strict=True)]
    halves = {
        "held-out": range(len(rows)),
        "held-out, free": [i for i, row in enumerate(rows) if row["wording"] == "free"],
        "held-out, terse": [i for i, row in enumerate(rows) if row["wording"] == "terse"],
    }
    return {
        name: f"preference accuracy {sum(preferred[i] for i in picked) / len(picked):.3f}, "
        f"exact match {sum(correct[i] for i in picked) / len(picked):.3f} ({len(picked)} pairs)"
        for name, picked in halves.items()
    }


def mean_logps(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], side: str
) -> Tensor:
    """Return each row's mean log-probability of `side` given its prompt, `[B]`, in nats a token."""
    batch = encode(tokenizer, [row["prompt"] + row[side] for row in rows])
    mask = completion_mask(tokenizer, batch)[:, 1:]
    return (next_token_logps(model, batch) * mask).sum(1) / mask.sum(1)


def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> list[str]:
    """Return the greedy completions of the rows' prompts."""
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, tokenize=False
    )
    batch = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=24,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


def cpu_model() -> str:
    """Return the name of the CPU, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def card(figures: dict[str, str]) -> str:
    """Return the model card; every figure in it comes from this run of the script."""
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    families = ", ".join(embedded.FAMILIES)
    return f"""---
license: apache-2.0
library_name: transformers
---
# The tiny model

A small Llama that knows the right answer and one wrong answer to the embedded tasks ({families})
and prefers neither. It is the base that a default run of orpo_lab adapts; it is good for nothing
else. Its tokenizer is byte-level, so any text can be fed to it, but it has seen only these tasks.

Made from random weights by `python -m orpo_lab.tiny.make`, which also wrote the figures below.
It was trained on dialogues of the tasks, prompts included, half with the right and half with the
wrong answer, which is too large by one, or not in the format asked for. The contents of the
held-out prompts never appear.

| before any ORPO | |
|---|---|
{table}

Preference accuracy: the share of held-out pairs whose chosen answer has the higher mean
log-probability per token. Exact match: the share of held-out prompts whose greedy answer is right
and well-formed. Context {CONTEXT} tokens; dialogues in pretraining were shorter than 64.
"""


if __name__ == "__main__":
    main()
