"""``samullm profile latency``: measure one's own machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from samullm_plugin.cli.output import OutputJson, print_table, write_json
from samullm_plugin.errors import InputError


def latency(
    model: Annotated[str, typer.Option("--model", metavar="PATH", help="Model folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="profile.json", help="Profile to write.")
    ],
    tp: Annotated[
        str, typer.Option("--tp", metavar="1,2", help="Tensor-parallel sizes to measure.")
    ] = "1",
    name: Annotated[
        str | None, typer.Option("--name", help="What plans call the model; its folder's name.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="What profiles call the device.")
    ] = "this-machine",
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE.csv", help="Also write the measured iterations."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "bfloat16",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence.", min=64)] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 64,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens of an iteration.", min=1)
    ] = 2048,
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="KV-cache capacity; for 16 longest sequences.", min=1)
    ] = None,
    executor: Annotated[str, typer.Option(help="What runs the engine.")] = "vllm",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Accept a model that brings its own code.")
    ] = False,
    output_json: OutputJson = None,
) -> None:
    """Drive a live engine with few informative batches and fit its iteration latency.

    Every iteration is recorded in the engine by its scheduler. One workload is not fitted: the
    error on it, of single iterations and of their sum, is reported and kept with the profile.
    """
    from samullm_plugin.core.application import EngineOptions, ModelSpec
    from samullm_plugin.io.models import read_hf_config
    from samullm_plugin.io.profile import EngineStart, write_profile
    from samullm_plugin.manager import PluginHost
    from samullm_plugin.services.profiling_engine import measure, write_iterations
    from samullm_plugin.services.profiling_fit import check_profile, fit_profile

    sizes = _sizes(tp)
    architecture, longest = read_hf_config(Path(model), trust_remote_code=trust_remote_code)
    length = max_model_len or min(longest or 4096, 4096)
    called = name or Path(model).resolve().name
    spec = ModelSpec(
        called,
        length,
        architecture,
        path=str(model),
        engine=EngineOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=32,
            dtype=dtype,
        ),
    )
    capacity = kv_cache_tokens or 16 * length
    if capacity < length + 64:
        raise InputError(f"--kv-cache-tokens {capacity}: one sequence of {length} does not fit")
    measured = measure(
        PluginHost.from_settings().create("executor", executor),
        spec,
        sizes,
        device=device,
        kv_cache_tokens=capacity,
        vocab_size=architecture.vocab_size,
        report=lambda text: print(text, file=sys.stderr),  # noqa: T201  # progress, on stderr
    )
    groups, known = [m.rows for m in measured], {called: architecture}
    if rows is not None:
        write_iterations(rows, [*groups, *(m.unseen for m in measured)])
    starts = [
        EngineStart(
            model=called,
            tensor_parallel_size=size,
            kv_cache_tokens=capacity,
            warm_s=round(m.start_s, 3),
        )
        for size, m in zip(sizes, measured, strict=True)
    ]
    profile = fit_profile(groups, known, source=f"measured on {device}", starts=starts)
    write_profile(profile, output)
    report: dict[str, Any] = check_profile(profile, [m.unseen for m in measured], known)
    report["seconds"] = {str(s): round(m.seconds, 1) for s, m in zip(sizes, measured, strict=True)}
    report["totals"] = [
        _total(profile, m.unseen, size) for size, m in zip(sizes, measured, strict=True)
    ]
    print_table(
        ("tp", "iterations", "mean error %", "error of the sum %", "measuring s"),
        [
            (t["tp"], t["n"], t["mape_pct"], f"{t['sum_error_pct']:+}", round(m.seconds))
            for t, m in zip(report["totals"], measured, strict=True)
        ],
        title=f"{called}: error on iterations that were not fitted",
        numbers=("tp", "iterations", "mean error %", "error of the sum %", "measuring s"),
    )
    if output_json is not None:
        write_json(report, output_json)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise InputError(f"--tp {text}: write sizes as in --tp 1,2")
    return sizes


def _total(profile: Any, rows: Any, size: int) -> dict[str, Any]:
    """Return how well a profile predicts rows, one by one and in sum."""
    import numpy as np

    fitted = profile.fitted(rows.model, size)
    predicted = fitted.latency.latency().step_seconds(rows.steps)
    longer = 1 + (fitted.interruption_pct or 0.0) / 100
    return {
        "tp": size,
        "n": len(rows),
        "mape_pct": round(float(100 * np.mean(np.abs(predicted / rows.seconds - 1))), 2),
        "sum_error_pct": round(float(100 * (longer * predicted.sum() / rows.seconds.sum() - 1)), 2),
    }
