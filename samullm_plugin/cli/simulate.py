"""``samullm simulate``: one engine replica, step for step as vLLM's scheduler runs it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from samullm_plugin.cli.output import OutputJson, print_table, write_json
from samullm_plugin.errors import InputError

logger = logging.getLogger(__name__)


def simulate(
    requests: Annotated[
        Path,
        typer.Option(
            "--requests",
            metavar="FILE",
            help="JSONL: id, prompt_tokens or prompt_token_ids, output_tokens; if wanted "
            "arrival_step or arrival_s, priority.",
        ),
    ],
    engine: Annotated[
        Path,
        typer.Option(
            "--engine",
            metavar="FILE",
            help="YAML: vLLM's engine arguments by name, num_blocks, and latency (without it "
            "every iteration takes one second).",
        ),
    ],
    steps: Annotated[
        Path | None,
        typer.Option(
            "--steps", metavar="FILE", help="Write a line per step: who was scheduled, preempted."
        ),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Simulate one engine, scheduling at every step what vLLM would."""
    from samullm_plugin.cli.simulation_files import (
        ITERATIONS_AS_SECONDS,
        read_engine,
        read_requests,
        summarize,
        write_steps,
    )
    from samullm_plugin.engine import NeverFitsError, simulate_engine

    config, latency = read_engine(engine)
    given = read_requests(requests, config.max_model_len)
    if latency is None:
        logger.warning("%s has no latency: every iteration takes one second", engine)
        latency = ITERATIONS_AS_SECONDS
    try:
        run = simulate_engine(config, given.workload, latency, record_steps=steps is not None)
    except NeverFitsError as error:
        if steps is not None and error.run.steps is not None:
            write_steps(steps, error.run.steps, given.ids)
        raise InputError(
            f"{given.name(error.request)} needs {error.needed_blocks} KV-cache blocks and the "
            f"engine has {error.usable_blocks} (num_blocks less the null block): it would wait "
            "for ever; raise num_blocks or shorten the request"
        ) from error
    if steps is not None and run.steps is not None:
        write_steps(steps, run.steps, given.ids)
    summary: dict[str, Any] = summarize(config, given.workload, run)
    if output_json is not None:
        write_json(summary, output_json)
    if output_json != "-":
        print_table(("", "value"), _for_people(summary), numbers=("value",))


def _for_people(summary: dict[str, Any]) -> list[tuple[str, str]]:
    throughput, cache = summary["throughput"], summary["kv_cache"]
    return [
        ("Requests", f"{summary['num_requests']}"),
        ("Makespan (s)", f"{summary['makespan_s']:.3f}"),
        ("Throughput (requests/s)", f"{throughput['requests_per_s']:.2f}"),
        ("Throughput (output tokens/s)", f"{throughput['output_tokens_per_s']:.1f}"),
        ("Throughput (total tokens/s)", f"{throughput['total_tokens_per_s']:.1f}"),
        ("Mean time to first token (s)", f"{summary['mean_first_token_s']:.3f}"),
        ("Steps", f"{summary['num_steps']}"),
        ("Preemptions", f"{summary['preemptions']}"),
        (
            "KV cache, most blocks in use",
            f"{cache['peak_blocks']} of {cache['usable_blocks']} ({cache['peak_usage']:.1%})",
        ),
        ("Tokens computed", f"{summary['computed_tokens']}"),
        ("Tokens found in the prefix cache", f"{summary['cached_tokens']}"),
    ]
