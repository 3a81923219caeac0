"""``samullm preview``: what the models will be asked, before anything is paid for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.options import Gpus, Target
from samullm_plugin.cli.output import Json, console, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.run.preview import PreviewedRequest


def preview(
    target: Target,
    node: Annotated[str | None, typer.Option(help="Show only this node.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of each table of requests.", min=1)] = 3,
    run: Annotated[
        bool, typer.Option("--run", help="Ask the models for these rows, through all nodes.")
    ] = False,
    executor: Annotated[
        str, typer.Option(help="With --run: vllm, or another executor that generates.")
    ] = "vllm",
    output_dir: Annotated[
        Path | None, typer.Option(help="With --run: directory of the run; default: none is kept.")
    ] = None,
    gpus: Gpus = None,
    json: Json = False,
) -> None:
    """Show rendered prompts, token counts, sampling parameters, and which rows go where."""
    from samullm_plugin.api.app import App
    from samullm_plugin.app.loading import looks_like_file

    if not looks_like_file(target):
        raise InputError(f"{target}: a bundled application has no texts to preview")
    if not run and (output_dir is not None or executor != "vllm"):
        raise InputError("--output-dir and --executor go with --run")
    app = App.from_yaml(target)
    if app.load(rows).sources is None:
        raise InputError(f"{target}: a part of it is bundled and has no texts to preview")
    if run:
        found = app.answered(rows, executor=executor, output_dir=output_dir, gpus=gpus)
    else:
        found = app.preview(node, rows)
    if node is not None and run:
        found = [r for r in found if node in (r.node, r.node.rpartition(".")[0])]
    if json:
        write_json(found)
        return
    for request in found:
        sys.stdout.write(_text(request, answered=run))
    _summary(found)


def _text(request: PreviewedRequest, *, answered: bool) -> str:
    """Return a request for people."""
    lines = [f"── {request.node}  {request.id}  ({request.model or 'function'})"]
    if request.waits_for:
        lines.append(f"   with the outputs of {', '.join(request.waits_for)}")
    if request.only_if:
        lines.append(f"   only if {' and '.join(request.only_if)} lets it pass")
    if request.status == "skipped":
        lines.append("   not asked: another branch was taken, or a filter dropped it")
    if request.prompt_tokens is not None:
        how = "" if request.exact else " (estimated: no tokenizer here)"
        lines.append(f"   {request.prompt_tokens:,} prompt tokens{how}")
        sampling = ", ".join(f"{k} {v}" for k, v in request.sampling.items())
        lines.append(f"   {sampling}")
    for message in request.messages or ():
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        lines += [f"[{message.get('role')}]", *map(_shown, parts)]
    if request.prompt is not None:
        lines.append(request.prompt)
    if not request.model and request.output is not None:
        lines.append(request.output)
    elif answered and request.output is not None:
        lines += ["   ── output", request.output]
    if request.error is not None:
        lines.append(f"   failed: {request.error}")
    return "\n".join(lines) + "\n\n"


def _shown(part: object) -> str:
    """Return a part of a message for people: its text, or what kind of thing it is."""
    if not isinstance(part, Mapping):
        return str(part)
    return str(part["text"]) if "text" in part else f"⟨{part.get('type')}⟩"


def _summary(found: list[PreviewedRequest]) -> None:
    """Print how many requests each node has, and how many go elsewhere."""
    counts: dict[str, Counter[str]] = {}
    for request in found:
        counts.setdefault(request.node, Counter())[request.status] += 1
    for name, count in counts.items():
        parts = ", ".join(f"{n:,} {status}" for status, n in count.items())
        console().print(f"{name}: {parts}", markup=False)
