"""``samullm profile latency``: measure one's own machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samullm_plugin.cli.options import parsed_options, with_groups
from samullm_plugin.cli.output import OutputJson, print_table, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.host.interfaces.executor import Executor
    from samullm_plugin.measuring.engine import MeasuredModel
    from samullm_plugin.model.application import EngineOptions, ModelSpec


@dataclass(frozen=True, slots=True)
class _Usual:
    """What engines on a kind of device are usually told.

    Attributes:
        num_seqs: sequences at once.
        batched_tokens: tokens of an iteration.
        block_size: tokens of a KV block.
        sequences: longest sequences that the KV cache holds, if no GPU is known to be filled.
    """

    num_seqs: int
    batched_tokens: int
    block_size: int
    sequences: int


_OPTIONS = {
    "model": "--model",
    "max_model_len": "--max-model-len",
    "tensor_parallel_size": "--tp",
}
"""Engine arguments that are given as options only."""
USUAL = {"gpu": _Usual(256, 8192, 16, 64), "cpu": _Usual(64, 2048, 32, 16)}


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Engines to measure."""

    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "bfloat16"
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence.", min=64)] = None
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences at once; 256 on GPUs, 64 on CPUs.", min=1)
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an iteration; 8192 on GPUs, 2048 on CPUs.", min=1)
    ] = None
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(help="Argument of vLLM's engine, as key=value; repeatable."),
    ] = None
    executor_option: Annotated[
        list[str] | None, typer.Option(help="Option of the executor, as key=value; repeatable.")
    ] = None

    def settings(self, engines: Executor) -> EngineOptions:
        """Return what the engines are told.

        Args:
            engines: what runs them.

        Raises:
            InputError: for arguments that have options of their own, or are wrong.
        """
        from samullm_plugin.app.modelspecs import engine_options

        usual = USUAL[engines.devices_are]
        limits = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        others = parsed_options(self.engine_arg, "--engine-arg")
        for argument, option in _OPTIONS.items():
            if argument in others:
                raise InputError(f"--engine-arg {argument}: give it as {option}")
        for argument, value in limits.items():
            if value is not None and argument in others:
                raise InputError(
                    f"--engine-arg {argument}: there is an option for it; leave one out"
                )
        arguments = {
            "max_num_seqs": self.max_num_seqs or usual.num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens or usual.batched_tokens,
            "block_size": usual.block_size,
            "dtype": self.dtype,
            **others,
        }
        return engine_options(arguments, "--engine-arg")


@with_groups
def latency(
    model: Annotated[
        list[str], typer.Option("--model", metavar="PATH", help="Model folder; repeatable.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="profile.json", help="Profile to write.")
    ],
    engine: EngineGroup,
    tp: Annotated[
        str, typer.Option("--tp", metavar="1,2", help="Tensor-parallel sizes to measure.")
    ] = "1",
    name: Annotated[
        str | None, typer.Option("--name", help="What plans call one model; its folder's name.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="What profiles call the device.")
    ] = "this-machine",
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE.csv", help="Also write the measured iterations."),
    ] = None,
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="KV-cache capacity; what fits on GPUs, 16 longest sequences on CPUs.",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, help="Of sampling; drawing tokens takes longer than taking the likeliest (0)."
        ),
    ] = 0.0,
    executor: Annotated[str, typer.Option(help="What runs the engine.")] = "vllm",
    output_json: OutputJson = None,
) -> None:
    """Drive a live engine with few informative batches and fit its iteration latency.

    Every iteration is recorded in the engine by its scheduler. Runs of other workloads are not
    fitted: what a plan says they take is compared with the seconds they took.
    """
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.measuring.engine import (
        capacities,
        iterations_of,
        measure,
        write_iterations,
    )
    from samullm_plugin.measuring.judging import judge_runs
    from samullm_plugin.profiling.fit import check_profile, fit_profile
    from samullm_plugin.profiling.iterations import Iterations
    from samullm_plugin.profiling.profile_files import EngineStart, write_profile

    sizes = _sizes(tp)
    host = PluginHost.from_settings()
    options = parsed_options(engine.executor_option)
    engines = host.create("executor", executor, options)
    usual = USUAL[engines.devices_are]
    specs = model_specs(model, name, engine.settings(engines), engine.max_model_len)
    for spec in specs:
        if kv_cache_tokens is not None and kv_cache_tokens < spec.max_model_len + 64:
            raise InputError(
                f"--kv-cache-tokens {kv_cache_tokens}: one sequence of {spec.max_model_len} does "
                "not fit"
            )
    require_measurable(engines)
    groups: list[Iterations] = []
    others: list[Iterations] = []
    starts: list[EngineStart] = []
    found: list[tuple[ModelSpec, int, MeasuredModel]] = []
    known = {s.name: s.architecture for s in specs if s.architecture is not None}
    here = engines.local_cluster()
    gpu = None if here is None else here.gpus[0]
    room = [
        [kv_cache_tokens] * len(sizes)
        if kv_cache_tokens is not None
        else capacities(engines, spec, gpu, sizes, usual.sequences)
        for spec in specs
    ]
    for spec, tokens in zip(specs, room, strict=True):
        measured = measure(
            host.create("executor", executor, options),
            spec,
            sizes,
            device=device,
            kv_cache_tokens=tokens,
            vocab_size=known[spec.name].vocab_size,
            temperature=temperature,
            report=lambda text, s=spec: print(f"{s.name}: {text}", file=sys.stderr),  # type: ignore[misc]  # noqa: T201  # progress, on stderr
        )
        for size, capacity, m in zip(sizes, tokens, measured, strict=True):
            found.append((spec, size, m))
            groups.append(m.rows)
            others.append(iterations_of(m.unseen, spec.name, size, device))
            starts.append(m.engine_start(spec.name, size, capacity))
            _keep(engines, spec, size, m)
    if rows is not None:
        write_iterations(rows, [*groups, *others])
    sampled = f"sampling at temperature {temperature:g}"
    profile = fit_profile(groups, known, source=f"measured on {device}, {sampled}", starts=starts)
    write_profile(profile, output)
    as_plans_take_it = host.create("latency-model", "linear", {"profile": output})
    report: dict[str, Any] = check_profile(profile, others, known)
    report["sizes"] = [
        {
            "model": spec.name,
            **judge_runs(as_plans_take_it, spec, device, size, m.unseen),
            "rows": len(m.rows),
            "measuring_s": round(m.seconds, 1),
            "check_s": round(m.check_s, 1),
            "ready_s": round(m.start.ready_s, 3),
            "first_use_s": round(m.first_use_s, 3),
        }
        for spec, size, m in found
    ]
    for spec in specs:
        _print(spec.name, [s for s in report["sizes"] if s["model"] == spec.name])
    if output_json is not None:
        write_json(report, output_json)


def require_measurable(engines: Executor) -> None:
    """Refuse an executor whose times are modelled.

    Raises:
        InputError: naming it.
    """
    from samullm_plugin.run.setup import imitates

    if imitates(engines):
        raise InputError(
            f"--executor {engines.name}: its times come from a latency model, so there is nothing "
            "to measure; profile with vllm"
        )


def model_specs(
    paths: Sequence[str], name: str | None, engine: EngineOptions, max_model_len: int | None
) -> list[ModelSpec]:
    """Return the models to measure.

    Raises:
        InputError: for a folder that is no model's, or two models of one name.
    """
    from samullm_plugin.checkpoints.models import read_checkpoint
    from samullm_plugin.model.application import ModelSpec

    if name is not None and len(paths) > 1:
        raise InputError("--name names one model; leave it out for several, which are called as "
                         "their folders")  # fmt: skip
    specs: dict[str, ModelSpec] = {}
    for path in paths:
        architecture, longest = read_checkpoint(Path(path), engine)
        called = name or Path(path).resolve().name
        if called in specs:
            raise InputError(f"--model {path}: another folder is called {called} as well")
        length = max_model_len or min(longest, 4096)
        specs[called] = ModelSpec(called, length, architecture, path=path, engine=engine)
    return list(specs.values())


def _keep(engines: Executor, spec: ModelSpec, size: int, measured: MeasuredModel) -> None:
    """Keep iterations and start for plans on this machine with these engine settings."""
    from samullm_plugin.profiling.calibration import Calibration, add_calibration, setting_key

    cluster = engines.local_cluster()
    if cluster is None:
        return
    kind, table = cluster.gpus[0].name, measured.rows
    kept = Calibration(table.steps, table.seconds, len(table), (measured.start_s,))
    about = {"model": spec.name, "device": kind, "tensor_parallel_size": size}
    add_calibration(setting_key(spec, kind, size, 1), kept, about)


def _print(model: str, sizes: Sequence[Mapping[str, Any]]) -> None:
    """Print how well runs that were not fitted are predicted, on stderr."""
    columns = ("tp", "run", "requests", "iterations", "measured s", "predicted s", "error %",
               "iteration error %")  # fmt: skip
    print_table(
        columns,
        [
            (
                s["tp"], r["workload"], r["requests"], r["iterations"], f"{r['measured_s']:.2f}",
                f"{r['predicted_s']:.2f}", f"{r['error_pct']:+.1f}", f"{r['mape_pct']:.1f}",
            )
            for s in sizes
            for r in s["runs"]
        ],
        title=f"{model}: runs that were not fitted",
        numbers=tuple(c for c in columns if c != "run"),
    )  # fmt: skip
    for s in sizes:
        typer.echo(
            f"tp {s['tp']}: {s['rows']} iterations in {s['measuring_s']:.0f} s; engine ready after "
            f"{s['ready_s']:.1f} s, its first batches {s['first_use_s']:.1f} s slower than later "
            f"ones; two equal runs differed by {s['drift_pct']:.1f} %",
            err=True,
        )


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise InputError(f"--tp {text}: write sizes as in --tp 1,2")
    return sizes
