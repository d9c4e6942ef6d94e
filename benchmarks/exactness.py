"""How exact is a step in bf16? `python benchmarks/exactness.py FOLDER PAIRS`, 10 minutes.

FOLDER holds a real model, PAIRS is a file of pairs. The gradients of all adapters, on a base in
nf4, of steps of one pair in bf16: their error relative to the same step in fp32 on the same
quantized weights, the norm of the difference over the norm. Three ways: our engine, our engine with
PEFT's own layers, and TRL's step. The adapters' B is random, since the gradient of A is zero where
B is. `--base none` takes the weights unquantized. Rounding hits some pairs ten times as hard as
others, so the median and the geometric mean over the pairs are reported. The last line is one JSON
object.

A CPU without bf16 takes minutes for one product in bf16. So products of bf16 matrices are computed
in fp32 and rounded once, as a GPU does with its fp32 accumulators.
"""

import argparse
import itertools
import json
from statistics import geometric_mean, median
from typing import Any, ClassVar

import torch
from step import untrained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import set_seed

from orpo_lab import compose, config, data, engine
from orpo_lab.config.optimizer import Lora
from orpo_lab.model.adapter import attach
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import load_model
from orpo_lab.records.run_folder import versions
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.loop import add_gradients, rows
from orpo_lab.upstream import silence

BETA = 0.1
# Tokens of a pair; a longer pair only takes more time
SIZES = range(120, 261)
# Spread of the random B, about that of a trained adapter
SPREAD = 0.02
OURS, PEFTS, TRLS = "ours", "ours_with_pefts_layers", "trl"


class ProductsInFp32(TorchDispatchMode):
    """Computes products of bf16 matrices in fp32, and rounds the results to bf16."""

    products: ClassVar[dict[Any, Any]] = {
        torch.ops.aten.mm.default: torch.mm,
        torch.ops.aten.mm.out: torch.mm,
        torch.ops.aten.bmm.default: torch.bmm,
        torch.ops.aten.addmm.default: torch.addmm,
        torch.ops.aten.addmm_.default: torch.addmm,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, a product of bf16 matrices in fp32."""
        kwargs = dict(kwargs or {})
        if func not in self.products or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        into = args[0] if func is torch.ops.aten.addmm_.default else kwargs.pop("out", None)
        result = self.products[func](*tree_map_only(Tensor, Tensor.float, args), **kwargs)
        return result.bfloat16() if into is None else into.copy_(result)


def compose_case(which: str, options: argparse.Namespace) -> config.Config:
    """Compose the run that the step is taken from."""
    overrides = [
        f"engine={which}",
        "optimizer=lora" if options.base == "none" else "optimizer=qlora",
        f"quantization={options.base}",
        "optimizer.dropout=0",
        "dataset=jsonl",
        "dataset.as_messages=false",
        f"dataset.train_path={options.pairs}",
        "dataset.num_eval=1",
        "dataset.max_length=512",
        "dataset.max_prompt_length=384",
        "dataset.overlong=cut_completion",
        "model=local",
        f"model.path={options.folder}",
        "train.batch_size=1",
    ]
    return compose(*overrides).config


def load_network(loaded: config.Config, tokenizer: Any, dtype: torch.dtype) -> Any:
    """Return the model with adapters whose B is random; the same adapters in any dtype."""
    assert isinstance(loaded.optimizer, Lora)
    base = load_model(loaded, tokenizer, dtype)
    set_seed(0)
    network = attach(base, loaded.optimizer).train()
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, SPREAD)
    return network


def gradients(
    network: Any, tokenizer: Any, which: str, dtype: torch.dtype, options: argparse.Namespace
) -> list[dict[str, Tensor]]:
    """Return the gradients of a step of each pair, by the adapters' names."""
    loaded = compose_case("trl" if which == TRLS else "shared_prefix", options)
    shuffled = data.load(loaded.dataset, tokenizer).train.shuffle(seed=0)
    pairs = (p for p in rows(shuffled, range(len(shuffled))) if sum(map(len, p.values())) in SIZES)
    devices = OneDevice(torch.device("cpu"), dtype)
    built: Any = engine.build(loaded, model=network, tokenizer=tokenizer, devices=devices)
    if which == PEFTS:
        built._layers = []
    state, found = untrained(network, devices), []
    for pair in itertools.islice(pairs, options.num):
        network.zero_grad()
        with ProductsInFp32():
            add_gradients(built, state, [pair], BETA)
        adapters = network.named_parameters()
        found.append({name: p.grad.clone() for name, p in adapters if p.grad is not None})
    return found


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return |found - exact| / |exact| over all adapters together."""
    apart = sum(float((found[name] - right).square().sum()) for name, right in exact.items())
    return float((apart / sum(float(right.square().sum()) for right in exact.values())) ** 0.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How exact is a step in bf16?")
    parser.add_argument("folder", help="folder of a model")
    parser.add_argument("pairs", help="JSON lines of pairs")
    parser.add_argument("--base", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--num", type=int, default=16, help="number of pairs")
    options = parser.parse_args()
    silence()
    loaded = compose_case("trl", options)
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    exact = gradients(
        load_network(loaded, tokenizer, torch.float32), tokenizer, TRLS, torch.float32, options
    )
    network = load_network(loaded, tokenizer, torch.bfloat16)
    report: dict[str, Any] = {"base": options.base, "num": options.num}
    for which in (OURS, PEFTS, TRLS):
        found = gradients(network, tokenizer, which, torch.bfloat16, options)
        errors = sorted(map(error, found, exact))
        report[which] = {
            "median": round(median(errors), 4),
            "geometric_mean": round(geometric_mean(errors), 4),
            "errors": [round(value, 4) for value in errors],
        }
        print(which, json.dumps(report[which]), flush=True)
    print(json.dumps(report | {"versions": versions()}))


if __name__ == "__main__":
    main()
