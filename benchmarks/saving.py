"""What a checkpoint costs: `python benchmarks/saving.py [--gb 15]`, some minutes.

A checkpoint of about so many GB (default 2): the architecture of Mistral 7B with fewer layers,
random weights in bf16, the states of layer-wise 8-bit GaLore. Measured in turn, several times:

- `checkpoint`: as the lab writes one, to its manifest
- `final`: as the lab writes the trained model and puts it into `final/`
- `one_by_one`: the same files as a checkpoint without the lab's own writing: saved by the
  libraries, then read again for their SHA-256, then sent to the disk
- `bytes`: files of the same sizes, from the memory of the host to the disk, and nothing else

The last line is one JSON object with the medians. `over_bytes` is the time per byte over that of
`bytes`, of which the median over the rounds is to be at most 1.5 for `checkpoint` and `final`: the
exit code is 1 otherwise. `--small` checks the script within seconds, and judges nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from orpo_lab.model.projections import projections
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.optimizer.updater import GaLoreUpdater
from orpo_lab.records import results
from orpo_lab.records.run_folder import RunFolder, sync, versions
from orpo_lab.training import checkpoint
from orpo_lab.training.checkpoint import STATE, Made, Spent
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.files import PIECE
from orpo_lab.training.state import State
from orpo_lab.training.trainer import TrainStats
from orpo_lab.upstream import silence

TINY = Path(__file__).parents[1] / "orpo_lab" / "tiny"
MAX_OVER_BYTES = 1.5
# GB of the embeddings, the output head and their states; and of a layer and its states
OUTER_GB, LAYER_GB = 1.05, 0.46
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MADE = Made("benchmark", "", "")
STATS = TrainStats(1, 1.0, 1.0, 1.0, 0, 0, "", None)


def make_state(architecture: MistralConfig, rank: int, device: torch.device) -> State:
    """Random weights that have taken one step along random gradients."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    low = [layer.weight for layer in projections(model).values()]
    others = [p for p in model.parameters() if all(p is not weight for weight in low)]
    groups: list[Any] = [{"params": low, "rank": rank, "update_proj_gap": 100}, {"params": others}]
    optimizer = GaLore(groups, lr=1e-5, bits=8, layerwise=True, stagger_refresh=False)
    for weight in model.parameters():
        (weight * torch.randn_like(weight)).sum().backward()
    optimizer.step()
    updater = GaLoreUpdater(optimizer, model)
    return State(model, updater, OneDevice(device, torch.bfloat16), lambda _: 1.0)


class Saving:
    """The four ways to write, each to a new folder.

    Args:
        state: the state to save.
        place: the run folder.
    """

    def __init__(self, state: State, place: RunFolder) -> None:
        self.state, self.place = state, place
        self.tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
        self.sizes: list[int] = []
        """Sizes of the files of a checkpoint, in bytes."""
        self.some = memoryview(os.urandom(PIECE))

    def checkpoint(self) -> Path:
        """A checkpoint and its manifest."""
        path = self.place.file("checkpoints/checkpoint-1")
        with checkpoint.written(path) as files:
            self.state.save(files, self.state.rest())
            self.tokenizer.save_pretrained(path)
            checkpoint.seal(files, self.place, MADE, Spent())
        return path

    def final(self) -> Path:
        """The trained model and its manifest, and `final/`."""
        save = partial(results.save_model, self.state.model, self.tokenizer, dtype=torch.bfloat16)
        path = checkpoint.keep_trained(self.place, None, save, MADE, STATS)
        results.save_final(self.place, path, "the card")
        return path

    def one_by_one(self) -> Path:
        """The files of a checkpoint: written, hashed, on the disk."""
        path = self.place.file("one-by-one")
        self.state.model.save_pretrained(path)  # type: ignore[operator]
        torch.save({"optimizer": self.state.updater.optimizer.state_dict()}, path / STATE)
        self.tokenizer.save_pretrained(path)
        for file in sorted(path.iterdir()):
            with file.open("rb") as content:
                hashlib.file_digest(content, "sha256")
        for file in path.iterdir():
            sync(file)
        return path

    def bytes(self) -> Path:
        """Nothing but bytes."""
        path = self.place.file("bytes")
        path.mkdir()
        for number, size in enumerate(self.sizes):
            with (path / str(number)).open("wb") as file:
                for start in range(0, size, PIECE):
                    file.write(self.some[: size - start])
                file.flush()
                os.fsync(file.fileno())
        return path


def timed(write: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call that begins with an idle device and an idle disk; its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    os.sync()
    begin = time.perf_counter()
    result = write()
    return time.perf_counter() - begin, result


def take_round(saving: Saving) -> dict[str, dict[str, float]]:
    """Write once in every way; return seconds, and seconds per GB."""
    seconds, per_gb, place = {}, {}, saving.place
    for write in (saving.checkpoint, saving.final, saving.one_by_one, saving.bytes):
        name = write.__name__
        seconds[name], path = timed(write)
        sizes = [file.stat().st_size for file in path.iterdir()]
        per_gb[name] = seconds[name] / sum(sizes) * 1e9
        if name == "checkpoint":
            saving.sizes = sizes
            verify = partial(checkpoint.newest_valid, place, MADE.config_hash)
            seconds["verify"], found = timed(verify)
            assert found is not None, "the checkpoint is not valid"
        for folder in ("checkpoints", "final", "one-by-one", "bytes"):
            shutil.rmtree(place.file(folder), ignore_errors=True)
    print({name: round(value, 2) for name, value in seconds.items()}, flush=True)
    return {"seconds": seconds, "per_gb": per_gb}


def summary(rounds: list[dict[str, dict[str, float]]], gb: float) -> dict[str, Any]:
    """Return the medians over the rounds."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gb": round(gb, 3),
        "seconds": {
            name: round(median(some["seconds"][name] for some in rounds), 2)
            for name in rounds[0]["seconds"]
        },
        "over_bytes": {
            name: round(
                median(some["per_gb"][name] / some["per_gb"]["bytes"] for some in rounds), 3
            )
            for name in rounds[0]["per_gb"]
        },
        "versions": versions(),
    }


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--small", action="store_true", help="megabytes, and no judgement")
    chosen = parser.parse_args()
    silence()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_layers = max(1, round((chosen.gb - OUTER_GB) / LAYER_GB))
    architecture = MistralConfig(
        num_hidden_layers=2 if chosen.small else num_layers, **(SMALL if chosen.small else {})
    )
    state = make_state(architecture, 32 if chosen.small else 128, device)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        place = RunFolder(Path(folder))
        place.append_metrics(1, {"loss": 1.0})
        place.write_json("segments.json", [{"config_hash": MADE.config_hash}])
        saving = Saving(state, place)
        rounds = [take_round(saving) for _ in range(chosen.rounds + 1)]
        result = summary(rounds[1:], sum(saving.sizes) / 1e9)  # the first round warms up
    print(json.dumps(result))
    over = result["over_bytes"]
    is_slow = max(over["checkpoint"], over["final"]) > MAX_OVER_BYTES
    sys.exit(int(is_slow and not chosen.small))


if __name__ == "__main__":
    main()
