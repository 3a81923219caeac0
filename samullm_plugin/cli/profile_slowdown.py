"""``samullm profile slowdown``: what engines that share a device cost each other."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.options import parsed_options
from samullm_plugin.cli.output import OutputJson, print_table, write_json
from samullm_plugin.cli.profile_latency import (
    USUAL,
    engine_settings,
    model_specs,
    require_measurable,
)
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.measuring.slowdown import Slowdown


def slowdown(
    model: Annotated[
        list[str],
        typer.Option("--model", metavar="PATH", help="Model folder; give one or two."),
    ],
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds of each kind of work alone.")
    ] = 5.0,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "bfloat16",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence.", min=64)] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences at once; 256 on GPUs, 64 on CPUs.", min=1)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an iteration; 8192 on GPUs, 2048 on CPUs.", min=1)
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(help="Argument of vLLM's engine, as key=value; repeatable."),
    ] = None,
    executor_option: Annotated[
        list[str] | None, typer.Option(help="Option of the executor, as key=value; repeatable.")
    ] = None,
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
        "executor", executor, parsed_options(executor_option)
    )
    require_measurable(engines)
    if not engines.can_share_gpus:
        raise InputError(
            f"--executor {executor}: it has one engine on a device at a time; take vllm"
        )
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    settings = engine_settings(engines, engine_arg, limits, dtype)
    specs = model_specs(model, None, settings, max_model_len)
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
