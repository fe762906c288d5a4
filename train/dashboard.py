"""The W&B dashboard of pretraining runs, from the list of panels in train/panels.py.

python -m train.dashboard PROJECT                       # the sections and panels as JSON; nothing is sent
python -m train.dashboard PROJECT --entity TEAM --yes   # makes the workspace there and prints its address
python -m train.dashboard PROJECT --entity TEAM --view URL --yes    # brings that workspace up to date

Needs `pip install -e ".[dashboard]"` in the repository for anything but the JSON, and `wandb login`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from common.errors import ArgumentParser, ConfigError, run_main
from train.panels import EVALUATION, SECTIONS, Panel

NAME = "Pretraining"
"""Title of the workspace."""


def specification() -> list[dict[str, Any]]:
    """Sections and panels as plain data: what W&B is asked for."""
    sections = [*SECTIONS.items(), ("Evaluation", (EVALUATION,))]
    return [{"name": name, "panels": [_panel(panel) for panel in panels]} for name, panels in sections]


def _panel(panel: Panel) -> dict[str, Any]:
    """Arguments of `wandb_workspaces.reports.v2.LinePlot`."""
    families = [key.removesuffix("*") for key in panel.keys if key.endswith("*")]
    chosen: dict[str, Any] = {"y": [key for key in panel.keys if not key.endswith("*")]}
    if families:
        chosen = {"y": [], "metric_regex": f"^({'|'.join(families)})"}
    return {
        "title": panel.title,
        "x": "trained_step" if panel is EVALUATION else "Step",
        **chosen,
        "title_y": panel.unit or None,
        "log_y": panel.log or None,
        "smoothing_type": "none",
    }


def workspace(project: str, entity: str) -> Any:
    """The workspace through W&B's own classes, which check it; nothing is sent.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    library, plots = _library()
    return library.Workspace(entity=entity, project=project, name=NAME, sections=_sections(library, plots))


def _sections(library: Any, plots: Any) -> list[Any]:
    return [
        library.Section(
            name=section["name"],
            panels=[plots.LinePlot(**panel) for panel in section["panels"]],
            is_open=True,
            layout_settings=library.SectionLayoutSettings(columns=3, rows=-(-len(section["panels"]) // 3)),
        )
        for section in specification()
    ]


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as plots
        import wandb_workspaces.workspaces as library
    except ImportError as error:
        limit = f"needs W&B's package wandb-workspaces ({error})"
        raise ConfigError("--yes", "given", limit, "pip install -e '.[dashboard]' in the repository") from None
    return library, plots


def apply(project: str, entity: str | None, view: str | None) -> str:
    """Makes the workspace, or brings the one at `view` up to date; returns its address.

    Raises:
        ConfigError: W&B refuses, or its package is missing.
    """
    library, plots = _library()
    import wandb

    try:
        if view is not None:
            made = library.Workspace.from_url(view)
            made.sections = _sections(library, plots)
        else:
            made = workspace(project, entity or str(wandb.Api().default_entity))
        made.save()
    except Exception as error:  # the package raises errors of its own, of wandb, of its transport and ValueError
        limit = f"W&B refuses: {str(error).strip() or type(error).__name__}"
        cure = "log in (wandb login) and check project, --entity and --view"
        raise ConfigError("project", project, limit, cure) from None
    return str(made.url)


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.dashboard", description=__doc__)
    parser.add_argument("project", metavar="PROJECT", help="the run file's tracking.project")
    parser.add_argument("--entity", metavar="TEAM", help="team or user (default: the one logged in)")
    parser.add_argument("--view", metavar="URL", help="an existing workspace to bring up to date")
    parser.add_argument("--yes", action="store_true", help="send it to W&B")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = _parse()
    if arguments.view is not None and not arguments.yes:
        raise ConfigError("--view", arguments.view, "is changed only with --yes", "add --yes")
    address = apply(arguments.project, arguments.entity, arguments.view) if arguments.yes else None
    if arguments.json or not arguments.yes:
        made = {"project": arguments.project, "name": NAME, "url": address, "sections": specification()}
        print(json.dumps(made, indent=1))
    else:
        print(f"dashboard: {address}")
    return 0


if __name__ == "__main__":
    run_main(main)
