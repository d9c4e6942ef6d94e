"""The attention functions for rows on a GPU: `python benchmarks/gpu_attention.py`, about a minute.

One attention layer of Mistral 7B's shape (32 heads, 8 key heads of 128) on random numbers, over the
fullest row of 8,192 tokens that UltraFeedback-like pairs make, with all tokens seen and with a
window of 256. Flash and flex attention in bf16, forward and backward: median time and peak memory,
and the relative error (Frobenius norm) of the output and of the gradients of queries, keys and
values against attention pair by pair in fp32. `--small` checks the script without a GPU: a small
layer, pair by pair and flex attention's forward pass alone, which is all that a CPU has. The last
line is one JSON object.
"""

import functools
import json
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from gpu_arguments import device_and_size, name_of
from gpu_galore import peak_gb, seconds
from step import CAP, Case, random_pairs
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import MistralConfig
from transformers.integrations.flex_attention import flex_attention_forward

from orpo_lab.engine import attention
from orpo_lab.engine.packing import Collator
from orpo_lab.records.run_folder import versions
from orpo_lab.training.devices import OneDevice
from orpo_lab.upstream import silence

BUDGET, NUM_PAIRS, NUM_TIMES = 8192, 32, 20
WINDOWS = {"all_tokens": None, "window_256": 256}
NAMES = ("output", "queries", "keys", "values")


def make_row(budget: int, limit: int, device: str) -> dict[str, Any]:
    """The fullest row of some pairs, whose parts have at most `limit` tokens."""
    pairs = random_pairs(Case(vocabulary=1000, batches=NUM_PAIRS // 4))
    cut = [{side: ids[:limit] for side, ids in pair.items()} for pair in pairs]
    collator = Collator(
        budget=budget, multiple=attention.BLOCK, prompt_is_scored=True, pad_token_id=0
    )
    row = max(collator(cut), key=lambda row: sum(map(sum, row["sizes"])))
    return OneDevice(torch.device(device), torch.bfloat16).place(row)


def eager_flex(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, *, attention_mask: Any, scaling: float
) -> Any:
    """Flex attention by its definition; compiled, flex attention is for GPUs."""
    output = flex_attention(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


GPU = {
    attention.VARLEN: attention.varlen,
    attention.FLEX: flex_attention_forward,
    attention.BY_PAIR: attention.by_pair,
}
CPU = {attention.FLEX: eager_flex, attention.BY_PAIR: attention.by_pair}


def forward(function: Any, layer: Any, states: list[Tensor], told: dict[str, Any]) -> list[Tensor]:
    """The output alone: flex attention has no backward pass on a CPU."""
    return [function(layer, *states, scaling=states[0].shape[-1] ** -0.5, **told)[0].float()]


def errors(seen: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative errors of the output and of what gradients there are."""
    return {
        name: float(f"{float((a - b).norm() / b.norm()):.2g}")
        for name, a, b in zip(NAMES, seen, exact, strict=False)
    }


def measure(work: Callable[[], list[Tensor]], exact: list[Tensor], device: str) -> dict[str, Any]:
    """Time and memory of one way, and how exact it is."""
    found = errors(work(), exact)  # compiles
    peak_gb(device)
    milliseconds = [1000 * seconds(work, device) for _ in range(NUM_TIMES)]
    return {
        "milliseconds": round(median(milliseconds), 3),
        "peak_gb": round(peak_gb(device), 2),
        "errors": found,
    }


def compare(architecture: MistralConfig, row: dict[str, Any], device: str) -> dict[str, Any]:
    """Measure all ways that the device has, with one window."""
    num, num_keys = architecture.num_attention_heads, architecture.num_key_value_heads
    layer = SimpleNamespace(
        row_window=architecture.sliding_window,
        num_key_value_groups=num // num_keys,
        is_causal=True,
        training=True,
    )
    size, width = architecture.head_dim, row["input_ids"].shape[1]
    numbers = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, width, size, generator=numbers).to(device, torch.bfloat16)
        for heads in (num, num_keys, num_keys)
    ]

    wide = [heads.float() for heads in states]
    exact = attention.with_gradients(
        attention.by_pair, layer, wide, attention.inputs(attention.BY_PAIR, row, architecture)
    )
    report = {}
    for name, function in (GPU if device == "cuda" else CPU).items():
        told = attention.inputs(name, row, architecture)  # once for all layers of a model
        run = forward if function is eager_flex else attention.with_gradients
        work = functools.partial(run, function, layer, states, told)
        report[name] = measure(work, exact, device)
    return report


def main() -> None:
    """Measure with and without a window and print the figures."""
    device, small = device_and_size("The attention functions for rows on a GPU.")
    silence()
    row = make_row(512, 64, device) if small else make_row(BUDGET, CAP, device)
    heads = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    report: dict[str, Any] = {"num_pairs": len(row["sizes"]), "tokens": row["input_ids"].numel()}
    for name, window in WINDOWS.items():
        window = min(window, 32) if window and small else window
        architecture = MistralConfig(sliding_window=window, **(heads if small else {}))
        report[name] = compare(architecture, row, device)
        print(name, json.dumps(report[name]), flush=True)
    print(json.dumps(report | {"device": name_of(device), "versions": versions()}))


if __name__ == "__main__":
    main()
