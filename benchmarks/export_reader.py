"""Read an export without the lab: called by `export.py`, a job in JSON on stdin, the replies out.

The job: `folder`; `base`, the folder of an adapter's base, or null; `quantization`, the settings of
BitsAndBytesConfig, or null; `dtype`; `plain`, whether bitsandbytes' kernel for CPUs, which computes
in bf16 whatever it is asked for, is switched off; `pairs` with `prompt_ids`, `chosen_ids` and
`rejected_ids`; `num_answers`; `max_new_tokens`.
"""

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def read(job: dict[str, Any]) -> Any:
    """Return the model of an export, as its card says to load it."""
    options: dict[str, Any] = {"dtype": job["dtype"]}
    if job["base"] is None:
        return AutoModelForCausalLM.from_pretrained(job["folder"], **options)
    if job["quantization"]:
        options["quantization_config"] = BitsAndBytesConfig(**job["quantization"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], **options)
    if job["plain"]:
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, job["folder"])


def logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Return the mean log-probability of a completion's tokens, in nats."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    own = torch.tensor(completion)[:, None]
    return float(logits.log_softmax(-1).gather(1, own).mean())


def answer(model: Any, tokenizer: Any, prompt: list[int], job: dict[str, Any]) -> str:
    """Return the greedy answer to a prompt, by the export's own generation settings."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    most = job["max_new_tokens"]
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most)
    return str(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))


@torch.no_grad()
def main() -> None:
    """Read the job, and print the replies as JSON."""
    job = json.load(sys.stdin)
    model, tokenizer = read(job).eval(), AutoTokenizer.from_pretrained(job["folder"])
    logps = [
        [logp(model, pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("chosen", "rejected")]
        for pair in job["pairs"]
    ]
    prompts = [pair["prompt_ids"] for pair in job["pairs"][: job["num_answers"]]]
    answers = [answer(model, tokenizer, prompt, job) for prompt in prompts]
    print(json.dumps({"logps": logps, "answers": answers}))


if __name__ == "__main__":
    main()
