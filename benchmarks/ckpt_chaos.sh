#!/usr/bin/env bash
# An outside judge of the checkpoints: ckpt-chaos kills fresh runs at 40 of their file events, half of them with the
# file torn, goes on with the same command, and compares final/ with an unharmed run's, byte by byte. About 10 minutes on
# two cores: benchmarks/ckpt_chaos.sh [override ...]
#
# Its last line counts what it tried. A point at which the run had ended before it was to be killed is no crash, and is
# not counted.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Its children import the lab from here
export PYTHONPATH=$PWD
weights=adapter_model.safetensors
for override in "$@"; do
  case $override in
    optimizer=galore* | optimizer=adamw) weights=model.safetensors ;;
  esac
done
work=$(mktemp -d)/runs
status=0
.venv/bin/ckpt-chaos run --max-points 40 --jobs "${JOBS:-2}" --work "$work" \
  --fail-on HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL \
  --result-file "{out}/final/$weights" \
  --checkpoint-glob "{out}/checkpoints/checkpoint-*" --step-regex 'resuming from step (\d+)' \
  -- .venv/bin/python launch.py "hydra.run.dir={out}" resume=auto tracker=none \
  dataset.num_train=64 dataset.num_eval=8 dataset.num_generations=2 dataset.max_new_tokens=8 \
  train.max_steps=6 train.save_steps=2 train.num_checkpoints=9 \
  train.lr_scheduler_type=constant beta_schedule=linear "$@" || status=$?
.venv/bin/python - "$work" <<'EOF'
import json
import sys
from collections import Counter
from pathlib import Path

from ckpt_chaos.runner import rejudge

rows = [row for row in rejudge(Path(sys.argv[1])) if not row.label.startswith("no crash")]
crashed = [row.verdict for row in rows if row.crashed]
print(json.dumps({"crashed": len(crashed), "not_crashed": len(rows) - len(crashed), **Counter(crashed)}))
EOF
exit $status
