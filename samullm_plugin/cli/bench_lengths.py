"""``samullm bench lengths``: length estimators on one's own observations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.output import OutputJson, console, print_table, progress, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from samullm_plugin.bench.length_plans import PlanBench, PlanEffect
    from samullm_plugin.bench.length_scoring import LengthScore
    from samullm_plugin.host.interfaces.length import LengthEstimator
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.profiling.observations import ObservedLengths

ESTIMATORS = "ecdf conditional proxy fixed oracle"


def lengths(
    observations: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE.jsonl",
            help="Lines with model, prompt_tokens, output_tokens; if known task, prompt, "
            "max_tokens, censored. Repeatable.",
        ),
    ],
    estimators: Annotated[
        str,
        typer.Option(
            help="Length estimators with their options, separated by spaces: "
            "'ecdf conditional:prompt_bins=8'."
        ),
    ] = ESTIMATORS,
    folds: Annotated[
        int, typer.Option(help="Parts of which each is predicted from the others.", min=2)
    ] = 5,
    holdout: Annotated[
        float | None,
        typer.Option(help="Instead of folds: predict this share, learn from the rest."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Lengths asked for per observation.", min=10)] = 200,
    max_tokens: Annotated[
        int | None, typer.Option(help="Limit of outputs where the file has none.", min=1)
    ] = None,
    app: Annotated[
        str,
        typer.Option(
            help="Application whose plans are compared: an app.yaml or a bundled one; none: no "
            "plans."
        ),
    ] = "small-3",
    gpus: Annotated[int | None, typer.Option(help="GPUs, instead of its cluster.")] = None,
    scheduler: Annotated[str, typer.Option(help="Who plans.")] = "greedy",
    latency_model: Annotated[str, typer.Option(help="Where latencies come from.")] = "linear",
    scenarios: Annotated[int, typer.Option(help="Length scenarios to plan for.", min=1)] = 1,
    draws: Annotated[int, typer.Option(help="Draws of true lengths for the plans.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of everything.", min=0)] = 0,
    output_json: OutputJson = None,
) -> None:
    """Score length estimators on observations they have not learned from.

    Pinball loss (mean over five quantiles), coverage of the intervals that should hold 50 % and
    80 % of the lengths, error of the total, and what the error does to a plan: its makespan on true
    lengths against that of the plan made with them. Outputs that were censored below their limit
    are learned from, but not scored.
    """
    from samullm_plugin.bench import length_scoring as scoring
    from samullm_plugin.errors import PluginError
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.profiling.observations import read_observations

    if holdout is not None and not 0 < holdout < 1:
        raise InputError(f"--holdout is {holdout}; write a share between 0 and 1, such as 0.2")
    host = PluginHost.from_settings()
    names = list(dict.fromkeys(estimators.split()))
    if not names:
        raise InputError("--estimators is empty; write for example 'ecdf conditional'")
    groups = read_observations(observations)
    made = {name: scoring.create(host, name, groups) for name in names}
    host.resolve("scheduler", scheduler)
    parts = scoring.make_folds(groups, folds, holdout, seed)
    notes = _file_notes(groups)
    plans = None
    if app != "none":
        plans = _plan_bench(host, app, gpus, latency_model, scheduler, scenarios, seed)
    failed: dict[str, str] = {}
    blamed: set[str] = set()
    scores: list[LengthScore] = []
    fitted: dict[str, LengthEstimator] = {}
    with progress("bench lengths", len(names)) as step:
        for name in names:
            step(name)
            kept: list[LengthEstimator] = []
            try:
                scores += scoring.score(
                    made[name],
                    name,
                    groups,
                    parts,
                    samples=samples,
                    seed=seed,
                    default_limit=max_tokens,
                    keep=kept.append,
                )
                fitted[name] = kept[0]
            except (InputError, PluginError) as error:  # the others' rows still appear
                failed[name] = str(error)
                if isinstance(error, PluginError):
                    blamed.add(name)
    effects: list[PlanEffect] = []
    if plans is not None and fitted:
        from samullm_plugin.bench.length_plans import choose_groups

        chosen = choose_groups(plans.app, groups, notes)
        experiments = [plans.deal(groups, chosen, parts[0], d) for d in range(draws)]
        informed_s = [plans.informed_s(experiment) for experiment in experiments]
        with progress("plans", len(fitted) * draws) as step:
            for name, estimator in fitted.items():
                truth = name == scoring.ORACLE
                try:
                    effects.append(
                        plans.effect(
                            name,
                            experiments,
                            None if truth else estimator,
                            informed_s,
                            lambda: step(""),
                        )
                    )
                except (InputError, PluginError) as error:
                    failed[name] = str(error)
                    if isinstance(error, PluginError):
                        blamed.add(name)
    _show(names, scores, effects, failed, notes)
    if output_json is not None:
        write_json(
            {
                "scores": scores,
                "plans": effects,
                "failed": failed,
                "notes": notes,
                "num_observations": sum(len(g) for g in groups),
            },
            output_json,
        )
    if not scores and not blamed:
        raise InputError("no estimator could be scored; see the reasons above")
    if blamed:
        raise typer.Exit(1)


def _plan_bench(
    host: PluginHost,
    target: str,
    gpus: int | None,
    latency_model: str,
    scheduler: str,
    scenarios: int,
    seed: int,
) -> PlanBench:
    from samullm_plugin.bench.length_plans import PlanBench
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.planning.instances import cluster_of

    loaded = find_application(host, target)
    return PlanBench(
        host,
        loaded.app,
        cluster_of(loaded, gpus),
        latency_model=latency_model,
        scheduler=scheduler,
        scenarios=scenarios,
        seed=seed,
    )


def _file_notes(groups: Sequence[ObservedLengths]) -> list[str]:
    """Return what was read, by model and task."""
    from samullm_plugin.bench.length_scoring import scored_rows

    notes = []
    for group in groups:
        seen, known = group.observations, int(scored_rows(group).sum())
        task = f", task {seen.task}" if seen.task else ""
        texts = "" if seen.prompts is None else ", with texts"
        notes.append(
            f"{seen.model}{task}: {len(group)} observations{texts}, "
            f"{int(seen.censored.sum())} censored, {known} scored"
        )
    return notes


def _show(
    names: Sequence[str],
    scores: Sequence[LengthScore],
    effects: Sequence[PlanEffect],
    failed: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Print both tables for people."""
    out = console()
    models = list(dict.fromkeys(s.model for s in scores if s.model))
    for model in ["", *(models if len(models) > 1 else [])]:
        rows = [
            (
                s.estimator,
                s.num_scored,
                f"{s.pinball_tokens:.1f}",
                f"{100 * s.coverage_50:.1f} %",
                f"{100 * s.coverage_80:.1f} %",
                f"{100 * s.total_error:+.1f} %",
            )
            for s in scores
            if s.model == model
        ]
        numbers = ("scored", "pinball tokens", "in 50 %", "in 80 %", "total")
        print_table(("estimator", *numbers), rows, title=model or "all models", numbers=numbers)
    if effects:
        rows_s = [
            (
                e.estimator,
                f"{e.planned_s:.1f}",
                f"{e.realised_s:.1f}",
                f"{e.informed_s:.1f}",
                f"{100 * e.loss:+.1f} %",
                f"{100 * e.error:+.1f} %",
            )
            for e in effects
        ]
        numbers = ("planned s", "realised s", "informed s", "loss", "planned is off by")
        print_table(("estimator", *numbers), rows_s, title="plans", numbers=numbers)
    for name in names:
        if name in failed:
            out.print(f"{name}: {failed[name]}", markup=False, soft_wrap=True)
    for note in notes:
        out.print(note, markup=False, soft_wrap=True, style="dim")
    out.print(
        "pinball: of the 10, 25, 50, 75 and 90 % quantiles, lower is better. total: of the "
        "predicted means against the true sum. realised: the plan on lengths held out; informed: "
        "the plan made with them; loss: realised over informed. All seconds are simulated.",
        style="dim",
    )
