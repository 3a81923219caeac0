"""What Python code hands over, as ``app.yaml`` has it: models, nodes, tables, plugins."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from samullm_plugin.app.fields import validate
from samullm_plugin.app.rowspec import InputSection
from samullm_plugin.app.spec import Component, ModelSection, PlannerSection
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.host.registration import Kind


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and how its engines are started: a section of ``models`` in ``app.yaml``.

    Attributes:
        model: name as profiles know it (hub id), or a local folder.
        path: local folder or hub id that is loaded; ``model`` by default.
        max_model_len: longest prompt plus output in tokens; None: as the figures say.
        architecture: figures by name; or a Hugging Face ``config.json`` (or its folder); or the
            name of a bundled model; None: found by ``model`` and ``path``.
        engine_args: engine arguments by vLLM's names.
    """

    model: str
    path: str | Path | None = None
    max_model_len: int | None = None
    architecture: str | Path | Mapping[str, Any] | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def section(self, where: str) -> ModelSection:
        """Return the section.

        Raises:
            InputError: naming the field that is wrong.
        """
        architecture = self.architecture
        fields = {
            "model": self.model,
            "path": None if self.path is None else str(self.path),
            "max_model_len": self.max_model_len,
            "architecture": str(architecture) if isinstance(architecture, Path) else architecture,
            "engine_args": dict(self.engine_args) or None,
        }
        return validate(ModelSection, {n: v for n, v in fields.items() if v is not None}, where)


@dataclass(frozen=True, slots=True)
class Node:
    """A node of an :class:`~samullm_plugin.App`; others take its outputs by it, or by its name.

    Attributes:
        name: as the application knows it; a node with several models stands for all of them.
    """

    name: str

    def __getitem__(self, model: str) -> Node:
        """Return the node of one of its models."""
        return Node(f"{self.name}.{model}")


def node_name(value: object, where: str) -> str:
    """Return the name of a node that is given as itself or by its name.

    Raises:
        InputError: for anything else.
    """
    if isinstance(value, Node):
        return value.name
    if isinstance(value, str):
        return value
    raise InputError(
        f"{where}: give a node, as app.llm or app.python return it, or its name, not a "
        f"{type(value).__name__}"
    )


def input_sections(inputs: Mapping[str, object], where: str) -> dict[str, Any]:
    """Return inputs with nodes by their names.

    Args:
        inputs: by the name that templates use: a node, its name, a list of nodes, or a mapping with
            ``from`` and the other fields of an input.
        where: for messages.
    """
    found: dict[str, Any] = {}
    for label, given in inputs.items():
        place = f"{where}.{label}"
        if isinstance(given, InputSection):
            found[label] = given
        elif isinstance(given, Mapping):
            rest = {("from" if k == "from_" else k): v for k, v in given.items()}
            found[label] = {**rest, "from": _sources(rest.get("from"), f"{place}.from")}
        elif isinstance(given, str | Node):
            found[label] = node_name(given, place)
        else:
            found[label] = {"from": _sources(given, place)}
    return found


def _sources(given: object, where: str) -> str | list[str]:
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [node_name(g, where) for g in given]
    return node_name(given, where)


def written(value: Any, folder: Path, where: str) -> Any:
    """Return sections and what Python code put into them as YAML can say it.

    Args:
        value: a section, or what a field of one holds.
        folder: of the ``app.yaml``.
        where: for messages.

    Raises:
        InputError: for a function or class that cannot be found by a name.
    """
    if isinstance(value, BaseModel):
        known = type(value).model_fields
        names = [n for n in known if n in value.model_fields_set]
        pairs = [(known[n].alias or n, getattr(value, n)) for n in names]
        return {n: written(v, folder, f"{where}.{n}") for n, v in pairs}
    if isinstance(value, Mapping):
        return {k: written(v, folder, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [written(v, folder, where) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, type) or callable(value):
        return _written_place(value, folder, where)
    return value


def _written_place(value: Callable[..., Any] | type, folder: Path, where: str) -> str:
    """Return how ``app.yaml`` names a function or class: ``module:name`` or ``file.py:name``.

    Args:
        value: what Python code handed over.
        folder: of the ``app.yaml``.
        where: for messages.

    Raises:
        InputError: if it cannot be found again by a name.
    """
    name = getattr(value, "__qualname__", "")
    module = getattr(value, "__module__", "") or ""
    wanted = f"{where}: {name or value!r} cannot be written down: "
    if not name.isidentifier():
        raise InputError(f"{wanted}it is no function or class of a module; define it in a file")
    try:
        file = Path(inspect.getfile(value)).resolve()
    except (OSError, TypeError) as error:
        raise InputError(
            f"{wanted}it was defined in a notebook or an interactive session; put it into a file, "
            "such as steps.py, and import it"
        ) from error
    if not file.is_file():
        raise InputError(f"{wanted}its source {file} is no file; put it into one and import it")
    if file.is_relative_to(folder.resolve()):
        return f"{file.relative_to(folder.resolve())}:{name}"
    known = sys.modules.get(module) if module != "__main__" else None
    try:
        found = getattr(known or import_module(module), name, None)
    except ImportError:
        found = None
    if module == "__main__" or found is not value:
        raise InputError(f"{wanted}{file} is neither in {folder} nor an installed module")
    return f"{module}:{name}"


def model_section(value: object, where: str) -> ModelSection:
    """Return a section of ``models``."""
    if isinstance(value, Model):
        return value.section(where)
    if isinstance(value, str):
        return Model(value).section(where)
    return validate(ModelSection, value, where)


def write_table(table: object, path: Path) -> None:
    """Write a table in memory: as lines of JSON where it is rows of their own, else as Parquet.

    Raises:
        InputError: for a row that cannot be written down.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from samullm_plugin.app.memorytables import label_of, memory_batches, memory_rows

    if path.suffix == ".jsonl":
        label = label_of(path.name)
        with path.open("wb") as file:
            for row in memory_rows(table, label):
                if row.error is not None:
                    raise InputError(f"{label} row {row.number}: {row.error}")
                file.write(row.line + b"\n")
        return
    batches = [batch for _, batch in memory_batches(table, label_of(path.name))]
    pq.write_table(pa.Table.from_batches(batches), path, compression="zstd")


Part = str | Mapping[str, Any] | Component | type | object
"""A plugin: its name, a mapping of ``type`` and ``options``, a class of its kind or an instance."""


class HandedOver:
    """The plugins that are installed, and those that Python code has handed over."""

    def __init__(self) -> None:
        """Load nothing before it is needed."""
        self._host: PluginHost | None = None

    @property
    def host(self) -> PluginHost:
        """Return the plugins, those handed over included."""
        if self._host is None:
            from samullm_plugin.host.manager import PluginHost

            self._host = PluginHost.from_settings()
        return self._host

    def part(self, kind: Kind, value: Part) -> Any:
        """Return a plugin as ``app.yaml`` names it; a class or an instance is registered."""
        if isinstance(value, str | Mapping | Component):
            return value
        return self.host.add(kind, value)

    def planner(self, planner: Mapping[str, Any] | PlannerSection) -> Any:
        """Return a section ``planner`` with its plugins as ``app.yaml`` names them."""
        if isinstance(planner, PlannerSection):
            return planner
        kinds: dict[str, Kind] = {
            "scheduler": "scheduler",
            "length_estimator": "length-estimator",
            "latency_model": "latency-model",
            "request_policy": "request-policy",
        }
        return {
            n: self.part(kinds[n], v) if n in kinds and v is not None else v
            for n, v in planner.items()
        }

    def scheduler_name(self, value: Part) -> str:
        """Return the name of a scheduler that is given by it, as a class or as an instance.

        Raises:
            InputError: if there is none of this name.
        """
        name = self.component("scheduler", value).type
        self.host.resolve("scheduler", name)
        return name

    def component(self, kind: Kind, value: Part) -> Component:
        """Return a plugin with its options."""
        part = self.part(kind, value)
        return validate(Component, {"type": part} if isinstance(part, str) else part, kind)
