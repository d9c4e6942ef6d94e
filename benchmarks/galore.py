"""What a GaLore step costs: `python benchmarks/galore.py`, about 15 minutes on one CPU core.

On a Llama of 110 M parameters, rank 128, fp32, in one interleaved run: CPU time of a step without a
refresh, of the refresh of every basis, and of the steps of staggered periods; then, in processes of
their own, the memory that each optimizer adds. apollo-torch takes part where it is installed. The
last line is one JSON object; a ratio above 1 is in favour of our GaLore, except `stagger_ratio`.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_lab.memory import peak_bytes
from orpo_lab.model.projections import projections
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.records.run_folder import versions

RANK = 128
SCALE = 0.25
# Longer than any part of the benchmark, so that only the first step takes a basis
NEVER = 10**9
# Above the number of projected weights, so that some steps of a period carry no refresh
PERIOD = 100
NUM_PERIODS = 5

Times = dict[str, list[float]]


def make_model() -> LlamaForCausalLM:
    """A randomly initialised Llama with a tied head."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            tie_word_embeddings=True,
        )
    )


def groups(model: LlamaForCausalLM, **settings: Any) -> list[dict[str, Any]]:
    """The linear layers of attention and MLP projected, the rest not."""
    low = [layer.weight for layer in projections(model).values()]
    chosen = {id(p) for p in low}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": low, "rank": RANK, "scale": SCALE, **settings}, {"params": others}]


def ours(model: LlamaForCausalLM, **settings: Any) -> GaLore:
    settings = {"update_proj_gap": NEVER, "stagger_refresh": False, **settings}
    gap = settings.pop("update_proj_gap")
    return GaLore(groups(model, update_proj_gap=gap), lr=1e-4, **settings)


def galore_torch(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    settings = {"update_proj_gap": NEVER, "proj_type": "std"}
    return GaLoreAdamW(groups(model, **settings), lr=1e-4, no_deprecation_warning=True)


def adamw(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def adamw_8bit(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)


def apollo(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """APOLLO as transformers' `apollo_adamw` sets it up, at our rank."""
    from apollo_torch import APOLLOAdamW

    settings = {"proj": "random", "scale_type": "channel", "scale": 1.0, "proj_type": "std"}
    return APOLLOAdamW(groups(model, **settings, update_proj_gap=NEVER), lr=1e-4)


OPTIMIZERS: dict[str, Callable[[LlamaForCausalLM], torch.optim.Optimizer]] = {
    "ours": ours,
    "ours_8bit": partial(ours, bits=8),
    "ours_layerwise": partial(ours, layerwise=True),
    "ours_layerwise_8bit": partial(ours, layerwise=True, bits=8),
    "galore_torch": galore_torch,
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
}
if importlib.util.find_spec("apollo_torch"):
    OPTIMIZERS["apollo"] = apollo


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def show(name: str, times: list[float]) -> None:
    print(f"{name:32} median {1000 * median(times):9.1f} ms  of {len(times)}", flush=True)


def time_steps(num: int) -> Times:
    """CPU seconds of steps without a refresh; every optimizer has its own copy of the weights."""
    gradients = [torch.randn_like(p) * 1e-3 for p in make_model().parameters()]
    made = {}
    for name in OPTIMIZERS:
        if "layerwise" not in name:  # the same arithmetic, spread over the backward pass
            model = make_model()
            made[name] = OPTIMIZERS[name](model)
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
    times: Times = defaultdict(list)
    for round_ in range(num + 1):
        for name, optimizer in made.items():
            seconds = cpu_seconds(optimizer.step)
            if round_:  # the first takes bases and makes states
                times[name].append(seconds)
    for name, measured in times.items():
        show(f"step, {name}", measured)
    return times


def time_refreshes() -> Times:
    """CPU seconds of one new basis for every projected weight."""
    from galore_torch.galore_projector import GaLoreProjector

    model = make_model()
    warm, randomized, exact = (
        ours(model, refresh=refresh) for refresh in ("warm", "randomized", "exact")
    )
    for optimizer in (warm, randomized, exact):
        optimizer.num_steps = 1  # not the first step, for which warm has no basis to start from
    times: Times = defaultdict(list)
    for i, slot in enumerate(warm._slots):
        gradient = torch.randn(slot.weight.shape)
        projector = GaLoreProjector(RANK)
        side = slot.side
        work: dict[str, Callable[[], Any]] = {
            "galore_torch": partial(projector.get_orthogonal_matrix, gradient, RANK, type=side),
            "exact": partial(exact._refresh, exact._slots[i], gradient),
            "randomized": partial(randomized._refresh, randomized._slots[i], gradient),
            "warm": partial(warm._refresh, slot, gradient),
        }
        with torch.no_grad():
            for name, take in work.items():
                times[name].append(cpu_seconds(take))
    for name, measured in times.items():
        print(f"refresh of all bases, {name:14} {sum(measured):8.2f} s of {len(measured)} weights")
    return times


def time_periods() -> Times:
    """CPU seconds of the steps of staggered periods, with and without a refresh in them."""
    model = make_model()
    optimizer = ours(model, update_proj_gap=PERIOD, stagger_refresh=True)
    assert len(optimizer._slots) < PERIOD
    phases = {slot.phase for slot in optimizer._slots}
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    times: Times = defaultdict(list)
    for step in range(NUM_PERIODS * PERIOD + 1):
        seconds = cpu_seconds(optimizer.step)
        if step:
            times["with" if step % PERIOD in phases else "without"].append(seconds)
    for name, measured in times.items():
        show(f"staggered step {name} refresh", measured)
    return times


def gradient_peak(*, layerwise: bool) -> dict[str, int]:
    """Peak bytes of gradients and rank-r buffers, over the first step and one with a refresh.

    Two micro-batches a step. Looked at whenever autograd hands over a gradient, before the
    optimizer sees it.
    """
    model = make_model()
    low = [layer.weight for layer in projections(model).values()]
    peak = {"projected": 0, "model": 0}
    flats: list[nn.Parameter] = []

    def held(parameters: Any) -> int:
        return sum(p.grad.nbytes for p in parameters if p.grad is not None)

    def look(_: Tensor) -> None:
        buffers = held(flats)
        peak["projected"] = max(peak["projected"], buffers + held(low))
        peak["model"] = max(peak["model"], buffers + held(model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    optimizer = ours(model, layerwise=layerwise, update_proj_gap=1)
    flats += {id(slot.flat): slot.flat for slot in optimizer._slots}.values()
    for _ in range(2):
        for _ in range(2):
            ids = torch.randint(32_000, (1, 16))
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak


def added_memory(name: str) -> int:
    """Bytes that two steps with an optimizer add to the process's peak; for a fresh process."""
    model = make_model()
    optimizer = OPTIMIZERS[name](model) if name != "none" else None
    for _ in range(2):
        ids = torch.randint(32_000, (1, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer:
            optimizer.step()
        model.zero_grad()
    return peak_bytes()


def compare_memory() -> dict[str, int]:
    """Peak of the process over a run that only has weights and gradients."""
    peaks = {}
    for name in ("none", *OPTIMIZERS):
        command = [sys.executable, __file__, "--memory-of", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = int(done.stdout.splitlines()[-1])
        print(f"peak memory, {name:20} {peaks[name] / 1e6:8.0f} MB", flush=True)
    return peaks


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description="What a GaLore step costs.")
    parser.add_argument("--num-steps", type=int, default=15, help="timed steps of each optimizer")
    parser.add_argument("--memory-of", help="only print the peak memory with this optimizer")
    options = parser.parse_args()
    torch.set_num_threads(1)  # CPU time is then the time one waits
    if options.memory_of:
        print(added_memory(options.memory_of))
        return
    steps = time_steps(options.num_steps)
    refreshes = time_refreshes()
    periods = time_periods()
    ordinary, layerwise = (gradient_peak(layerwise=mode) for mode in (False, True))
    peaks = compare_memory()
    base = peaks.pop("none")
    result = {
        "step_ratio": median(steps["galore_torch"]) / median(steps["ours"]),
        "refresh_ratio": sum(refreshes["galore_torch"]) / sum(refreshes["warm"]),
        "stagger_ratio": median(periods["with"]) / median(periods["without"]),
        "layerwise_gradient_memory_ratio": ordinary["projected"] / layerwise["projected"],
        "layerwise_gradient_memory_ratio_whole_model": ordinary["model"] / layerwise["model"],
        "step_seconds": {name: median(times) for name, times in steps.items()},
        "refresh_seconds": {name: sum(times) for name, times in refreshes.items()},
        "peak_memory_over_model_and_gradients_mb": {
            name: (peak - base) / 1e6 for name, peak in peaks.items()
        },
    }
    print(json.dumps({**rounded(result), "versions": versions()}))


def rounded(value: Any) -> Any:
    """Four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
