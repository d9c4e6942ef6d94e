"""Mixtures of the results of two runs: set in one network, measured, and saved.

At a share t of the high run, adapters change a layer's weight by

    (1 - t) s_low B_low A_low + t s_high B_high A_high

with the scale s = alpha / r of each run. A product of mixed factors would be something else. So the
factors stand side by side in one adapter, whose rank is the sum of both ranks (peft's
`add_weighted_adapter` with "cat"). Whole weights are (1 - t) W_low + t W_high. At the shares 0 and
1 the network is that of the run itself.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel

from orpo_lab import engine
from orpo_lab.config.optimizer import Lora
from orpo_lab.evaluate import Evaluation, evaluate
from orpo_lab.finished import FinishedRun
from orpo_lab.metrics import brief
from orpo_lab.model.adapter import load_adapter
from orpo_lab.optimizer.write_back import round_to
from orpo_lab.records import results
from orpo_lab.records.run_folder import put_in_place
from orpo_lab.training.files import Files

# peft's name for the adapter that is saved without a folder of its own
MIXED = "default"


class Mixer(Protocol):
    """Sets the mixtures of two results in a network."""

    def turn(self, share: float) -> None:
        """Set the mixture with this share of the high run, 0 to 1."""

    def forget_ends(self) -> None:
        """Leave nothing in the network but the mixture that was set last."""


class Adapters:
    """Mixes adapters.

    Args:
        network: the base with any adapter, which the mixtures replace.
        finals: the folders of both results.
    """

    def __init__(self, network: PeftModel, *finals: Path) -> None:
        self.network = network
        self.finals = dict(zip(("low", "high"), finals, strict=True))
        for name, final in self.finals.items():
            self._put(name, final)

    def _put(self, name: str, final: Path) -> None:
        """Put the adapter in a folder on the network as it is, and make it the active one."""
        self.network.add_adapter(name, LoraConfig.from_pretrained(final))
        self.network.set_adapter(name)
        load_adapter(self.network, final)

    def turn(self, share: float) -> None:
        """Set a mixture; see `Mixer`."""
        self.network.set_adapter("low")
        self.network.delete_adapter(MIXED)
        if share in (0, 1):
            # A mixture with a share of 0 would be the same adapter to rounding, and twice as large
            self._put(MIXED, self.finals["high" if share else "low"])
            return
        self.network.add_weighted_adapter(
            [*self.finals], [1 - share, share], MIXED, combination_type="cat"
        )
        self.network.set_adapter(MIXED)

    def forget_ends(self) -> None:
        """Delete the other adapters; see `Mixer`."""
        for name in self.finals:
            self.network.delete_adapter(name)
        self.network.set_adapter(MIXED)


class Weights:
    """Mixes whole weights.

    The folder of a result holds its weights in the precision of its base. So a mixture is rounded
    to this precision before it is measured. In bf16 a weight's values in the two runs may be
    neighbours: the nearest number is then the low run's at every share below one half. Stochastic
    rounding keeps the mean.

    Args:
        network: the network of the low run.
        high: the network of the high run.
        stored: precision of the weights in the base's folder; None: that of the network.
    """

    def __init__(self, network: Any, high: Any, stored: torch.dtype | None) -> None:
        self.network = network
        # A folder is never wider than what was trained
        self.stored = min(network.dtype, stored or network.dtype, key=lambda dtype: dtype.itemsize)
        low = [weight.detach().cpu().clone() for weight in network.parameters()]
        self.ends = low, [weight.detach().cpu() for weight in high.parameters()]

    @torch.no_grad()
    def turn(self, share: float) -> None:
        """Set a mixture; see `Mixer`."""
        generator = torch.Generator().manual_seed(0)
        for weight, low, high in zip(self.network.parameters(), *self.ends, strict=True):
            mixed = (1 - share) * low.float() + share * high.float()
            weight.copy_(round_to(mixed, self.stored, generator))

    def forget_ends(self) -> None:
        """Do nothing: the weights of the ends are not in the network."""


class Dial:
    """The network between the results of two runs.

    Args:
        low: folder of the run at share 0.
        high: folder of the run at share 1; the two differ in beta, its schedule and, if they are
            adapters, their rank alone.

    Raises:
        UserError: the base or the pairs are not those that the runs were made with.
    """

    def __init__(self, low: Path, high: Path) -> None:
        self.low = FinishedRun(low)
        self.network = self.low.load()
        engine.check(self.low.config, self.network, self.low.dtype)
        self.mixer: Mixer
        if isinstance(self.low.config.optimizer, Lora):
            self.mixer = Adapters(self.network, low / "final", high / "final")
        else:
            self.mixer = Weights(self.network, FinishedRun(high).load(), self.low.stored)
        self.pairs = self.low.pairs

    def measure(self, shares: Sequence[float]) -> list[Evaluation]:
        """Return the evaluation of a mixture for each share, and print its figures."""
        return [self._measure_one(share) for share in shares]

    def _measure_one(self, share: float) -> Evaluation:
        self.mixer.turn(share)
        found = evaluate(
            self.network,
            self.low.tokenizer,
            self.pairs,
            self.low.config,
            dtype=self.low.dtype,
            desc=f"share {share:.3g}",
        )
        said = "  ".join(f"{name} {value}" for name, value in brief(found.metrics).items())
        print(f"share {share:<6.3g}{said}", flush=True)
        return found

    def save(self, share: float, folder: Path, card: str) -> None:
        """Save a mixture as a run saves its result in `final/`. The dial cannot be turned after.

        Args:
            share: of the high run, 0 to 1.
            folder: a new folder.
            card: the text of its README.md.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        self.mixer.turn(share)
        self.mixer.forget_ends()
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        files = Files(part)
        results.save_model(self.network, self.low.tokenizer, files, dtype=self.low.stored)
        self.low.origin.save_base(self.network, files, folder)
        (part / "README.md").write_text(card, encoding="utf-8")
        put_in_place(part, folder)
