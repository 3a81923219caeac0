"""``samullm profile slowdown``: what engines that share a device cost each other."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.options import parsed_options, with_groups
from samullm_plugin.cli.output import OutputJson, print_table, write_json
from samullm_plugin.cli.profile_latency import (
    USUAL,
    EngineGroup,
    model_specs,
    require_measurable,
)
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.measuring.slowdown import Slowdown


@with_groups
def slowdown(
    model: Annotated[
        list[str],
        typer.Option("--model", metavar="PATH", help="Model folder; give one or two."),
    ],
    engine: EngineGroup,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds of each kind of work alone.")
    ] = 5.0,
    executor: Annotated[str, typer.Option(help="What runs the engines.")] = "vllm",
    output_json: OutputJson = None,
) -> None:
    """Measure how much longer iterations take while another engine computes on the same device.

    Two engines, of two models or of one, decode and prefill alone and at once; the same iterations
    are compared. The mean of the factors is what plans can count with (cluster.slowdown), which
    have one for all iterations.
    """
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.measuring.engine import capacities
    from samullm_plugin.measuring.slowdown import measure_slowdown
    from samullm_plugin.model.cluster import Cluster
    from samullm_plugin.model.shared_gpus import Sharing, share_gpus

    if len(model) > 2:
        raise InputError(f"--model: {len(model)} are given; two engines share a device")
    engines = PluginHost.from_settings().create(
        "executor", executor, parsed_options(engine.executor_option)
    )
    require_measurable(engines)
    if not engines.can_share_gpus:
        raise InputError(
            f"--executor {executor}: it has one engine on a device at a time; take vllm"
        )
    specs = model_specs(model, None, engine.settings(engines), engine.max_model_len)
    here = engines.local_cluster()
    half = None if here is None else share_gpus(Cluster(here.gpus[:1]), [Sharing(2)]).gpus[0]
    sequences = USUAL[engines.devices_are].sequences
    found = measure_slowdown(
        engines,
        (specs[0], specs[-1]),
        kv_cache_tokens=[
            capacities(engines, s, half, (1,), sequences)[0] for s in (specs[0], specs[-1])
        ],
        seconds=seconds,
        report=lambda text: print(text, file=sys.stderr),  # noqa: T201  # progress, on stderr
    )
    _print(found)
    factors = [f.factor for f in found]
    mean = max(1.0, sum(factors) / len(factors))
    drift = max(f.drift for f in found)
    typer.echo(
        f"for plans on devices that two engines share: slowdown: {mean:.2f} (the mean; largest "
        f"{max(factors):.2f}; equal runs alone differed by up to {100 * drift:.0f} %)",
        err=True,
    )
    if output_json is not None:
        rows = [{**asdict(f), "factor": f.factor} for f in found]
        write_json({"slowdown": mean, "measured": rows}, output_json)


def _print(found: list[Slowdown]) -> None:
    """Print every pair of kinds of work, on stderr."""
    columns = ("engine of", "does", "beside", "which does", "iterations", "alone ms", "beside ms",
               "factor")  # fmt: skip
    rows = [
        (
            f.model, f.work, f.beside, f.beside_work, f.iterations, f"{1e3 * f.alone_s:.2f}",
            f"{1e3 * f.together_s:.2f}", f"{f.factor:.2f}",
        )
        for f in found
    ]  # fmt: skip
    print_table(columns, rows, numbers=columns[4:])
