"""The model card of an export, in the format of the hub."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load

from orpo_lab.compare.evidence import of_pairs, prefers
from orpo_lab.compare.read import read_run
from orpo_lab.compare.ship import repeating
from orpo_lab.compare.untrained import over_pairs
from orpo_lab.compare.verdict import CONFIDENCE, Array, Interval
from orpo_lab.compare.words import interval_text
from orpo_lab.config import kind
from orpo_lab.config.dataset import Dataset, EmbeddedDataset, HubDataset
from orpo_lab.config.identity import policy_of
from orpo_lab.config.mixture import MixtureDataset
from orpo_lab.config.model import local_path
from orpo_lab.config.quantization import Int8, Nf4, Quantization
from orpo_lab.export.check import Difference
from orpo_lab.finished import FinishedRun
from orpo_lab.metrics import HELD_OUT, PREFERENCE
from orpo_lab.records.card import LAB, base_name, header, training_said

if TYPE_CHECKING:
    from orpo_lab.export.write import Order

# What the hub reads of a licence
LICENCE = ("license", "license_name", "license_link")
UNKNOWN = "not known here"
# A path of this machine in an override, and the last part of the path
PLACE = re.compile(r"(?<![\w.:/-])(?:~|\.\.?)?/(?:[^\s,'\"\[\]{}()=/]*/)*([^\s,'\"\[\]{}()=/]+)")
# One of the values of a key that says where something lies
ITEM = re.compile(r"[^,'\"\[\]]+")
# A file of a data set on the hub
HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)")
IN_16_BITS = """
In bf16 peft adds what an adapter says to numbers that are rounded already, and small changes are
lost. Load it in fp32 as above, or ask for a merged model.
"""
# The packages whose versions a card names
SHOWN = ("torch", "transformers", "peft", "bitsandbytes")


def text(finished: FinishedRun, order: "Order", checks: dict[str, Difference]) -> str:
    """Return the card of an export.

    Args:
        finished: the run.
        order: what was written.
        checks: how far the export is from its run, by the name of what it was compared with.
    """
    config, run = finished.config, read_run(finished.folder)
    assert run.summary is not None
    assert run.scores is not None
    assert run.scores_before is not None
    base, data = order.base or base_name(config.model), dict(_data(config.dataset))
    folder = local_path(config.model.path)
    licence = _licence(folder if folder.is_dir() else base, "model", order.revision)
    relation = "adapter" if order.is_adapter else "finetune"
    fields: dict[str, Any] = {
        "base_model": order.base,
        "base_model_relation": relation if order.base else None,
        "datasets": [name for name, is_on_hub in data.items() if is_on_hub],
        **licence,
        "library_name": "peft" if order.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [kind(config.method), LAB],
    }
    names = [
        f"{name} ({_licence(name, 'dataset').get('license', UNKNOWN) if is_on_hub else UNKNOWN})"
        for name, is_on_hub in data.items()
    ]
    start = Path(config.start_from).name if config.start_from else ""
    versions = ", ".join(f"{name} {run.summary['versions'][name]}" for name in SHOWN)
    before, after = figures(run.scores_before), figures(run.scores)
    rows = [
        f"| {name} | {num} | {interval_text(before[name][1])} | {interval_text(interval)} |"
        for name, (num, interval) in after.items()
    ]
    head = ["| held out | pairs | before | after |", "|---|---:|---|---|"]
    table = "\n".join([*head, *rows])
    compared = "\n".join(f"- Against {name}: {found}." for name, found in checks.items())
    return f"""{header(fields)}# {order.name}

{base}, {training_said(config, run.summary, start)}

- This is {order.words}.
- Base: {base} (licence: {licence.get("license", UNKNOWN)}).
- Data, with licences: {", ".join(names)}.
- Versions of the run: {versions}.

Measured on held-out pairs, with {100 * CONFIDENCE:.0f} % intervals over the pairs. It is one run:
what another seed would come to is not in the intervals.

{table}

## Use

```python
{_usage(order, config.quantization)}
```

Prompts are made by `tokenizer.apply_chat_template`: its template is the one of the training.
{IN_16_BITS if order.is_adapter else ""}
## How close to the run

This was read from its files by transformers and peft, and compared:

{compared}

## Repeat the run

```bash
{repeating(without_places(run.overrides))}
```
"""


def figures(scores: dict[str, Array]) -> dict[str, tuple[int, Interval]]:
    """Return preference accuracy and the qualities of one model, with intervals over pairs.

    Args:
        scores: columns of `scores.parquet`, [N] each.

    Returns:
        By the figure's name the number of pairs that it was measured on, and the interval.
    """
    prefer = prefers(scores)
    found = {PREFERENCE: (len(prefer), over_pairs(prefer, is_share=True))}
    for metric in HELD_OUT:
        values = of_pairs(metric, scores) if metric.of_pair else np.empty(0)
        if len(values) and not np.isnan(values).any():
            found[metric.name] = (len(values), over_pairs(values, is_share=metric.is_share))
    return found


def without_places(overrides: list[str]) -> list[str]:
    """Return the overrides of a run with names in place of paths of this machine.

    Left out are those that change nothing in the model: of Hydra, which say where the run's folder
    is, and of groups such as `tracker` and `judge`, which name servers.
    """
    kept = []
    for text in overrides:
        key, equals, value = text.partition("=")
        name = key.lstrip("+~")
        group = re.split(r"[./@]", name)[0]
        if group == "hydra" or policy_of(group).kind == "free":
            continue
        is_place = policy_of(name).kind == "location"
        value = ITEM.sub(_last_name, value) if is_place else PLACE.sub(r"\1", value)
        kept.append(f"{key}{equals}{value}")
    return kept


def _last_name(item: re.Match[str]) -> str:
    is_here = item[0].lstrip().startswith(("/", "~", ".", "file:"))
    return Path(item[0]).name if is_here else item[0]


def _data(config: Dataset) -> Iterator[tuple[str, bool]]:
    """Yield the names of a run's data, and whether each is the name of a data set on the hub."""
    match config:
        case MixtureDataset(sources=sources):
            for source in sources:
                yield from _data(config.of(source))
        case EmbeddedDataset():
            yield "the embedded pairs of orpo_lab", False
        case HubDataset(path=path):
            folder = local_path(path)
            yield (folder.resolve().name, False) if folder.exists() else (path, True)
        case _:
            given = getattr(config, "train_path", None)
            for file in map(str, given if isinstance(given, list) else [given]):
                on_hub = HUB_FILE.match(file)
                yield (on_hub.group(1), True) if on_hub else (Path(file).name, False)


def _licence(place: str | Path, kind: str, revision: str | None = None) -> dict[str, str]:
    """Return what the card of a model or a data set says of its licence; empty: it is not known.

    Args:
        place: the folder of a model, or a name on the hub. Offline, only cards in the cache of the
            hub are read.
        kind: model or dataset.
        revision: branch, tag or commit.
    """
    try:
        card = (
            place / "README.md"
            if isinstance(place, Path)
            else Path(hf_hub_download(place, "README.md", repo_type=kind, revision=revision))
        )
        said = metadata_load(card) or {}
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return {}
    return {name: str(said[name]) for name in LICENCE if said.get(name)}


def _usage(order: "Order", quantization: Quantization) -> str:
    """Return code that loads the export as it was checked."""
    if not order.is_adapter:
        return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{order.place}")
tokenizer = AutoTokenizer.from_pretrained("{order.place}")"""
    match quantization:
        case Nf4(double_quantization=double):
            settings = (
                'load_in_4bit=True, bnb_4bit_quant_type="nf4", '
                f"bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype={order.dtype}"
            )
        case Int8(outlier_threshold=threshold):
            settings = f"load_in_8bit=True, llm_int8_threshold={threshold:g}"
        case _:
            settings = ""
    imported = ", BitsAndBytesConfig" if settings else ""
    made = f"quantized = BitsAndBytesConfig({settings})\n" if settings else ""
    given = ", quantization_config=quantized" if settings else ""
    return f"""import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig{imported}

{made}model = AutoPeftModelForCausalLM.from_pretrained(
    "{order.place}", dtype={order.dtype}{given}
)
model.generation_config = GenerationConfig.from_pretrained("{order.place}")
tokenizer = AutoTokenizer.from_pretrained("{order.place}")"""
