"""The tables of docs/hardware.md: `python benchmarks/plan_tables.py` prints them as Markdown.

Mistral 7B's shapes, by the plan: memory by part, and hours on cards; then the recipes of
conf/experiment. Nothing is loaded or measured.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from transformers import MistralConfig

from orpo_lab import api
from orpo_lab.errors import UserError
from orpo_lab.plan import cards, lengths, planned
from orpo_lab.plan.planned import Plan
from orpo_lab.upstream import silence

OPTIMIZERS = {
    "`qlora`": ("optimizer=qlora",),
    "`lora`": ("optimizer=lora",),
    "`galore`": ("optimizer=galore",),
    "`galore_8bit`": ("optimizer=galore_8bit",),
    "`galore_8bit`, layer-wise": ("optimizer=galore_8bit", "optimizer.layerwise=true"),
    "`adamw`": ("optimizer=adamw",),
}
# Name -> overrides of a recipe, and its number of processes
RECIPES = {
    "`mistral_qlora`": (("experiment=mistral_qlora",), 1),
    "`mistral_qlora`, 100 steps": (("experiment=mistral_qlora", "train.max_steps=100"), 1),
    "`mistral_galore`": (("experiment=mistral_galore",), 1),
    "`mistral_galore`, layer-wise": (("experiment=mistral_galore", "optimizer.layerwise=true"), 1),
    "`mistral_orpo_alpha`, 4 cards, sharded": (
        ("experiment=mistral_orpo_alpha", "train.sharding=full"),
        4,
    ),
}
COMMON = (
    "dataset=ultrafeedback",
    "train.max_steps=1000",
    "train.batch_size=8",
    "train.gradient_checkpointing=true",
    "engine.tokens_per_microbatch=4096",
)
# Tokens of prompt, chosen and rejected completion: round figures, not measured
SIZES = (200, 300, 300)
OWN = MistralConfig(vocab_size=32000)
# Heading -> parts of `Memory`
PARTS = {
    "weights": ("frozen", "trained"),
    "gradients": ("gradients",),
    "moments, bases": ("moments", "bases"),
    "update": ("updates",),
    "activations": ("activations",),
    "head, a layer": ("head", "working"),
}


def plan(folder: str, overrides: Sequence[str], card: str, processes: int = 1) -> Plan:
    """Return the plan of Mistral 7B on a card, or on as many cards as processes."""
    loaded = api.compose(*overrides, "model=local", f"model.path={folder}").config
    sizes = lengths.Lengths([SIZES], 60_000, 500, "given")
    return planned.plan(loaded, OWN, cards.named(card), sizes, processes)


def row(cells: Iterable[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def tables() -> Iterator[str]:
    """Yield the lines of the tables; GB are 1e9 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(OWN.to_dict()))
        yield row(["", *PARTS, "needed"])
        yield row(["---"] * (len(PARTS) + 2))
        for name, overrides in OPTIMIZERS.items():
            memory = plan(folder, (*COMMON, *overrides), "h200").memory
            parts = memory.parts()
            sums = [sum(parts[part] for part in group) for group in PARTS.values()]
            yield row([name, *(f"{size / 1e9:.1f}" for size in (*sums, memory.needed))])
        yield ""
        yield row(["", *cards.names()])
        yield row(["---"] * (len(cards.names()) + 1))
        for name, overrides in OPTIMIZERS.items():
            asked = (*COMMON, *overrides)
            yield row([name, *(_hours(folder, asked, card, 1) for card in cards.names())])
        yield ""
        yield row(["", "needed", *cards.names()])
        yield row(["---"] * (len(cards.names()) + 2))
        for name, (overrides, num) in RECIPES.items():
            needed = plan(folder, overrides, "h200", num).memory.needed
            hours = (_hours(folder, overrides, card, num) for card in cards.names())
            yield row([name, f"{needed / 1e9:.1f}", *hours])


def _hours(folder: str, overrides: Sequence[str], card: str, processes: int) -> str:
    try:
        found = plan(folder, overrides, card, processes)
    except UserError:
        return "refused"
    hours = found.seconds.total / 3600
    return (f"{hours:.2f}" if hours < 0.1 else f"{hours:.1f}") if found.fits else "-"


if __name__ == "__main__":
    silence()
    print("\n".join(tables()))
