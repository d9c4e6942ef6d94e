"""Measure this machine for plans: matrix products, memory, and a real step of a small model."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date

import torch
from transformers import LlamaConfig

from orpo_lab import api
from orpo_lab.engine import attention
from orpo_lab.engine.packing import Collator
from orpo_lab.engine.shared_prefix import SharedPrefix
from orpo_lab.methods import build
from orpo_lab.model.causal import without_adapters
from orpo_lab.model.precision import resolve_device
from orpo_lab.plan.cards import Card, device_name, this_machine
from orpo_lab.plan.memory import Step
from orpo_lab.plan.shapes import adapted, skeleton
from orpo_lab.plan.time import Work
from orpo_lab.training.devices import OneDevice

# Of the measured model: large enough to keep a device busy, small enough for seconds on a CPU
LAYERS = 4
HIDDEN = {"cuda": 4096, "cpu": 512}
TOKENS = {"cuda": 4096, "cpu": 512}
# Tokens of a pair so short that only the host's time is left
FEW = 8
REPEATS = 3


def measure() -> Card:
    """Return this machine as a card, with measured rates; a few seconds on a CPU."""
    on = resolve_device()
    narrow = torch.bfloat16 if on.type == "cuda" else torch.float32
    card = replace(this_machine(), name=device_name(), share=1.0)
    peaks = {dtype: _products(on, dtype) for dtype in {narrow, torch.float32}}
    card = replace(
        card,
        tflops=peaks[narrow] / 1e12,
        fp32_tflops=peaks[torch.float32] / 1e12,
        bandwidth_gbps=_bandwidth(on),
    )
    host, share = _step("lora", on, narrow, peaks[narrow])
    # A card has one time of the host: that of adapters, which is the longer one
    _, share_full = _step("adamw", on, narrow, peaks[narrow])
    return replace(
        card,
        host_ms_per_layer=host * 1e3,
        share=share,
        share_full=share_full,
        calibrated=str(date.today()),
    )


def _seconds(work: Callable[[], object], on: torch.device) -> float:
    """Return the least seconds of some repetitions, the device's own work included."""
    found = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        work()
        if on.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def _products(on: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product."""
    size = 8192 if on.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=on, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, on)


def _bandwidth(on: torch.device) -> float:
    """Return GB/s of a copy, read and written bytes together."""
    source = torch.ones(2**28 if on.type == "cuda" else 2**24, device=on)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 / _seconds(lambda: target.copy_(source), on)


def _step(optimizer: str, on: torch.device, dtype: torch.dtype, peak: float) -> tuple[float, float]:
    """Return the host's seconds for a layer, and the share of the peak that a step reaches.

    Args:
        optimizer: decides which weights are trained.
        on: the device.
        dtype: precision of the arithmetic.
        peak: FLOP/s of matrix products in this precision.
    """
    config = api.compose(f"optimizer={optimizer}").config
    hidden = HIDDEN[on.type]
    own = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    model = skeleton(config, own, dtype)
    work = Work.of(model, own)
    network = adapted(config, model).to_empty(device=on)
    for tensor in (*network.parameters(), *network.buffers()):
        torch.nn.init.constant_(tensor, 0.01)
    network.train()
    method = build(config)
    engine = SharedPrefix(
        network,
        Collator(10**6, 1, prompt_is_scored=method.scores_prompt, pad_token_id=0),
        method=method,
        attention_implementation=attention.possible(without_adapters(network), dtype)[0],
        devices=OneDevice(on, dtype),
    )

    def seconds(tokens: int) -> float:
        ids = [1] * (tokens // 4)
        pair = {"prompt_ids": ids * 2, "chosen_ids": ids, "rejected_ids": ids}

        def step() -> None:
            for micro_batch in engine.micro_batches([pair]):
                with engine.reading():
                    engine.devices.backward(engine.score(micro_batch, 0.1).loss)
            network.zero_grad()

        return _seconds(step, on)

    host, tokens = seconds(FEW) / LAYERS, TOKENS[on.type]
    quarter = tokens // 4
    sizes = Step(((2 * quarter, quarter, quarter),), method.scores_prompt)
    flops = work.training(sizes, checkpointing=False)
    # On cores that have other work too, this may be more than 1
    return host, flops / seconds(tokens) / peak
