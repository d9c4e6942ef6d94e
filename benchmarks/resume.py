"""Is a resumed run the same run? `python benchmarks/resume.py MODEL PAIRS [override ...]`.

Trains the model in folder MODEL on the pairs in folder PAIRS (`train.jsonl`, `test.jsonl`) twice:
once through, and once killed (SIGKILL) after the checkpoint at half and resumed. The last line is
one JSON object; the exit code is 1 if any metric of the two differs. About 6 minutes for
SmolLM2-135M on one CPU core.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUM_STEPS = 8


def launch(settings: list[str], *more: str) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own."""
    command = [sys.executable, str(ROOT / "launch.py"), *settings, *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finish(run: subprocess.Popen[bytes]) -> None:
    """Wait for a run; it has said what was wrong itself."""
    if run.wait():
        sys.exit(1)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics; a line may be in the middle of being written."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_after_half(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill a run between its checkpoint and its end."""
    while not lines(folder) or lines(folder)[-1]["step"] <= NUM_STEPS // 2:
        if run.poll() is not None:
            sys.exit("the run ended before it could be killed")
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()


def main(model: str, pairs: str, overrides: list[str]) -> None:
    """Run, kill, resume, compare."""
    settings = [
        "model=local",
        f"model.path={model}",
        "dataset=jsonl",
        "dataset.as_messages=false",
        f"dataset.train_path={pairs}/train.jsonl",
        f"dataset.eval_path={pairs}/test.jsonl",
        "dataset.max_length=256",
        "dataset.max_prompt_length=128",
        "dataset.num_train=200",
        "dataset.num_eval=16",
        "dataset.num_generations=2",
        "dataset.max_new_tokens=16",
        f"train.max_steps={NUM_STEPS}",
        f"train.save_steps={NUM_STEPS // 2}",
        "train.logging_steps=1",
        "train.batch_size=4",
        "tracker=none",
        *overrides,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        whole, half = Path(scratch) / "whole", Path(scratch) / "half"
        finish(launch(settings, f"hydra.run.dir={whole}"))
        kill_after_half(launch(settings, f"hydra.run.dir={half}"), half)
        finish(launch(settings, f"resume={half}"))
        summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, half)]
        logged = [lines(run) for run in (whole, half)]
    before, after = summaries[0]["before"], summaries[0]["after"]
    result = {
        "same_final_metrics": summaries[0]["after"] == summaries[1]["after"],
        "same_training_metrics": logged[0] == logged[1],
        "chosen_nll": [before["chosen_nll"], after["chosen_nll"]],
        "loss": [line["loss"] for line in logged[0] if "loss" in line],
        "overrides": overrides,
        "versions": summaries[0]["versions"],
    }
    print(json.dumps(result))
    sys.exit(not (result["same_final_metrics"] and result["same_training_metrics"]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: python {sys.argv[0]} MODEL PAIRS [override ...]")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
