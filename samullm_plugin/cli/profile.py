"""``samullm profile``: models of one's own machine from measurements."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samullm_plugin.cli.output import OutputJson, print_table, write_json
from samullm_plugin.cli.profile_latency import latency
from samullm_plugin.cli.profile_lengths import lengths
from samullm_plugin.cli.profile_slowdown import slowdown
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.model.architecture import ModelArchitecture
    from samullm_plugin.profiling.iterations import Iterations
    from samullm_plugin.profiling.profile_files import Profile

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Learn latency, memory and length models from measurements, and check them.",
)

app.command()(latency)
app.command()(lengths)
app.command()(slowdown)

IterationsFile = Annotated[
    Path,
    typer.Option(
        "--iterations",
        metavar="FILE.csv[.gz]",
        help="Measured iterations: model, tp, phase (decode, prefill, mixed), batch_size, "
        "context_tokens, max_seq_len, new_tokens, iter_s; optional device, shape, padded_tokens, "
        "comp_s, meta_s, warmup, and for mixed prefill_seqs, prefill_tokens, prefill_pairs.",
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Take only this model's rows.")
]
Size = Annotated[
    int | None, typer.Option("--tp", min=1, metavar="N", help="Take only this size's rows.")
]
ArchitecturesFile = Annotated[
    Path | None,
    typer.Option(
        "--architectures",
        metavar="FILE",
        help="Sizes of models that are not bundled: CSV or JSON table, or one Hugging Face "
        "config.json (with --model).",
    ),
]


@app.command()
def fit(
    iterations: IterationsFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="profile.json", help="Profile to write.")
    ],
    model: ModelName = None,
    tp: Size = None,
    transfer: Annotated[
        bool,
        typer.Option(
            "--transfer",
            help="Also learn coefficients of the device, for models and sizes not measured.",
        ),
    ] = False,
    architectures: ArchitecturesFile = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="Device, if the table does not say."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help="Where the measurements come from, for provenance."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="NAME",
            help="Correct this latency model's host time by few measured iterations instead, such "
            "as aiconfigurator's; writes what its option correction reads.",
        ),
    ] = None,
    base_options: Annotated[
        str | None,
        typer.Option("--base-options", metavar="JSON", help="Options of that latency model."),
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Fit a profile to measured iterations.

    Few terms per model and size: weights read once, tokens and their tile steps, sequences, context
    read, the longest sequence, prefill pairs, launch floor, host time. What the rows do not
    determine is said. Host stalls (garbage collection and the like) count as outliers.
    """
    from samullm_plugin.profiling.fit import fit_profile
    from samullm_plugin.profiling.profile_files import write_profile

    began = time.perf_counter()
    groups, known = _read(iterations, model, tp, architectures, device)
    if base is not None:
        if transfer:
            raise InputError("--transfer learns from measurements alone; leave it out with --base")
        _fit_base(base, base_options, iterations, groups, known, output, output_json)
        return
    try:
        profile = fit_profile(
            groups, known, source=source or f"fitted to {iterations.name}", transfer=transfer
        )
    except InputError as error:
        raise InputError(f"{iterations}: {error}") from error
    write_profile(profile, output)
    seconds = time.perf_counter() - began
    _print_fit(profile, seconds)
    if output_json is not None:
        write_json(_fit_summary(profile, seconds), output_json)


@app.command()
def check(
    iterations: IterationsFile,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="profile.json",
            help="Profile to check; without one, the bundled profile of the table's device.",
        ),
    ] = None,
    model: ModelName = None,
    tp: Size = None,
    architectures: ArchitecturesFile = None,
    output_json: OutputJson = None,
) -> None:
    """Compare a profile's predictions with measured iterations.

    Models and sizes that the profile does not hold are predicted by transfer. Errors are relative
    to the measured iteration without the host's stalls (rows whose host time is more than twice
    the usual one of such batches); mape_with_stalls_pct takes every row as it is.
    """
    from samullm_plugin.profiling.fit import check_profile
    from samullm_plugin.profiling.profile_files import bundled_profiles, read_profile

    groups, known = _read(iterations, model, tp, architectures, None)
    if profile is not None:
        held = read_profile(profile)
    else:
        device = groups[0].device
        bundled = bundled_profiles()
        if device not in bundled:
            raise InputError(
                f"{iterations}: device {device!r} has no bundled profile (there are "
                f"{', '.join(bundled)}); give --profile"
            )
        held = bundled[device]
    report = check_profile(held, groups, known)
    _print_check(report)
    if output_json is not None:
        write_json(report, output_json)


def _fit_base(
    base: str,
    options: str | None,
    iterations: Path,
    groups: list[Iterations],
    known: Mapping[str, ModelArchitecture],
    output: Path,
    output_json: str | None,
) -> None:
    """Correct another latency model, write the correction and print it.

    Raises:
        InputError: naming file, model or option, and remedy.
    """
    import json

    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.measuring.judging import correct_base, write_correction

    try:
        chosen = json.loads(options) if options else {}
    except json.JSONDecodeError as error:
        raise InputError(f"--base-options: not JSON: {error}") from error
    if not isinstance(chosen, dict):
        raise InputError('--base-options: must be a JSON object, such as {"backend_version": null}')
    latency = PluginHost.from_settings().create("latency-model", base, chosen)
    if "correction" not in latency.Config.model_fields:
        raise InputError(
            f"--base {base}: this latency model has no option correction to read what is fitted"
        )
    try:
        correction = correct_base(latency, groups, known)
    except InputError as error:
        raise InputError(f"{iterations}: {error}") from error
    write_correction(correction, output)
    rows = [
        (
            e["model"], e["tensor_parallel_size"], e["rows"], f"{1e3 * e['host_s']:.2f} ms",
            f"{1e6 * e['host_s_per_seq']:.1f} us", f"{e['base_bias_pct']:+.1f} %",
            f"{e['base_mape_pct']:.1f} %", f"{e['mape_pct']:.1f} %",
        )
        for e in correction["entries"]
    ]  # fmt: skip
    columns = ("model", "tp", "rows", "host", "per sequence", "base sum", "base MAPE", "MAPE")
    print_table(columns, rows, numbers=columns[1:])
    if output_json is not None:
        write_json(correction, output_json)


def _read(
    path: Path,
    model: str | None,
    tp: int | None,
    architectures: Path | None,
    device: str | None,
) -> tuple[list[Iterations], Mapping[str, ModelArchitecture]]:
    """Return the measured iterations and the given architectures.

    Raises:
        InputError: naming file, row and remedy.
    """
    from dataclasses import replace

    from samullm_plugin.profiling.iterations import read_iterations

    groups = read_iterations(path, model=model, tensor_parallel_size=tp)
    if device is not None:
        groups = [replace(g, device=device) for g in groups]
    known: dict[str, ModelArchitecture] = {}
    if architectures is not None:
        if architectures.is_dir() or architectures.name == "config.json":
            from samullm_plugin.checkpoints.models import read_checkpoint

            names = {g.model for g in groups}
            if len(names) != 1:
                raise InputError(
                    f"{architectures} describes one model, but {path} has {len(names)}; choose "
                    "one with --model, or give a table of sizes"
                )
            known[names.pop()] = read_checkpoint(architectures)[0]
        else:
            from samullm_plugin.profiling.iterations import read_architectures

            known = read_architectures(architectures)
    return groups, known


def _fit_summary(profile: Profile, seconds: float) -> dict[str, Any]:
    return {
        "device": profile.device,
        "seconds": seconds,
        "models": [
            {
                "model": m.model,
                "tp": m.tensor_parallel_size,
                "mape_pct": m.mape_pct,
                "n": m.num_rows,
                "undetermined": m.undetermined,
            }
            for m in profile.models
        ],
        "transfer_errors_pct": None if profile.transfer is None else profile.transfer.errors_pct,
    }


def _print_fit(profile: Profile, seconds: float) -> None:
    """Print what was fitted, on stderr."""
    rows = [
        (
            m.model,
            m.tensor_parallel_size,
            m.num_rows,
            f"{m.mape_pct:.1f} %",
            "; ".join(m.undetermined),
        )
        for m in profile.models
    ]
    columns = ("model", "tp", "rows", "error", "not determined")
    print_table(columns, rows, numbers=columns[1:4])
    if profile.transfer is not None:
        said = ", ".join(
            f"{name.replace('_', ' ')} {value} %"
            for name, value in profile.transfer.errors_pct.items()
            if value is not None
        )
        typer.echo(f"transfer errs by (median of models left out): {said}", err=True)
    typer.echo(f"{profile.device}: fitted in {seconds:.1f} s", err=True)


def _print_check(report: Mapping[str, Any]) -> None:
    """Print the errors, on stderr."""
    rows = [
        (
            g["model"], g["tp"], g["phase"], g["shape"], g["n"], f"{g['mape_pct']:.1f} %",
            f"{g['mape_with_stalls_pct']:.1f} %", f"{g['bias_pct']:+.1f} %", g["basis"],
        )
        for g in report["groups"]
    ]  # fmt: skip
    columns = ("model", "tp", "phase", "shape", "rows", "MAPE", "with stalls", "sum", "basis")
    print_table(columns, rows, numbers=("tp", "rows", "MAPE", "with stalls", "sum"))
    total = report["overall"]
    typer.echo(
        f"{total['n']} rows: MAPE {total['mape_pct']:.1f} %, median "
        f"{total['median_ape_pct']:.1f} %, "
        f"95th percentile {total['p95_ape_pct']:.1f} %; {total['stalled_rows']} rows with host "
        f"stalls, MAPE with them {total['mape_with_stalls_pct']:.1f} %",
        err=True,
    )
