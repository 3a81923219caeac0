"""An application described in Python: the same sections as an ``app.yaml``, built by calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel

from samullm_plugin.api.nodes import (
    HandedOver,
    Model,
    Node,
    Part,
    input_sections,
    model_section,
    node_name,
    write_table,
    written,
)
from samullm_plugin.app.fields import validate
from samullm_plugin.app.nodespec import MessageSection, NodeSection, PythonSection
from samullm_plugin.app.rowspec import BranchSection, KeepSection, NodeBase, RequestsSection
from samullm_plugin.app.sampling import SamplingSection
from samullm_plugin.app.spec import AppSpec, ClusterSection, OutputSection, PlannerSection
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.host.manager import PluginHost


class Description:
    """What an application is made of; :class:`samullm_plugin.App` can plan and run it.

    Attributes:
        name: of the application.
        folder: what relative paths start from.
        plugins: those installed, and those that Python code has handed over.
    """

    def __init__(
        self,
        name: str,
        models: Mapping[str, str | Model | Mapping[str, Any]] | None = None,
        *,
        cluster: Mapping[str, Any] | ClusterSection | None = None,
        planner: Mapping[str, Any] | PlannerSection | None = None,
        executor: Part | None = None,
        messages: Mapping[str, Sequence[Mapping[str, str] | MessageSection]] | None = None,
        output: str | Mapping[str, Any] | OutputSection | None = None,
        applications: Sequence[str] = (),
        on_bad_row: Literal["fail", "skip"] | None = None,
        folder: str | Path = ".",
    ) -> None:
        """Describe an application; fields are those of ``app.yaml``.

        Args:
            name: of the application.
            models: by the names that nodes use: a hub id or folder, a :class:`Model`, or a mapping.
            cluster: the devices; None: said when planning, with ``gpus``.
            planner: how to plan, as ``app.yaml`` has it; plugins may be classes or instances.
            executor: what runs the engines; None: ``simulated``.
            messages: turns of conversations that nodes include.
            output: the joined table to write while running: its file, or a mapping.
            applications: instead of models and nodes: other applications run together.
            on_bad_row: what becomes of rows that cannot be asked: ``fail`` (nothing is started) or
                ``skip`` (they are error rows); None: ``fail``.
            folder: what relative paths start from.

        Raises:
            InputError: naming the field that is wrong.
        """
        self.folder = Path(folder)
        self.plugins = HandedOver()
        self._tables: dict[str, object] = {}
        self._given: dict[str, object] = {}
        self._nodes: dict[str, NodeBase] = {}
        where = f"App({name!r})"
        self._fields: dict[str, Any] = {"version": 1, "name": name}
        if models:
            self._fields["models"] = {
                n: model_section(m, f"{where}.models.{n}") for n, m in models.items()
            }
        if cluster is not None:
            self._fields["cluster"] = cluster
        if planner is not None:
            self._fields["planner"] = self.plugins.planner(planner)
        if executor is not None:
            self._fields["executor"] = self.plugins.part("executor", executor)
        if messages:
            self._fields["messages"] = {n: list(turns) for n, turns in messages.items()}
        if output is not None:
            self._fields["output"] = {"file": output} if isinstance(output, str) else output
        if applications:
            self._fields["applications"] = list(applications)
        if on_bad_row is not None:
            self._fields["on_bad_row"] = on_bad_row
        self.name = name
        rest = {n: v for n, v in self._fields.items() if n != "models"}
        validate(AppSpec, {**rest, "applications": list(applications) or [name]}, where)
        self._path = self.folder / "app.yaml"

    # Reading and writing

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Return the application of an ``app.yaml``.

        Raises:
            InputError: naming file, field and the remedy.
        """
        from samullm_plugin.app.loading import read_spec

        spec = read_spec(Path(path))
        app = cls.__new__(cls)
        app.name, app.folder, app._path = spec.name, Path(path).parent, Path(path)
        app.plugins, app._tables, app._nodes = HandedOver(), {}, dict(spec.nodes)
        app._given = {}
        app._fields = {
            name: getattr(spec, name) for name in spec.model_fields_set if name != "nodes"
        }
        return app

    def to_yaml(self, path: str | Path) -> Path:
        """Write the application as an ``app.yaml``; tables in memory become files beside it.

        Args:
            path: file to write; relative paths in the application are kept, so that it belongs
                into :attr:`folder` if it has any.

        Raises:
            InputError: for a function or class that cannot be found by a name, such as one of a
                notebook.
        """
        import yaml

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for name, table in self._tables.items():
            write_table(table, target.parent / name)

        record = written(self.spec, target.parent, f"App({self.name!r})")
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=100)
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror}") from error
        return target

    @property
    def spec(self) -> AppSpec:
        """Return the description, checked: what an ``app.yaml`` of this application says.

        Raises:
            InputError: naming the field that is wrong.
        """
        return validate(AppSpec, {**self._fields, "nodes": self._nodes}, f"App({self.name!r})")

    @property
    def host(self) -> PluginHost:
        """Return the plugins, those handed over included."""
        return self.plugins.host

    def load(self, limit: int | None = None) -> LoadedApplication:
        """Read the tables and build the application.

        Args:
            limit: take no more rows than this of each table.

        Raises:
            InputError: naming file, field or row, and the remedy.
        """
        from samullm_plugin.app.loading import build_application
        from samullm_plugin.checkpoints.tokenizing import OwnTokenizers
        from samullm_plugin.planning.applications import build_named

        return build_application(
            self.spec,
            self._path,
            bundled=lambda text: build_named(self.host, text),
            count_tokens=OwnTokenizers(),
            tables=self._tables,
            limit=limit,
        )

    # Nodes

    def llm(
        self,
        name: str,
        *,
        model: str | Sequence[str],
        data: object = None,
        requests: str | Path | Mapping[str, Any] | RequestsSection | None = None,
        id: str | None = None,
        rename: Mapping[str, str] | None = None,
        limit: int | None = None,
        where: Mapping[str, Any] | None = None,
        for_each: Node | str | None = None,
        inputs: Mapping[str, object] | None = None,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str] | MessageSection] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        sampling_params: Mapping[str, Any] | SamplingSection | None = None,
        output_schema: Mapping[str, Any] | type[BaseModel] | str | None = None,
        check: Callable[..., Any] | str | None = None,
        retries: int | None = None,
        retry_temperature: float | None = None,
        reject_rate: float | None = None,
        chain: bool | str | Mapping[str, Any] | None = None,
        copies: int | None = None,
        n: int | None = None,
        route: Mapping[str, Mapping[str, Any] | BranchSection] | None = None,
        keep: Mapping[str, Any] | KeepSection | None = None,
        otherwise: Literal["drop", "pass"] | None = None,
        sample: Any = None,
        chat: bool | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_tokens: int | None = None,
        prefix_tokens: int | None = None,
        lora: str | Path | None = None,
        pair: str | None = None,
        task: str | None = None,
    ) -> Node:
        """Add a node that asks a model.

        Args:
            name: of the node.
            model: its name in ``models``; several make one node per model, ``node["a"]``.
            data: the requests: a table of pandas, polars, pyarrow or datasets, rows (mappings,
                pydantic models, dataclasses, named tuples) in a list or of a generator,
                or the path of a file.
            requests: instead of ``data``: a file, or a mapping as ``app.yaml`` has it.
            id: column of ``data`` that names the rows.
            rename: columns of ``data`` to give other names, as old: new.
            limit: take only so many rows of ``data``.
            where: take only rows whose fields have these values.
            for_each: one request for each request of this node; ``output`` is its output.
            inputs: by the name that the template uses: nodes whose outputs enter the prompt.
            prompt: Jinja2 template of the prompt.
            messages: turns of a conversation, such as ``{"user": "{{ question }}"}``.
            max_tokens: limit of the output; short for one of ``sampling_params``.
            temperature: short for one of ``sampling_params``.
            sampling_params: by vLLM's names.
            output_schema: JSON schema, pydantic class, ``{"regex": ...}`` or ``{"choice": [...]}``.
            check: function that may raise Reject, or return the node's value.
            retries: how often a rejected output is asked for again.
            retry_temperature: what each retry adds to the temperature.
            reject_rate: share of outputs expected to be rejected.
            chain: requests wait for the previous one: True, a field, or a mapping.
            copies: how often each request is made.
            n: samples per request.
            route: this node is a router; branches by the name of their node.
            keep: this node is a filter.
            otherwise: what becomes of what a filter or router does not take.
            sample: an output as the node may give it, to try templates with.
            chat: send the prompt through the chat template.
            chat_template: instead of the model's own.
            chat_template_kwargs: variables passed to the chat template.
            template_tokens: tokens that templates add; None: they are counted.
            prefix_tokens: tokens at the start that all prompts share.
            lora: folder of an adapter.
            pair: template of the second text, for scores of pairs.
            task: embed, score, classify or reward; or a label for length estimators.

        Raises:
            InputError: naming the field that is wrong.
        """
        fields = _given(locals())
        place = f"app.llm({name!r})"
        tokens, temperature = fields.pop("max_tokens", None), fields.pop("temperature", None)
        for field, value in (("max_tokens", tokens), ("temperature", temperature)):
            if value is None:
                continue
            sampling = fields.get("sampling_params", {})
            if isinstance(sampling, SamplingSection):
                sampling = sampling.model_dump(exclude_unset=True)
            if sampling.get(field, value) != value:
                raise InputError(f"{place}: {field} is given twice, with two values")
            fields["sampling_params"] = {**sampling, field: value}
        if lora is not None:
            fields["lora"] = str(lora)
        return self._add(NodeSection, name, place, fields)

    def python(
        self,
        name: str,
        function: Callable[..., Any] | str,
        *,
        data: object = None,
        requests: str | Path | Mapping[str, Any] | RequestsSection | None = None,
        id: str | None = None,
        rename: Mapping[str, str] | None = None,
        limit: int | None = None,
        where: Mapping[str, Any] | None = None,
        for_each: Node | str | None = None,
        inputs: Mapping[str, object] | None = None,
        scope: Literal["row", "batch", "all"] | None = None,
        max: int | None = None,
        expected: float | None = None,
        batch_size: int | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        workers: int | None = None,
        seconds: float | None = None,
        tokens: int | None = None,
        route: Mapping[str, Mapping[str, Any] | BranchSection] | None = None,
        keep: Mapping[str, Any] | KeepSection | None = None,
        otherwise: Literal["drop", "pass"] | None = None,
        sample: Any = None,
    ) -> Node:
        """Add a node that calls a function; it runs on CPUs beside the engines.

        Args:
            name: of the node.
            function: of a row (or a batch, or all rows); or ``file.py:name``, ``module:name``, or a
                bundled one such as ``best by score``.
            data: as for :meth:`llm`.
            requests: as for :meth:`llm`.
            id: as for :meth:`llm`.
            rename: as for :meth:`llm`.
            limit: as for :meth:`llm`.
            where: as for :meth:`llm`.
            for_each: one call for each request of this node.
            inputs: outputs that the row holds, by name.
            scope: ``row``, ``batch`` or ``all``: what it is given.
            max: it returns a list per row, of at most so many; each becomes a row.
            expected: rows expected per row.
            batch_size: rows per call, with scope batch.
            options: further arguments of the function.
            timeout_s: seconds a row may take.
            workers: processes that call it side by side.
            seconds: seconds a row is expected to take.
            tokens: tokens its value is expected to have in later prompts.
            route: as for :meth:`llm`.
            keep: as for :meth:`llm`.
            otherwise: as for :meth:`llm`.
            sample: as for :meth:`llm`.

        Raises:
            InputError: naming the field that is wrong.
        """
        fields = _given(locals())
        fields["python"] = fields.pop("function", None)
        return self._add(PythonSection, name, f"app.python({name!r})", fields)

    def _add(self, kind: type[NodeBase], name: str, place: str, fields: dict[str, Any]) -> Node:
        """Add a node; its table and the nodes it refers to are replaced by their names."""
        if name in self._nodes:
            raise InputError(f"{place}: there is a node {name!r} already")
        self._find_requests(name, place, fields)
        if "for_each" in fields:
            fields["for_each"] = node_name(fields["for_each"], f"{place}: for_each")
        if "inputs" in fields:
            fields["inputs"] = input_sections(fields["inputs"], f"{place}: inputs")
        self._nodes[name] = validate(kind, fields, place)
        return Node(name)

    def _find_requests(self, name: str, place: str, fields: dict[str, Any]) -> None:
        """Put ``requests`` in place of ``data`` and what is said of it."""
        data = fields.pop("data", None)
        table = {n: fields.pop(n) for n in ("id", "rename", "limit") if n in fields}
        if data is not None and "requests" in fields:
            raise InputError(f"{place}: give data or requests, not both")
        if table and data is None:
            listed = ", ".join(table)
            raise InputError(f"{place}: {listed}: there is no data that this could be said of")
        if isinstance(data, str | Path):
            fields["requests"] = {"file": str(data), **table} if table else str(data)
        elif data is not None:
            fields["requests"] = {"file": self._table_name(name, data), **table}
        elif isinstance(fields.get("requests"), Path):
            fields["requests"] = str(fields["requests"])

    def _table_name(self, node: str, data: object) -> str:
        """Return the file that a table in memory stands for; one table has one."""
        for name, given in self._given.items():
            if given is data:
                return name
        from samullm_plugin.app.memorytables import is_rows, lasting

        table = lasting(data)
        name = f"{node}.jsonl" if is_rows(table) else f"{node}.parquet"
        self._given[name], self._tables[name] = data, table
        return name


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call was given of the fields of a node."""
    return {n: v for n, v in arguments.items() if v is not None and n not in ("self", "name")}
