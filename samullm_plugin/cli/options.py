"""Options that several commands have: written once, and read as one argument.

A group is a dataclass whose fields are options as typer declares them. A command that is decorated
with :func:`with_groups` takes the group as an argument; on the command line each field is an option
of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.app.spec import PlannerSection
    from samullm_plugin.run.reuse import ReuseOptions

Target = Annotated[
    str,
    typer.Argument(
        metavar="APP",
        help="An app.yaml, or a bundled application such as ensembling:requests=1000.",
    ),
]
Gpus = Annotated[int | None, typer.Option(help="GPUs, instead of the application's cluster.")]
Scheduler = Annotated[str | None, typer.Option(help="Name of the stage scheduler.")]
Svg = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a Gantt chart as SVG.")]


@dataclass(frozen=True, slots=True)
class PlanningGroup:
    """How to plan, where it is not as the application says."""

    gpus: Gpus = None
    scenarios: Annotated[int | None, typer.Option(help="Length scenarios to plan for.", min=1)] = (
        None
    )
    seed: Annotated[int | None, typer.Option(help="Seed of lengths and scheduler.", min=0)] = None
    budget: Annotated[float | None, typer.Option(help="Seconds the scheduler may search.")] = None
    no_fusion: Annotated[
        bool,
        typer.Option(
            "--no-fusion", help="Share no engines between nodes, neither in a row nor side by side."
        ),
    ] = False
    prepared_starts: Annotated[
        bool | None,
        typer.Option(
            help="Prepare engines, as far as that needs no device, while others still compute."
        ),
    ] = None
    sleeping_engines: Annotated[
        bool | None,
        typer.Option(help="Let engines sleep that a later node needs again on the same devices."),
    ] = None
    pipeline_parallel_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES", help="Groups of layers to consider for a replica, such as 1,2,4."
        ),
    ] = None

    def over(self, planner: PlannerSection) -> PlannerSection:
        """Return a planner section with what was given on the command line.

        Raises:
            InputError: if the budget is not above 0, or the pipeline-parallel sizes are not whole
                numbers with commas between.
        """
        if self.budget is not None and not self.budget > 0:
            raise InputError(f"--budget is {self.budget:g}; it must be more than 0 seconds")
        given: dict[str, object] = {
            "scenarios": self.scenarios,
            "seed": self.seed,
            "budget_s": self.budget,
            "fusion": False if self.no_fusion else None,
            "prepared_starts": self.prepared_starts,
            "sleeping_engines": self.sleeping_engines,
            "pipeline_parallel_sizes": self._sizes(),
        }
        return planner.model_copy(update={k: v for k, v in given.items() if v is not None})

    def _sizes(self) -> list[int] | None:
        if self.pipeline_parallel_sizes is None:
            return None
        texts = self.pipeline_parallel_sizes.split(",")
        if not all(t.strip().isdecimal() and int(t) > 0 for t in texts):
            raise InputError(
                f"--pipeline-parallel-sizes {self.pipeline_parallel_sizes!r} is not a list of "
                "whole numbers; write for example 1,2,4"
            )
        return sorted({int(t) for t in texts})


@dataclass(frozen=True, slots=True)
class RequestsGroup:
    """Which requests are asked."""

    limit: Annotated[
        int | None,
        typer.Option(help="Take no more rows than this of each table of requests.", min=1),
    ] = None
    reuse: Annotated[
        str,
        typer.Option(
            metavar="cache|off|RUN",
            help="Where outputs of equal requests are taken from: the store in the user's cache "
            "folder, nowhere, or the directory of a run.",
        ),
    ] = "cache"
    fresh: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE", help="Ask everything of this node again; repeatable."),
    ] = None

    def reused(self) -> ReuseOptions:
        """Return where outputs of equal requests are looked for."""
        from samullm_plugin.run.reuse import ReuseOptions

        return ReuseOptions(self.reuse, tuple(self.fresh or ()))


def with_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command whose groups of options are options of its own, where the group stands."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter)
            continue
        assert isinstance(group, type)
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
            )
            for f in fields(group)
        ]

    @wraps(command)
    def grouped(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        return command(**given)

    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    grouped.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # typer reads it
    grouped.__annotations__ = {p.name: p.annotation for p in parameters}
    return grouped


def parsed_options(texts: list[str] | None, option: str = "--option") -> dict[str, object]:
    """Return ``key=value`` options; values as YAML has them.

    Raises:
        InputError: for a text of another form.
    """
    import yaml

    options = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{option} {text!r} is not key=value; write for example budget_s=10")
        options[key] = yaml.safe_load(value)
    return options


def require_folder(path: Path | None, option: str) -> None:
    """Refuse at once what could not be written at the end.

    Raises:
        InputError: if the folder of a file that is to be written is not there.
    """
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
