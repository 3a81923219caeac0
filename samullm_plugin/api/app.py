"""An application described in Python: the same sections as an ``app.yaml``, built by calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from samullm_plugin.api.nodes import Model, Node, input_sections, node_name, written_place
from samullm_plugin.app.fields import validate
from samullm_plugin.app.sampling import SamplingSection
from samullm_plugin.app.spec import (
    AppSpec,
    BranchSection,
    ClusterSection,
    Component,
    KeepSection,
    MessageSection,
    ModelSection,
    NodeBase,
    NodeSection,
    OutputSection,
    PlannerSection,
    PythonSection,
    RequestsSection,
)
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.api.plans import AppPlan
    from samullm_plugin.api.runs import AppRun
    from samullm_plugin.api.tasks import Task
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.host.registration import Kind
    from samullm_plugin.run.preview import PreviewedRequest

Part = str | Mapping[str, Any] | Component | type | object
"""A plugin: its name, a mapping of ``type`` and ``options``, a class of its kind or an instance."""


class App:
    """An application: models, and nodes that use them.

    Example:
        >>> import samullm_plugin as sl
        >>> app = sl.App("answers", models={"a": "Qwen/Qwen3-4B", "j": "Qwen/Qwen3-8B"})
        >>> answer = app.llm("answer", model="a", data=[{"prompt": "Why?"}], max_tokens=64)
        >>> rate = app.llm("rate", model="j", for_each=answer, prompt="{{ output }}", max_tokens=8)

    Attributes:
        name: of the application.
        folder: what relative paths start from.
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
        self._host: PluginHost | None = None
        self._tables: dict[str, object] = {}
        self._nodes: dict[str, NodeBase] = {}
        where = f"App({name!r})"
        self._fields: dict[str, Any] = {"version": 1, "name": name}
        if models:
            self._fields["models"] = {
                n: _model(m, f"{where}.models.{n}") for n, m in models.items()
            }
        if cluster is not None:
            self._fields["cluster"] = cluster
        if planner is not None:
            self._fields["planner"] = self._planner(planner)
        if executor is not None:
            self._fields["executor"] = self._part("executor", executor)
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
    def from_yaml(cls, path: str | Path) -> App:
        """Return the application of an ``app.yaml``.

        Raises:
            InputError: naming file, field and the remedy.
        """
        from samullm_plugin.app.loading import read_spec

        spec = read_spec(Path(path))
        app = cls.__new__(cls)
        app.name, app.folder, app._path = spec.name, Path(path).parent, Path(path)
        app._host, app._tables, app._nodes = None, {}, dict(spec.nodes)
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
            _write_table(table, target.parent / name)

        def plain(value: Any, where: str) -> Any:
            if isinstance(value, BaseModel):
                cls = type(value)
                names = [n for n in cls.model_fields if n in value.model_fields_set]
                pairs = [(cls.model_fields[n].alias or n, getattr(value, n)) for n in names]
                return {n: plain(v, f"{where}.{n}") for n, v in pairs}
            if isinstance(value, Mapping):
                return {k: plain(v, f"{where}.{k}") for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v, where) for v in value]
            if isinstance(value, Path):
                return str(value)
            if isinstance(value, type) or callable(value):
                return written_place(value, target.parent, where)
            return value

        record = plain(self.spec, f"App({self.name!r})")
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
            data: the requests: a table of pandas, polars, pyarrow or datasets, a list of mappings,
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
            chat_template_kwargs: what the chat template is told.
            template_tokens: tokens that templates add; None: they are counted.
            prefix_tokens: tokens at the start that all prompts share.
            lora: folder of an adapter.
            pair: template of the second text, for scores of pairs.
            task: embed, score, classify or reward; or a label for length estimators.

        Raises:
            InputError: naming the field that is wrong.
        """
        place = f"app.llm({name!r})"
        sampling: Any = sampling_params
        if max_tokens is not None or temperature is not None:
            given = sampling.model_dump(exclude_unset=True) if isinstance(
                sampling, SamplingSection) else dict(sampling or {})  # fmt: skip
            for field, value in (("max_tokens", max_tokens), ("temperature", temperature)):
                if value is not None and given.setdefault(field, value) != value:
                    raise InputError(f"{place}: {field} is given twice, with two values")
            sampling = given
        fields: dict[str, Any] = {
            "model": model if isinstance(model, str) else list(model),
            "prompt": prompt,
            "messages": None if messages is None else list(messages),
            "sampling_params": sampling,
            "output_schema": output_schema,
            "check": check,
            "retries": retries,
            "retry_temperature": retry_temperature,
            "reject_rate": reject_rate,
            "chain": chain,
            "copies": copies,
            "n": n,
            "chat": chat,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
            "template_tokens": template_tokens,
            "prefix_tokens": prefix_tokens,
            "lora": None if lora is None else str(lora),
            "pair": pair,
            "task": task,
        }
        fields |= self._common(
            name, place, data, requests, id, rename, limit, where, for_each, inputs, route, keep,
            otherwise, sample,
        )  # fmt: skip
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
        place = f"app.python({name!r})"
        fields: dict[str, Any] = {
            "python": function,
            "scope": scope,
            "max": max,
            "expected": expected,
            "batch_size": batch_size,
            "options": options,
            "timeout_s": timeout_s,
            "workers": workers,
            "seconds": seconds,
            "tokens": tokens,
        }
        fields |= self._common(
            name, place, data, requests, id, rename, limit, where, for_each, inputs, route, keep,
            otherwise, sample,
        )  # fmt: skip
        return self._add(PythonSection, name, place, fields)

    def _common(
        self,
        name: str,
        place: str,
        data: object,
        requests: object,
        id_: str | None,
        rename: Mapping[str, str] | None,
        limit: int | None,
        where: Mapping[str, Any] | None,
        for_each: Node | str | None,
        inputs: Mapping[str, object] | None,
        route: Mapping[str, Any] | None,
        keep: Any,
        otherwise: str | None,
        sample: Any,
    ) -> dict[str, Any]:
        """Return the fields that nodes of all kinds have."""
        table = {"id": id_, "rename": rename, "limit": limit}
        table = {n: v for n, v in table.items() if v is not None}
        if data is not None and requests is not None:
            raise InputError(f"{place}: give data or requests, not both")
        if table and data is None:
            listed = ", ".join(table)
            raise InputError(f"{place}: {listed}: there is no data that this could be said of")
        if isinstance(data, str | Path):
            requests = {"file": str(data), **table} if table else str(data)
        elif data is not None:
            requests = {"file": self._table_name(name, data), **table}
        elif isinstance(requests, Path):
            requests = str(requests)
        return {
            "requests": requests,
            "where": where,
            "for_each": None if for_each is None else node_name(for_each, f"{place}: for_each"),
            "inputs": None if inputs is None else input_sections(inputs, f"{place}: inputs"),
            "route": route,
            "keep": keep,
            "otherwise": otherwise,
            "sample": sample,
        }

    def _table_name(self, node: str, data: object) -> str:
        """Return the file that a table in memory stands for; one table has one."""
        for name, table in self._tables.items():
            if table is data:
                return name
        name = f"{node}.parquet"
        self._tables[name] = data
        return name

    def _add(self, kind: type[NodeBase], name: str, place: str, fields: Mapping[str, Any]) -> Node:
        if name in self._nodes:
            raise InputError(f"{place}: there is a node {name!r} already")
        given = {n: v for n, v in fields.items() if v is not None}
        self._nodes[name] = validate(kind, given, place)
        return Node(name)

    # Plugins

    @property
    def host(self) -> PluginHost:
        """Return the plugins, those handed over included."""
        if self._host is None:
            from samullm_plugin.host.manager import PluginHost

            self._host = PluginHost.from_settings()
        return self._host

    def _part(self, kind: Kind, value: Part) -> Any:
        """Return a plugin as ``app.yaml`` names it; a class or an instance is registered."""
        if isinstance(value, str | Mapping | Component):
            return value
        return self.host.add(kind, value)

    def _planner(self, planner: Mapping[str, Any] | PlannerSection) -> Any:
        if isinstance(planner, PlannerSection):
            return planner
        kinds: dict[str, Kind] = {
            "scheduler": "scheduler",
            "length_estimator": "length-estimator",
            "latency_model": "latency-model",
            "request_policy": "request-policy",
        }
        return {
            n: self._part(kinds[n], v) if n in kinds and v is not None else v
            for n, v in planner.items()
        }

    def scheduler_name(self, value: Part) -> str:
        """Return the name of a scheduler that is given by it, as a class or as an instance.

        Raises:
            InputError: if there is none of this name.
        """
        name = self._component("scheduler", value).type
        self.host.resolve("scheduler", name)
        return name

    def _component(self, kind: Kind, value: Part) -> Component:
        """Return a plugin with its options."""
        part = self._part(kind, value)
        return validate(Component, {"type": part} if isinstance(part, str) else part, kind)

    # Planning and running

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

    def plan(
        self,
        *,
        gpus: int | None = None,
        scheduler: Part | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        length_estimator: Part | None = None,
        latency_model: Part | None = None,
        scenarios: int | None = None,
        seed: int | None = None,
        budget_s: float | None = None,
        fusion: bool | None = None,
        limit: int | None = None,
        executor: Part | None = None,
        reuse: str | Path | AppRun = "cache",
        fresh: Sequence[Node | str] = (),
    ) -> AppPlan:
        """Plan: which models run when, on which devices, spread how.

        Args:
            gpus: number of GPUs, instead of the application's cluster.
            scheduler: its name, class or an instance; None: the application's.
            scheduler_options: its options.
            length_estimator: where output lengths come from; None: the application's.
            latency_model: where iteration times come from; None: the application's.
            scenarios: length scenarios to plan for.
            seed: of lengths and scheduler.
            budget_s: seconds the scheduler may search.
            fusion: serve nodes of one model that follow one another with the same engines.
            limit: take no more rows than this of each table.
            executor: what the plan is for; None: the application's.
            reuse: where outputs of equal requests are taken from, which are not asked again:
                ``cache`` (the user's store), ``off``, or an earlier run or its directory.
            fresh: nodes that are asked again in any case.

        Raises:
            InputError: if the input is wrong.
            PlanError: if no valid plan was found.
        """
        from samullm_plugin.api.plans import make_app_plan

        changes: dict[str, Any] = {
            "scheduler": None if scheduler is None else self._part("scheduler", scheduler),
            "length_estimator": None
            if length_estimator is None
            else self._part("length-estimator", length_estimator),
            "latency_model": None
            if latency_model is None
            else self._part("latency-model", latency_model),
            "scenarios": scenarios,
            "seed": seed,
            "budget_s": budget_s,
            "fusion": fusion,
        }
        from samullm_plugin.run.reuse import ReuseOptions

        part = None if executor is None else self._component("executor", executor)
        nodes = tuple(node_name(n, "app.plan: fresh") for n in fresh)
        options = ReuseOptions(str(getattr(reuse, "directory", reuse)), nodes)
        return make_app_plan(self, changes, scheduler_options, gpus, limit, options, part)

    def start_plan(self, **options: Any) -> Task[AppPlan]:
        """Plan in the background; options as of :meth:`plan`."""
        from samullm_plugin.api.tasks import Task

        return Task(lambda: self.plan(**options), f"plan of {self.name}")

    def run(
        self,
        plan: AppPlan | None = None,
        output_dir: str | Path | None = None,
        **options: Any,
    ) -> AppRun:
        """Run to the end; Ctrl-C (in a notebook: interrupt) stops it so that it can be resumed.

        Args:
            plan: what :meth:`plan` made; None: it is planned first.
            output_dir: new directory of the run; None: the next free number in ``runs/NAME``.
            options: as of :meth:`start`.

        Raises:
            InputError: if the input is wrong; nothing was started then.
            RunError: if the run failed after it had started.
            KeyboardInterrupt: after it was interrupted and everything had been written.
        """
        running = self.start(plan, output_dir, **options)
        running.watch()
        return running

    def start(
        self,
        plan: AppPlan | None = None,
        output_dir: str | Path | None = None,
        *,
        executor: Part | None = None,
        executor_options: Mapping[str, Any] | None = None,
        replan: bool = True,
        gpus: int | None = None,
        limit: int | None = None,
        reuse: str | Path | AppRun | None = None,
        fresh: Sequence[Node | str] | None = None,
    ) -> AppRun:
        """Run in the background: ``run.wait()``, ``await run``, ``run.add_done_callback``.

        Args:
            plan: what :meth:`plan` made; None: it is planned first.
            output_dir: new directory of the run; None: the next free number in ``runs/NAME``.
            executor: ``vllm``, ``simulated``, ``emulated``, a class or an instance; None: the
                application's.
            executor_options: its options.
            replan: plan again when lengths or latencies are not as expected.
            gpus: number of GPUs, where there is no plan yet.
            limit: take no more rows than this of each table, where there is no plan yet.
            reuse: as of :meth:`plan`, where there is no plan yet.
            fresh: as of :meth:`plan`, where there is no plan yet.

        Raises:
            InputError: if the input is wrong.
        """
        from samullm_plugin.api.runs import AppRun

        given: dict[str, Any] = {"gpus": gpus, "limit": limit, "reuse": reuse, "fresh": fresh}
        given = {n: v for n, v in given.items() if v is not None}
        if plan is not None and given:
            names = ", ".join(given)
            raise InputError(f"app.run: {names}: this belongs to the plan; give it to app.plan")
        made = self.plan(executor=executor, **given) if plan is None else plan
        part = made.loaded.executor if executor is None else self._component("executor", executor)
        return AppRun.begin(made, output_dir, part, executor_options, replan=replan)

    def preview(self, node: Node | str | None = None, rows: int = 3) -> list[PreviewedRequest]:
        """Return the requests of the first rows as engines would be asked them.

        Outputs of other nodes are their ``sample``, or stand-ins in angle brackets.

        Args:
            node: only this node; None: all.
            rows: rows of each table.

        Raises:
            InputError: if the input is wrong.
        """
        from samullm_plugin.run.preview import previewed, with_stand_ins

        loaded = self.load(rows)
        samples = {n: s.sample for n, s in self._nodes.items() if isinstance(s.sample, str)}
        only = None if node is None else node_name(node, "app.preview: node")
        return list(previewed(*with_stand_ins(loaded, samples), only, loaded))

    def answered(
        self,
        rows: int = 3,
        *,
        executor: Part = "vllm",
        output_dir: str | Path | None = None,
        gpus: int | None = None,
    ) -> list[PreviewedRequest]:
        """Return the requests of the first rows with what the models answer, all nodes included.

        Args:
            rows: rows of each table.
            executor: what generates.
            output_dir: directory of the run; None: none is kept.
            gpus: instead of the application's cluster.

        Raises:
            InputError: if the input is wrong.
            RunError: if the run failed.
        """
        from tempfile import TemporaryDirectory

        from samullm_plugin.run.journal import JournalReader, read_journal_places
        from samullm_plugin.run.preview import previewed
        from samullm_plugin.run.recovery import recover

        plan = self.plan(
            gpus=gpus, limit=rows, executor=executor, scheduler="max-heuristic", scenarios=1,
            fusion=False,
        )  # fmt: skip
        with TemporaryDirectory(prefix="samullm-preview-") as temporary:
            target = Path(temporary) / "run" if output_dir is None else Path(output_dir)
            self.run(plan, target, executor=executor)
            path = target / "events.jsonl"
            journal = JournalReader(path)
            try:
                found = recover(plan.loaded.app, read_journal_places(path), str(path), journal.read)
                return list(previewed(plan.loaded, found.resume.ledger))
            finally:
                journal.close()

    def resume(self, output_dir: str | Path, *, plan: AppPlan | None = None) -> AppRun:
        """Go on with an interrupted run, to its end.

        Args:
            output_dir: directory of the run.
            plan: anything that :meth:`plan` made; only its figures are used. None: it is made.

        Raises:
            InputError: if the folder holds no run of this application.
        """
        from samullm_plugin.api.runs import AppRun

        running = AppRun.resume(self, Path(output_dir), plan)
        running.watch()
        return running

    def __repr__(self) -> str:
        """Return name, models and nodes."""
        return f"App({self.name!r}, nodes={list(self._nodes)})"


def _model(value: object, where: str) -> ModelSection:
    """Return a section of ``models``."""
    if isinstance(value, Model):
        return value.section(where)
    if isinstance(value, str):
        return Model(value).section(where)
    return validate(ModelSection, value, where)


def _write_table(table: object, path: Path) -> None:
    """Write a table in memory as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from samullm_plugin.app.rowtables import memory_batches

    batches = [batch for _, batch in memory_batches(table, path.name)]
    pq.write_table(pa.Table.from_batches(batches), path, compression="zstd")
