"""From a checked ``app.yaml`` to an application and the texts of its requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from samullm_plugin.app import drafts
from samullm_plugin.app.badrows import bad_rows_message
from samullm_plugin.app.drafts import Draft, NodeDraft
from samullm_plugin.app.loaded import Branch, NodeSource, referenced
from samullm_plugin.app.modelspecs import model_specs
from samullm_plugin.app.requests import PLAIN, Line, TokenCounter, read_requests
from samullm_plugin.app.spec import AppSpec, PythonSection
from samullm_plugin.app.tables import request_table
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import Application, ModelNode

_UNSERVED = {
    "messages", "n", "chat_template", "chat_template_kwargs", "output_schema", "check", "retries",
    "lora", "pair", "otherwise", "sample",
}  # fmt: skip


class Assembly:
    """Puts the nodes of one file together.

    Args:
        spec: the checked file.
        path: where it is; other files are relative to it.
        count_tokens: counts tokens where a tokenizer is at hand; None: estimates.
        tables: tables in memory, by the name of the file that they stand for.
        limit: take no more rows than this of each table.

    Raises:
        InputError: naming file and field.
    """

    def __init__(
        self,
        spec: AppSpec,
        path: Path,
        count_tokens: TokenCounter | None,
        tables: Mapping[str, object] | None = None,
        limit: int | None = None,
    ) -> None:
        """Expand nodes with several models, and find the order in which to fill them."""
        self.spec, self.path, self.count_tokens = spec, path, count_tokens
        self._tables, self._limit = tables or {}, limit
        self.notes: list[str] = []
        models = model_specs(spec, path)
        self.nodes: list[NodeDraft] = []
        self.members: dict[str, list[int]] = {}
        for name, section in spec.nodes.items():
            if isinstance(section, PythonSection):
                raise InputError(f"{path}: nodes.{name}.python: Python nodes cannot be run yet")
            if missing := section.model_fields_set & _UNSERVED:
                field = sorted(missing)[0]
                raise InputError(f"{path}: nodes.{name}.{field}: it has no effect yet")
            if any(b.expr for b in section.route.values()) or (section.keep and section.keep.expr):
                raise InputError(f"{path}: nodes.{name}: expressions have no effect yet")
            for model in section.models:
                if model not in models:
                    hint = suggest(model, models) or f"; models: {', '.join(models) or 'none'}"
                    raise InputError(f"{path}: nodes.{name}.model: no model {model!r}{hint}")
                full = name if isinstance(section.model, str) else f"{name}.{model}"
                self.members.setdefault(name, []).append(len(self.nodes))
                self.nodes.append(NodeDraft(full, name, section, models[model]))
        names = [n.name for n in self.nodes]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise InputError(f"{path}: nodes: two nodes are named {twice!r}; rename one")
        self._lines: dict[str, tuple[Line, ...]] = {}
        self._gates: dict[tuple[int, int], int] = {}
        self._routers = self._find_routers()

    def build(self) -> tuple[Application, tuple[NodeSource, ...]]:
        """Return the application and the texts of its nodes.

        Raises:
            InputError: naming file and field, or every row that cannot be asked.
        """
        try:
            found = self._build()
        except InputError as error:
            bad = self._bad_rows()
            if bad and self.spec.on_bad_row == "fail":  # they may be why
                raise InputError(bad_rows_message(bad)) from error
            raise
        if bad := self._bad_rows():
            if self.spec.on_bad_row == "fail":
                raise InputError(bad_rows_message(bad))
            message = bad_rows_message(bad, remedy="they are written to the outputs as errors")
            found = (replace(found[0], notes=(*found[0].notes, message)), found[1])
        return found

    def _bad_rows(self) -> dict[str, str]:
        """Return what is wrong with rows that cannot be asked, by where they are."""
        found = {
            line.where: line.error
            for lines in self._lines.values()
            for line in lines
            if line.error is not None
        }
        for node in self.nodes:
            for request in node.requests:
                if request.error is not None:
                    found.setdefault(request.where(self._where(node)), request.error)
        return found

    def _build(self) -> tuple[Application, tuple[NodeSource, ...]]:
        for index in self._order():
            self._fill(index)
        nodes, sources = [], []
        for index, draft in enumerate(self.nodes):
            table, notes = request_table(draft, self._where(draft), self.count_tokens)
            self.notes += notes
            nodes.append(ModelNode(draft.name, draft.model, table, draft.section.task))
            sources.append(self._source(index))
        self._number_prefixes(nodes)
        app = Application(self.spec.name, tuple(nodes), tuple(dict.fromkeys(self.notes)))
        return app, tuple(sources)

    # Order

    def _where(self, node: NodeDraft) -> str:
        return f"{self.path}: nodes.{node.section_name}"

    def _resolve(self, names: Sequence[str], where: str) -> list[int]:
        """Return the nodes that names in the file mean."""
        found = []
        full = {n.name: i for i, n in enumerate(self.nodes)}
        for name in names:
            if name in self.members:
                found += self.members[name]
            elif name in full:
                found.append(full[name])
            else:
                hint = suggest(name, self.members) or f"; nodes: {', '.join(self.members)}"
                raise InputError(f"{where}: there is no node {name!r}{hint}")
        return found

    def _find_routers(self) -> dict[int, tuple[int, int]]:
        """Return, by branch, its router and the position of the branch in it."""
        routers: dict[int, tuple[int, int]] = {}
        for index, node in enumerate(self.nodes):
            where = f"{self._where(node)}.route"
            if node.section.route and len(self.members[node.section_name]) > 1:
                raise InputError(f"{where}: a router has one model")
            for position, name in enumerate(node.section.route):
                branches = self._resolve([name], where)
                if len(branches) != 1:
                    raise InputError(f"{where}: {name!r} has several models; name one of them")
                if branches[0] in routers:
                    raise InputError(f"{where}: {name!r} is a branch of another router already")
                routers[branches[0]] = (index, position)
        return routers

    def _upstreams(self, index: int) -> set[int]:
        """Return the nodes that must be filled before a node."""
        node, where = self.nodes[index], self._where(self.nodes[index])
        found: set[int] = set()
        if node.section.for_each:
            found.update(self._resolve([node.section.for_each], f"{where}.for_each"))
        for name, edge in node.section.edges.items():
            found.update(self._resolve(edge.sources, f"{where}.inputs.{name}.from"))
        if index in self._routers:
            found.add(self._routers[index][0])
        if node.section.requests:
            named = {n.partition(":")[0] for line in self._read(node) for n in line.values.inputs}
            by_name = {n.name: i for i, n in enumerate(self.nodes)}
            found.update(by_name[n] for n in named if n in by_name)
        return found

    def _order(self) -> list[int]:
        """Return the nodes, upstream ones first.

        Raises:
            InputError: naming a cycle, or a node whose requests come from nowhere.
        """
        graph = {i: self._upstreams(i) for i in range(len(self.nodes))}
        try:
            order = list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            cycle = " -> ".join(self.nodes[i].name for i in error.args[1])
            raise InputError(
                f"{self.path}: nodes: they form a cycle: {cycle}; requests of one node that wait "
                "for earlier ones of the same node are written with `chain`"
            ) from error
        for index, node in enumerate(self.nodes):
            if not node.section.requests and not graph[index]:
                raise InputError(
                    f"{self._where(node)}: it has no requests: give requests (a JSONL file), "
                    "for_each (a node), or inputs"
                )
        return order

    # Requests

    def _read(self, node: NodeDraft) -> tuple[Line, ...]:
        table = node.section.table
        if table is None:
            return ()
        key = table.model_dump_json()
        if key not in self._lines:
            where = f"{self._where(node)}.requests"
            self._lines[key] = read_requests(
                table,
                self.path.parent,
                where,
                self.notes,
                given=self._tables.get(table.name),
                limit=self._limit,
            )
        return self._lines[key]

    def _fill(self, index: int) -> None:
        """Make the requests of a node whose upstream nodes have theirs."""
        node, section = self.nodes[index], self.nodes[index].section
        where = self._where(node)
        requests = self._origin(index)
        requests = drafts.copied(requests, section.copies)
        requests = drafts.sampled(requests, section.sampling_params.n or 1)
        for name, edge in section.edges.items():
            field = f"{where}.inputs.{name}"
            upstream = [(i, self.nodes[i]) for i in self._resolve(edge.sources, f"{field}.from")]
            drafts.join(requests, upstream, edge, name, field)
        drafts.named_waits(requests, {n.name: (i, n) for i, n in enumerate(self.nodes)})
        if index in self._routers:
            self._route(index, requests)
        filters = {
            i: n.section.keep.probability for i, n in enumerate(self.nodes) if n.section.keep
        }
        drafts.gate_requests(requests, filters, self._gate)
        if chain := section.chain_section:
            label = "previous" if chain.in_prompt else ""
            drafts.link_chain(requests, chain.by, label, index, f"{where}.chain")
        if section.prompt is not None:
            used = referenced(section.prompt, f"{where}.prompt")
            for label in sorted(drafts.hide_unused(requests, used) - {"output"}):
                self.notes.append(
                    f"node {node.name}: the template does not use {label}: it is only waited for"
                )
        node.requests = requests

    def _origin(self, index: int) -> list[Draft]:
        """Return a node's requests before copies and inputs."""
        node, section = self.nodes[index], self.nodes[index].section
        where = self._where(node)
        if section.requests:
            return drafts.pick(self._read(node), section, where)
        if section.for_each:
            upstream = self._resolve([section.for_each], where)
            several = len(upstream) > 1
            return [
                draft
                for i in upstream
                for draft in drafts.one_for_each(
                    i, self.nodes[i], "output", f"{self.nodes[i].name}:" if several else ""
                )
            ]
        if index in self._routers:
            router = self._routers[index][0]
            return [Draft(r.id, r.item, r.fields, None) for r in self.nodes[router].requests]
        name, edge = next(iter(section.edges.items()))
        field = f"{where}.inputs.{name}"
        upstream = self._resolve(edge.sources, field)
        return drafts.one_for_each_value([self.nodes[i] for i in upstream], edge.by, field)

    def _route(self, index: int, requests: Sequence[Draft]) -> None:
        """Make the requests of a branch alternatives to those of the router's other branches."""
        router, position = self._routers[index]
        share = list(self.nodes[router].section.shares.values())[position]
        by_id = {r.id: k for k, r in enumerate(self.nodes[router].requests)}
        where = f"{self._where(self.nodes[index])}: it is a branch of a router"
        taken: set[str] = set()
        for request in requests:
            base = request.id if request.id in by_id else request.item
            if base not in by_id:
                raise InputError(
                    f"{where}, and its request {request.id!r} is none of the router's; leave out "
                    "requests, so that it takes the router's"
                )
            if base in taken:
                raise InputError(f"{where}: copies of a branch's requests are not supported")
            taken.add(base)
            request.waits.insert(0, drafts.Wait("", router, by_id[base]))
            request.probability *= share
            request.choice = self._gate(router, by_id[base])

    def _gate(self, node: int, request: int) -> int:
        """Return a number for what a router or filter decides about one request."""
        return self._gates.setdefault((node, request), len(self._gates))

    # Results

    def _source(self, index: int) -> NodeSource:
        """Return the texts of a node."""
        node, section = self.nodes[index], self.nodes[index].section
        where = f"{self._where(node)}.route"
        branches = tuple(
            Branch(self._resolve([name], where)[0], drafts.compiled(branch.when))
            for name, branch in section.route.items()
        )
        lines = {k: r.line.values for k, r in enumerate(node.requests) if r.line}
        ids = {k: v.prompt_token_ids for k, v in lines.items() if v.prompt_token_ids}
        shared = section.sampling_params.given()
        shared.pop("n", None)
        own: dict[int, Mapping[str, object]] = {}
        for k, request in enumerate(node.requests):
            values = request.line.values if request.line else PLAIN
            given = values.sampling
            if values.max_tokens is not None:
                given = {**given, "max_tokens": values.max_tokens}
            if request.sample and (seed := given.get("seed", shared.get("seed"))) is not None:
                given = {**given, "seed": int(str(seed)) + request.sample}  # as vLLM's n does
            if given:
                own[k] = given
        return NodeSource(
            ids=tuple(r.id for r in node.requests),
            items=tuple(r.item for r in node.requests),
            fields=tuple(r.fields for r in node.requests),
            labels=tuple(w.label for r in node.requests for w in r.waits),
            inputs=tuple(section.edges),
            template=section.prompt,
            own_prompt=section.requests is not None,
            chat=section.chat,
            sampling=shared,
            request_sampling=own,
            request_chat={k: v.chat for k, v in lines.items() if v.chat},
            samples={k: r.sample for k, r in enumerate(node.requests) if r.sample},
            refused={k: r.error for k, r in enumerate(node.requests) if r.error is not None},
            prompt_token_ids=ids,
            branches=branches,
            keep=drafts.compiled(section.keep.when) if section.keep else None,
        )

    def _number_prefixes(self, nodes: Sequence[ModelNode]) -> None:
        """Number shared prefixes over the whole application, in place."""
        numbers: dict[str, int] = {}
        for draft, node in zip(self.nodes, nodes, strict=True):
            ids = node.requests.prefix_id
            for k, request in enumerate(draft.requests):
                values = request.line.values if request.line else None
                if values and values.prefix_id is not None and values.prefix_tokens:
                    ids[k] = numbers.setdefault(f"line {values.prefix_id}", len(numbers))
                elif draft.section.prefix_tokens:
                    ids[k] = numbers.setdefault(f"node {draft.section_name}", len(numbers))
