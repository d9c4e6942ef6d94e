"""A W&B workspace for comparing runs: `python -m orpo_lab workspace [--project P] [--entity E]`.

The command saves a view of the project, with runs grouped by road, beta and beta schedule. A road
is the method with the stages before it (`identity.road`): DPO from the base and DPO after SFT are
two. The charts show figures that do not depend on beta: preference accuracy against quality, the
same figures by road, and curves that can be compared along an annealed run. Curves that cannot be
compared across methods, and settings such as beta, have sections of their own. Needs a key
(`wandb login`) and the extra `workspace`.
"""

import argparse

from orpo_lab import program
from orpo_lab.errors import UserError, one_line
from orpo_lab.metrics import HELD_OUT_PREFIX, MARGINS, PREFERENCE, TRAINING
from orpo_lab.tracker.base import PROJECT

# Training metrics that say how well a run trains, and that can be compared between runs
FREE_OF_BETA = [
    metric for metric in TRAINING if metric.panel and metric.is_beta_free and not metric.is_setting
]
COMPARED = [metric.name for metric in FREE_OF_BETA if metric.is_method_free]
OF_ONE_METHOD = [metric.name for metric in FREE_OF_BETA if not metric.is_method_free]
# Sections of line charts over the steps: the metrics of each, by the names that runs log
CURVES = {
    "Training, free of beta": COMPARED,
    "Held out, free of beta": [HELD_OUT_PREFIX + name for name in COMPARED],
    "Free of beta, but of one method alone": [
        prefix + name for prefix in ("", HELD_OUT_PREFIX) for name in OF_ONE_METHOD
    ],
    "Settings": [metric.name for metric in TRAINING if metric.is_setting],
}


def save(project: str, entity: str, name: str) -> str:
    """Save the workspace and return its address.

    Raises:
        Exception: there is no key, no server or no such project; W&B's client raises any exception.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    accuracy = panels.SummaryMetric(f"after.{PREFERENCE}")
    pareto = [
        panels.ScatterPlot(x=panels.SummaryMetric(f"after.{quality}"), y=accuracy)
        for quality in MARGINS
    ]
    by_road = [
        panels.BarPlot(
            title=f"{figure} by road",
            metrics=[panels.SummaryMetric(f"after.{figure}")],
            groupby=panels.Config("road"),
        )
        for figure in (PREFERENCE, *MARGINS)
    ]
    sections = [
        workspaces.Section(name="Preference against quality", panels=pareto, is_open=True),
        workspaces.Section(name="By road", panels=by_road, is_open=True),
        *(
            workspaces.Section(
                name=title,
                panels=[panels.LinePlot(x="Step", y=[metric], title=metric) for metric in metrics],
                is_open=True,
            )
            for title, metrics in CURVES.items()
        ),
    ]
    groups = [workspaces.Config(key) for key in ("road", "beta", "choices.beta_schedule")]
    workspace = workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        runset_settings=workspaces.RunsetSettings(groupby=groups),
    )
    return workspace.save().url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument("--project", default="", help=f"as tracker.project (default: {PROJECT})")
    parser.add_argument("--entity", default="", help="as tracker.entity (default: the key's)")
    parser.add_argument("--name", default="orpo_lab: which beta?", help="what the view is called")


def run(options: argparse.Namespace) -> None:
    """Save the workspace and print its address.

    Raises:
        UserError: wandb-workspaces is not installed, or W&B does not accept the workspace.
    """
    try:
        import wandb

        entity = options.entity or wandb.Api().default_entity
        project = options.project or wandb.setup().settings.project or PROJECT
        print(save(project, entity, options.name))
    except ImportError as error:
        raise UserError(
            f"wandb-workspaces is not installed: {program.install('workspace')}"
        ) from error
    except Exception as error:
        raise UserError(f"W&B does not take the workspace: {one_line(error)[:300]}") from error
