"""Reading an ``app.yaml`` with everything it refers to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from samullm_plugin.app.assembly import Assembly
from samullm_plugin.app.fields import read_yaml, validate
from samullm_plugin.app.loaded import LoadedApplication, NodeSource
from samullm_plugin.app.modelspecs import build_cluster
from samullm_plugin.app.requestlines import TokenCounter
from samullm_plugin.app.schemas import SchemaResolver
from samullm_plugin.app.spec import AppSpec
from samullm_plugin.errors import InputError
from samullm_plugin.model.mixing import mix_applications
from samullm_plugin.model.types import Ints

Bundled = Callable[[str], LoadedApplication]
"""Builds an application that is named rather than read, such as ``ensembling:requests=1000``."""

_SUFFIXES = (".yaml", ".yml", ".json")


def looks_like_file(name: str) -> bool:
    """Return whether a name of an application means a file."""
    return name.endswith(_SUFFIXES) or "/" in name


def load_application(
    path: Path,
    *,
    bundled: Bundled | None = None,
    count_tokens: TokenCounter | None = None,
    limit: int | None = None,
    resolve_schema: SchemaResolver | None = None,
) -> LoadedApplication:
    """Return the application of a file.

    Args:
        path: an ``app.yaml``.
        bundled: builds applications that a mix names instead of files; None: files only.
        count_tokens: counts tokens where a tokenizer is at hand; lengths of other texts are
            estimated, and the application's notes say so.
        limit: take no more rows than this of each table of requests.
        resolve_schema: returns the JSON schema of a class; None: it is imported here.

    Raises:
        InputError: naming file, field or line, and the remedy.
    """
    spec = read_spec(path)
    return build_application(
        spec,
        path,
        bundled=bundled,
        count_tokens=count_tokens,
        limit=limit,
        resolve_schema=resolve_schema,
    )


def read_spec(path: Path) -> AppSpec:
    """Return what an ``app.yaml`` says, checked field by field.

    Raises:
        InputError: naming file, field and the remedy.
    """
    return validate(AppSpec, read_yaml(path), str(path))


def build_application(
    spec: AppSpec,
    path: Path,
    *,
    bundled: Bundled | None = None,
    count_tokens: TokenCounter | None = None,
    tables: Mapping[str, object] | None = None,
    limit: int | None = None,
    above: tuple[Path, ...] = (),
    resolve_schema: SchemaResolver | None = None,
) -> LoadedApplication:
    """Return the application that an ``app.yaml``, or Python, describes.

    Args:
        spec: the description.
        path: the file it is from, or would be; other files are relative to it.
        bundled: as in :func:`load_application`.
        count_tokens: as in :func:`load_application`.
        tables: tables in memory, by the name of the file that they stand for.
        limit: take no more rows than this of each table of requests.
        above: files that this one is a part of.
        resolve_schema: as in :func:`load_application`.

    Raises:
        InputError: naming file, field or line, and the remedy.
    """
    if path.resolve() in above:
        raise InputError(f"{path}: applications: it contains itself")
    cluster = build_cluster(spec.cluster, f"{path}: cluster") if spec.cluster else None
    if not spec.applications:
        app, sources = Assembly(spec, path, count_tokens, tables, limit, resolve_schema).build()
        return LoadedApplication(
            app,
            cluster,
            spec.planner,
            spec.executor,
            sources,
            path=path,
            output=spec.output,
            executor_given="executor" in spec.model_fields_set,
        )
    parts = []
    for name in spec.applications:
        if looks_like_file(name):
            part = path.parent / name
            parts.append(
                build_application(
                    read_spec(part),
                    part,
                    bundled=bundled,
                    count_tokens=count_tokens,
                    limit=limit,
                    above=(*above, path.resolve()),
                    resolve_schema=resolve_schema,
                )
            )
        elif bundled is None:
            raise InputError(f"{path}: applications: {name!r} is not a file")
        else:
            parts.append(bundled(name))
    return LoadedApplication(
        mix_applications(spec.name, [part.app for part in parts]),
        cluster,
        spec.planner,
        spec.executor,
        _sources(parts),
        _lengths(parts),
        path,
        spec.output,
        "executor" in spec.model_fields_set,
    )


def _sources(parts: list[LoadedApplication]) -> tuple[NodeSource, ...] | None:
    """Return the texts of all parts, or None if one has none."""
    models: list[NodeSource] = []
    python: list[NodeSource] = []
    total = sum(len(part.app.nodes) for part in parts)
    for part in parts:
        if part.sources is None:
            return None
        num = len(part.app.nodes)
        place = [len(models) + i for i in range(num)]
        place += [total + len(python) + k for k in range(len(part.app.python))]
        moved = [source.with_nodes(place) for source in part.sources]
        models += moved[:num]
        python += moved[num:]
    return (*models, *python)


def _lengths(parts: list[LoadedApplication]) -> tuple[Ints, ...] | None:
    """Return known output lengths of all parts, or None if those of one are not known."""
    if any(part.output_tokens is None for part in parts):
        return None
    return tuple(lengths for part in parts for lengths in part.output_tokens or ())
