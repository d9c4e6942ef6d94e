"""Make a preference data set of one's own: `python -m orpo_lab curate STEP FOLDER ...`.

The steps work on one folder (orpo_lab/curate/folder.py), and each goes on where it was interrupted.
"""

import argparse
import importlib

# For each step the module with its `add_arguments` and `run`, and what the step does. The extra
# `curate` brings the packages that the modules import
STEPS = {
    "prompts": ("orpo_lab.curate.prompts", "take prompts from files, and warn of near-duplicates"),
    "candidates": ("orpo_lab.curate.candidates", "have a model or an endpoint answer the prompts"),
    "votes": ("orpo_lab.curate.server", "serve the page on which people compare two answers"),
    "judge": ("orpo_lab.curate.judge", "have an LLM vote as one more annotator"),
    "agreement": ("orpo_lab.curate.agreement", "say how far the annotators agree"),
    "pairs": ("orpo_lab.curate.pairs", "write pairs.jsonl and its data card"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the steps of the command, and their arguments, to a parser."""
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for step, (module, about) in STEPS.items():
        below = steps.add_parser(step, help=about, description=f"{about.capitalize()}.")
        importlib.import_module(module).add_arguments(below)


def run(options: argparse.Namespace) -> None:
    """Run a step.

    Raises:
        UserError: the step before it has not been made, or an argument is out of range.
    """
    module, _ = STEPS[options.step]
    importlib.import_module(module).run(options)
