"""Model cards in the format of the hub: that of `final/`, and what other cards share with it."""

from typing import Any

import yaml

from orpo_lab.config import Config, kind
from orpo_lab.config.beta_schedule import Constant
from orpo_lab.config.model import BASE, EMBEDDED, Model, local_path
from orpo_lab.config.optimizer import Lora
from orpo_lab.metrics import HELD_OUT, harness_figures, harness_said
from orpo_lab.records.run_folder import RunFolder, changed_keys
from orpo_lab.redaction import redact

# The tag of every card
LAB = "orpo_lab"
# When a model is measured
WHEN = ("before", "after")


def model_card(
    place: RunFolder,
    config: Config,
    summary: dict[str, Any],
    *,
    start: str = "",
    has_base: bool = False,
) -> str:
    """Return a model card in the hub's format: the base, the training, and the held-out figures.

    Args:
        place: the run folder.
        config: the run's configuration.
        summary: the content of `summary.json`.
        start: what the run started from, in words; empty: from `model.path` alone.
        has_base: whether the base of the adapter is saved beside it.
    """
    is_adapter = isinstance(config.optimizer, Lora)
    library = "peft" if is_adapter else "transformers"
    loader = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    base, on_hub = base_name(config.model), hub_name(config.model)
    is_local = on_hub is None and config.model.path != EMBEDDED
    name = redact(config.name or place.path.resolve().name)
    moved = (
        f" `adapter_config.json` names the folder of {base}; put its name on the hub there before "
        "you publish this."
        if is_local and is_adapter
        else ""
    )
    if has_base:
        moved = (
            f" The adapter belongs to the model in `{BASE}/`, whose place `adapter_config.json` "
            "names; put its name on the hub there before you publish this."
        )
    figures = (
        f"Measured on {summary['after']['num_pairs']} held-out pairs:\n\n{table(summary)}"
        if summary["after"]
        else "It was not measured after training."
    )
    fields = {"base_model": on_hub, "library_name": library, "tags": [kind(config.method), LAB]}
    return f"""{header(fields)}# {name}

{base}, {training_said(config, summary, start)}
The whole configuration stands in `config.yaml` of the run folder.{moved}

{figures}

```python
from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("final")
tokenizer = AutoTokenizer.from_pretrained("final")
```
"""


def header(fields: dict[str, Any]) -> str:
    """Return the header of a card, which the hub reads; fields that are None or empty are left out.

    The fields: https://huggingface.co/docs/hub/model-cards
    """
    known = {name: value for name, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, default_flow_style=None)}---\n"


def hub_name(model: Model) -> str | None:
    """Return the name of a model on the hub; None: it is embedded, or a folder of this machine."""
    is_here = model.path == EMBEDDED or local_path(model.path).is_dir()
    return None if is_here else redact(model.path)


def base_name(model: Model) -> str:
    """Return what a card calls a model: cards are published, and name no path of this machine."""
    if model.path == EMBEDDED or hub_name(model):
        return redact(model.path)
    return redact(local_path(model.path).resolve().name)


def training_said(config: Config, summary: dict[str, Any], start: str = "") -> str:
    """Return how a model was trained, as the end of a sentence that begins with its base.

    Args:
        config: the run's configuration.
        summary: the content of `summary.json`.
        start: what the run started from, in words; empty: from `model.path` alone.
    """
    beta = f"beta {config.beta:g}, " if config.method.reads_beta else ""
    if beta and not isinstance(config.beta_schedule, Constant):
        schedule = kind(config.beta_schedule).replace("_", " ")
        end = f" to {config.beta_end:g}" if config.beta_schedule.reads_beta_end else ""
        beta = f"beta {config.beta:g}{end} ({schedule}), "
    began = f" It began with another run's result: {redact(start)}." if start else ""
    keys = changed_keys(summary)
    changed = f" It was resumed with changes of {', '.join(keys)}; before, other values held."
    code = " Code that comes with it was run." if config.model.trust_remote_code else ""
    return f"""trained with {config.method.title} by orpo_lab:
{beta}{summary["train"]["steps"]} steps of {config.train.batch_size} {config.unit}, seed
{config.seed}.{began}{changed if keys else ""}{code}{_template_said(config)}"""


def _template_said(config: Config) -> str:
    """Return what a card says of the chat template; empty: it is the tokenizer's own, alone."""
    own = " The chat template is the run's own." if config.model.chat_template else ""
    kwargs = config.dataset.template_kwargs
    if not kwargs:
        return own
    given = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    return f"{own} The chat template was given `{given}`; give it to `apply_chat_template` too."


def table(summary: dict[str, Any]) -> str:
    """Return the figures before and after training as a table of Markdown.

    Args:
        summary: the content of `summary.json`; it was measured after training.
    """
    rows = [("held out", "before", "after", "")]
    for metric in HELD_OUT:
        found = [summary[when].get(metric.name) for when in WHEN]
        if metric.is_tabled and None not in found:
            before, after = (f"{value:.3f}" for value in found)
            rows.append((metric.name, before, after, metric.said))
    for name in harness_figures(summary["after"]):
        before, after = (
            f"{summary[when][name]:.3f}" if name in summary[when] else "" for when in WHEN
        )
        rows.append((name, before, after, harness_said(name, summary["after"])))
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"| {name:{width}} | {old:>8} | {new:>8} | {about} |" for name, old, new, about in rows
    ]
    return "\n".join([lines[0], f"|{'-' * (width + 2)}|{'-' * 9}:|{'-' * 9}:|---|", *lines[1:]])
