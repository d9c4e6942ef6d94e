"""GaLore and QLoRA on a GPU: `python benchmarks/gpu_galore.py`, about 10 minutes on one of 80 GB.

The architecture of Mistral 7B with random weights, bf16, one pair of 1024 tokens, gradient
checkpointing. Layer-wise 8-bit GaLore of rank 128: peak memory over the first step (every basis
new) and a step that refreshes every basis; time of a step without, and of one with, a refresh.
Beside it a QLoRA step on the same batch. `parts` has time and peak memory of forward and backward,
and of the optimizer, from steps of their own: waiting for the device between the two costs a little
time. `--small` runs the same code on any device, for checking it. The last line is one JSON object.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_arguments import device_and_size, name_of
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from orpo_lab.config.optimizer import Qlora
from orpo_lab.methods.odds import log_odds_ratio
from orpo_lab.model.adapter import attach
from orpo_lab.model.projections import projections
from orpo_lab.model.quantization import prepare
from orpo_lab.optimizer import write_back
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.records.run_folder import versions

LENGTH = 1024
SMALL_LENGTH = 320
PROMPT = 256
BETA = 0.1
NUM_STEPS = 10
NUM_PARTED_STEPS = 5
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ADAM: dict[str, Any] = {
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
}


def make_model(architecture: PretrainedConfig, device: str) -> PreTrainedModel:
    """Random weights in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_qlora(architecture: PretrainedConfig, device: str) -> Any:
    """The same with linear layers in nf4, and adapters of rank 16."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(architecture, device).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": device}, dtype=torch.bfloat16
        )
    prepare(model, torch.bfloat16)
    settings = Qlora(**ADAM, r=16, alpha=16.0, dropout=0.0)
    return attach(model, settings).train()


def orpo(model: Any, ids: Tensor) -> Tensor:
    """The objective on one pair [2, T]: chosen, rejected; NLL over prompt and completion."""
    with torch.autocast(ids.device.type, torch.bfloat16):  # as runs compute in bf16
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logps = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    chosen, rejected = logps[:, PROMPT - 1 :].mean(1)
    odds = log_odds_ratio(chosen, rejected)
    return -logps[0].mean() - BETA * torch.nn.functional.logsigmoid(odds)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time, the device's own work included."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gb(device: str) -> float:
    """Peak since the last call, which starts a new one."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def add_gradients(model: Any, ids: Tensor) -> None:
    """Forward and backward of one pair."""
    orpo(model, ids).backward()


def update(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's part of a step."""
    optimizer.step()
    optimizer.zero_grad()


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """One pair, one step."""
    add_gradients(model, ids)
    update(optimizer)


def parts(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, device: str) -> dict[str, Any]:
    """Median time, and peak memory, of each part of some steps."""
    work = {
        "forward_backward": partial(add_gradients, model, ids),
        "optimizer": partial(update, optimizer),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    peaks = dict.fromkeys(work, 0.0)
    peak_gb(device)
    for _ in range(NUM_PARTED_STEPS):
        for name, part in work.items():
            times[name].append(seconds(part, device))
            peaks[name] = max(peaks[name], peak_gb(device))
    return {name: {"seconds": median(times[name]), "peak_gb": peaks[name]} for name in work}


def measure_galore(architecture: PretrainedConfig, device: str, ids: Tensor, rank: int) -> Any:
    """Layer-wise, 8-bit, every basis refreshed at the first and the last step."""
    model = make_model(architecture, device)
    low = [layer.weight for layer in projections(model).values()]
    chosen = {id(p) for p in low}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups: list[Any] = [{"params": low, "rank": rank, "update_proj_gap": NUM_STEPS + 1}]
    optimizer = GaLore(
        [*groups, {"params": others}], lr=1e-5, bits=8, layerwise=True, stagger_refresh=False
    )
    account = {
        name: {kind: size / 1e9 for kind, size in row.items()}
        for name, row in optimizer.memory().items()
    }
    peak_gb(device)
    step = partial(train_step, model, optimizer, ids)
    times = [seconds(step, device) for _ in range(NUM_STEPS + 1)]
    first_peak = peak_gb(device)
    return {
        "account_gb": account,
        "first_step_seconds": times[0],
        "step_seconds": median(times[2:]),
        "refresh_step_seconds": seconds(step, device),
        "peak_gb_with_the_first_step": first_peak,
        "peak_gb_with_a_refresh": peak_gb(device),
        "parts": parts(model, optimizer, ids, device),
        "weights_are_written_by": written_by(device),
    }


def written_by(device: str) -> str:
    """The kernel, unless it could not be used."""
    return "kernel" if device == "cuda" and not write_back._kernel_failed else "torch"


def measure_qlora(architecture: PretrainedConfig, device: str, ids: Tensor) -> Any:
    """8-bit AdamW on the adapters."""
    import bitsandbytes

    model = make_qlora(architecture, device)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(adapters, lr=1e-5)
    peak_gb(device)
    step = partial(train_step, model, optimizer, ids)
    times = [seconds(step, device) for _ in range(NUM_STEPS + 1)]
    return {
        "step_seconds": median(times[2:]),
        "peak_gb": peak_gb(device),
        "parts": parts(model, optimizer, ids, device),
    }


def main() -> None:
    """Measure both, one after the other."""
    device, small = device_and_size("GaLore and QLoRA on a GPU.")
    architecture = MistralConfig(**(SMALL if small else {}))
    length = SMALL_LENGTH if small else LENGTH
    ids = torch.randint(architecture.vocab_size, (2, length), device=device)
    galore = measure_galore(architecture, device, ids, rank=32 if small else 128)
    if device == "cuda":
        torch.cuda.empty_cache()
    qlora = measure_qlora(architecture, device, ids)
    result = {
        "device": name_of(device),
        "galore": galore,
        "qlora": qlora,
        "step_ratio": galore["step_seconds"] / qlora["step_seconds"],
        "versions": versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
