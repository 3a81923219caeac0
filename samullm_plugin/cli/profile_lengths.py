"""``samullm profile lengths``: measure output lengths on one's own prompts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samullm_plugin.cli.options import parsed_options
from samullm_plugin.cli.output import OutputJson, console, print_table, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.host.interfaces.executor import Executor
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.measuring.lengths import EngineSetup, Masks, MeasuredLengths
    from samullm_plugin.model.costs import ModeCosts
    from samullm_plugin.model.problem import Problem
    from samullm_plugin.run.prompts import PromptBuilder

SHOWN_FAILURES = 5

_SIZES = (1, 2, 4, 8)
_MAX_TOKENS = 1024


def lengths(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="lengths.json", help="Profile to write.")
    ],
    target: Annotated[
        str | None,
        typer.Argument(metavar="[APP]", help="An app.yaml; every model of it is measured."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Instead: prompts, a request per line."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model for --prompts: a folder or a hub id.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What plans call it; its folder's name.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Requests per node.")] = 200,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Limit of outputs whose line has none; 1024.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send --prompts through the model's chat template.")
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt plus output of --model.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(help="vLLM engine argument of --model, as key=value; repeatable."),
    ] = None,
    executor: Annotated[str, typer.Option(help="What runs the engines.")] = "vllm",
    executor_option: Annotated[
        list[str] | None, typer.Option(help="Option of the executor, as key=value; repeatable.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Devices per engine.")] = 1,
    engines: Annotated[int, typer.Option(min=1, help="Engines side by side.")] = 1,
    kv_cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV-cache capacity; by default, as requests need.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which requests are sampled.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option("--log-dir", help="Folder for the engines' logs.")
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Run a sample of requests on real engines and keep how long their outputs are.

    Outputs that end at a limit count as at least that long. Requests whose prompts hold outputs of
    other nodes run after these. Give the file to the planner with
    `planner.length_estimator: {type: ecdf, options: {profile: lengths.json}}`.
    """
    import numpy as np

    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.measuring.lengths import measure_lengths, sample_requests
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.profiling.observations import summary, write_length_profile

    if (target is None) == (prompts is None):
        raise InputError("give an app.yaml, or --prompts FILE.jsonl with --model")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}")
    host = PluginHost.from_settings()
    options = parsed_options(executor_option)
    made: Executor = host.create("executor", executor, options)
    if prompts is not None:
        if model is None:
            raise InputError("--prompts needs --model: a model folder or a hub id")
        arguments = parsed_options(engine_arg, "--engine-arg")
        loaded = _of_prompts(prompts, model, name, max_tokens, chat, max_model_len, arguments)
    else:
        given = {
            "--model": model, "--name": name, "--max-tokens": max_tokens, "--chat": chat or None,
            "--max-model-len": max_model_len, "--engine-arg": engine_arg,
        }  # fmt: skip
        extra = [option for option, value in given.items() if value is not None]
        if extra:
            raise InputError(f"{extra[0]} goes with --prompts; an application says it itself")
        assert target is not None
        loaded = find_application(host, target)
    masks = sample_requests(loaded.app, sample, np.random.default_rng(seed))
    source, setup, note = _prepared(host, loaded, made, masks, tp, engines, kv_cache_tokens, seed)
    setup = replace(setup, run_dir=run_dir)
    out = console()
    measured = measure_lengths(
        made,
        loaded.app,
        source,
        masks,
        setup,
        report=lambda text: out.print(text, markup=False, soft_wrap=True),
    )
    today = datetime.now(UTC).date().isoformat()
    whence = f"{loaded.app.name} on executor {executor}, {today}{note}"
    write_length_profile(output, measured.observations, whence)
    _print(measured, output, note)
    if output_json is not None:
        write_json(
            {
                "source": whence,
                "seconds": measured.seconds,
                "requests_run": measured.num_run,
                "failed": measured.failed,
                "lengths": [
                    {"model": s.model, "task": s.task, **summary(s)} for s in measured.observations
                ],
            },
            output_json,
        )


def _of_prompts(
    prompts: Path,
    model: str,
    name: str | None,
    max_tokens: int | None,
    chat: bool,
    max_model_len: int | None,
    arguments: dict[str, object],
) -> LoadedApplication:
    """Return the application of one model and a file of prompts.

    Raises:
        InputError: naming the file and line, or the option.
    """
    from samullm_plugin.app.assembly import Assembly
    from samullm_plugin.app.fields import validate
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.app.spec import AppSpec
    from samullm_plugin.checkpoints.hf_config import derived_max_model_len, read_config_file
    from samullm_plugin.checkpoints.models import bundled_architecture

    folder = Path(model)
    called = name or (folder.resolve().name if folder.is_dir() else model)
    length = max_model_len
    if length is None and folder.is_dir():
        length = derived_max_model_len(read_config_file(folder))
    if length is None and (found := bundled_architecture(called)):
        length = found[1]
    if length is None:
        raise InputError(
            f"--model {model}: its longest sequence is not known; give --max-model-len"
        )
    section: dict[str, Any] = {
        "model": called,
        "path": str(folder.resolve()) if folder.is_dir() else model,
        "max_model_len": length,
        "engine_args": arguments,
    }
    node = {
        "model": "model",
        "requests": prompts.name,
        "chat": chat,
        "sampling_params": {"max_tokens": max_tokens or min(_MAX_TOKENS, length)},
    }
    value = {"version": 1, "name": "prompts", "models": {"model": section}}
    spec = validate(AppSpec, {**value, "nodes": {"prompts": node}}, str(prompts))
    app, sources = Assembly(spec, prompts, None).build()
    return LoadedApplication(app, None, spec.planner, spec.executor, sources, path=None)


def _prepared(
    host: PluginHost,
    loaded: LoadedApplication,
    executor: Executor,
    masks: Masks,
    tp: int,
    engines: int,
    kv_cache_tokens: int | None,
    seed: int,
) -> tuple[PromptBuilder, EngineSetup, str]:
    """Return prompts and engines; executors that imitate engines get the true lengths.

    Returns:
        Where prompts come from, how engines are started, and a note on what the lengths are.
    """
    import numpy as np

    from samullm_plugin.measuring.lengths import EngineSetup
    from samullm_plugin.model.scenarios import make_scenario
    from samullm_plugin.planning.building import sample_outputs
    from samullm_plugin.planning.instances import make_instance, unfused
    from samullm_plugin.run.length_prompts import LengthPrompts
    from samullm_plugin.run.setup import imitates
    from samullm_plugin.run.text_prompts import TextPrompts

    if not imitates(executor):
        return TextPrompts(loaded), EngineSetup(tp, engines, kv_cache_tokens=kv_cache_tokens), ""
    gpus = None if loaded.cluster is not None else max(_SIZES) * engines
    instance = make_instance(host, loaded, unfused(loaded.planner), gpus=gpus)
    problem = instance.problem
    outputs = loaded.output_tokens
    if outputs is None:
        outputs = sample_outputs(loaded.app, instance.estimator, np.random.default_rng(seed))
    truth = make_scenario(loaded.app, outputs, masks)
    executor.imitate(problem.with_scenarios((truth,)))
    modes = [_smallest(problem, i, tp) for i in range(len(loaded.app.nodes))]
    setup = EngineSetup(
        tp,
        engines,
        tuple(size for size, _ in modes),
        problem.cluster.gpus[0],
        kv_cache_tokens or min(c.kv_cache_tokens for _, c in modes),
        tuple(c for _, c in modes),
    )
    note = f", which takes lengths from {instance.estimator.name}: nothing was measured"
    return LengthPrompts(truth), setup, note


def _smallest(problem: Problem, node: int, tp: int) -> tuple[int, ModeCosts]:
    """Return the smallest engine of at least ``tp`` devices that holds a node's model.

    Raises:
        InputError: if none does.
    """
    from samullm_plugin.model.parallel import ParallelConfig

    for size in (s for s in _SIZES if s >= tp):
        for group in problem.cluster.nvlink_groups:
            if len(group) >= size:
                with suppress(InputError):
                    return size, problem.mode(node, ParallelConfig(1, size, 1), group[:size])
    model = problem.app.nodes[node].model.name
    raise InputError(f"model {model} fits on no engine of {tp} or more devices of the cluster")


def _print(measured: MeasuredLengths, output: Path, note: str) -> None:
    """Print what was measured, on stderr."""
    from samullm_plugin.profiling.observations import summary

    rows = []
    for seen in measured.observations:
        figures: Any = summary(seen)
        quantiles = [f"{v:,}" if v is not None else "above" for v in figures["quantiles"].values()]
        rows.append(
            (seen.model, seen.task, figures["outputs"], figures["cut_at_limit"], *quantiles)
        )
    numbers = ("outputs", "cut at limit", "5 %", "25 %", "50 %", "75 %", "95 %")
    print_table(("model", "task", *numbers), rows, title="output tokens", numbers=numbers)
    out = console()
    if any(s.censored.any() for s in measured.observations):
        out.print(
            "above: beyond the limits of the sample; raise max_tokens to learn more", markup=False
        )
    for node, request, reason in measured.failed[:SHOWN_FAILURES]:
        out.print(f"failed: {node} request {request + 1}: {reason}", markup=False, soft_wrap=True)
    if len(measured.failed) > SHOWN_FAILURES:
        out.print(f"... and {len(measured.failed) - SHOWN_FAILURES} more failed requests")
    text = f"{measured.num_run} requests in {measured.seconds:.1f} s{note}; written to {output}"
    out.print(text, markup=False, soft_wrap=True)
