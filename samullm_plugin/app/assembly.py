"""From a checked ``app.yaml`` to an application and the texts of its requests."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from samullm_plugin.app import drafts
from samullm_plugin.app.drafts import Draft, NodeDraft
from samullm_plugin.app.fields import bad_rows_message
from samullm_plugin.app.graph import NodeGraph
from samullm_plugin.app.keptrows import has_field
from samullm_plugin.app.loaded import NodeSource
from samullm_plugin.app.modelspecs import model_specs
from samullm_plugin.app.nodespec import NodeSection, PythonSection
from samullm_plugin.app.promptcounts import constant_lead
from samullm_plugin.app.requestlines import PLAIN, TokenCounter
from samullm_plugin.app.requests import Line, read_requests
from samullm_plugin.app.schemas import Schema, SchemaResolver, schema_of_class
from samullm_plugin.app.spec import AppSpec
from samullm_plugin.app.tables import (
    Turns,
    node_schema,
    node_source,
    node_templates,
    node_turns,
    python_node,
    request_table,
)
from samullm_plugin.app.trying import Trials
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, ModelNode


class Assembly:
    """Puts the nodes of one file together.

    Args:
        spec: the checked file.
        path: where it is; other files are relative to it.
        count_tokens: counts tokens where a tokenizer is at hand; None: estimates.
        tables: tables in memory, by the name of the file that they stand for.
        limit: take no more rows than this of each table.
        resolve_schema: returns the JSON schema of a class; None: it is imported here.

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
        resolve_schema: SchemaResolver | None = None,
    ) -> None:
        """Expand nodes with several models, and find the order in which to fill them."""
        self.spec, self.path, self.count_tokens = spec, path, count_tokens
        self._tables, self._limit = tables or {}, limit
        self.notes: list[str] = []
        self._graph = NodeGraph(spec, path, model_specs(spec, path))
        self.nodes = self._graph.nodes
        if adapted := [n.name for n in self.nodes if _lora(n)]:
            self.notes.append(
                f"iterations of {', '.join(adapted)} take as long with adapters as without"
            )
        self._lines: dict[str, tuple[Line, ...]] = {}
        self._gates: dict[tuple[int, int], int] = {}
        self._passing = {i for i, n in enumerate(self.nodes) if n.section.otherwise == "pass"}
        self._kept = {
            i: n.section.keep.probability for i, n in enumerate(self.nodes) if n.section.keep
        }
        self._accepted = {
            i: n.section.accept_rate
            for i, n in enumerate(self.nodes)
            if isinstance(n.section, NodeSection) and n.section.accept_rate < 1
        }
        self._embedding = {
            i
            for i, n in enumerate(self.nodes)
            if isinstance(n.section, NodeSection) and n.section.task == "embed"
        }
        self._turns: dict[int, Turns] = {}
        self._schemas: dict[int, Schema] = {}
        resolve = resolve_schema or schema_of_class
        for i, node in enumerate(self.nodes):
            if isinstance(node.section, NodeSection):
                where = self._graph.where(node)
                self._turns[i] = node_turns(node.section, spec.messages, where)
                schema = node_schema(node.section, path.parent, resolve, where)
                if schema is not None:
                    self._schemas[i] = schema
        self._trials = Trials(self._graph, self._schemas)

    def build(self) -> tuple[Application, tuple[NodeSource, ...]]:
        """Return the application and the texts of its nodes.

        Raises:
            InputError: naming file and field, or every row that cannot be asked.
        """
        try:
            with _collector_paused():
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
                    found.setdefault(request.where(self._graph.where(node)), request.error)
        return found

    def _build(self) -> tuple[Application, tuple[NodeSource, ...]]:
        for index in self._graph.order(self._named):
            self._fill(index)
        sources = [
            node_source(self._graph, i, self._turns.get(i, ()), self._schemas.get(i))
            for i in range(len(self.nodes))
        ]
        nodes, python = [], []
        for index, draft in enumerate(self.nodes):
            self._trials.check_conditions(index)
            if draft.model is None:
                python.append(python_node(draft))
                continue
            assert isinstance(draft.section, NodeSection)
            where, stand_ins = self._graph.where(draft), self._trials.stand_ins(index)
            table, notes = request_table(draft, sources[index], stand_ins, where, self.count_tokens)
            self.notes += notes
            refused = {k: r.error for k, r in enumerate(draft.requests) if r.error is not None}
            sources[index] = replace(sources[index], refused=refused)
            asked = draft.section
            node = ModelNode(
                draft.name,
                draft.model,
                table,
                asked.task,
                retries=asked.retries,
                reject_rate=asked.reject_rate,
            )
            nodes.append(node)
        self._number_prefixes(nodes, sources)
        remarks = tuple(dict.fromkeys(self.notes))
        return Application(self.spec.name, tuple(nodes), remarks, tuple(python)), tuple(sources)

    def _read(self, node: NodeDraft) -> tuple[Line, ...]:
        table = node.section.table
        if table is None:
            return ()
        key = table.model_dump_json()
        if key not in self._lines:
            where = f"{self._graph.where(node)}.requests"
            self._lines[key] = read_requests(
                table,
                self.path.parent,
                where,
                self.notes,
                given=self._tables.get(table.name),
                limit=self._limit,
            )
        return self._lines[key]

    def _named(self, node: NodeDraft) -> set[str]:
        """Return the nodes whose outputs the lines of a node name."""
        special = (line.values for line in self._read(node) if line.values is not PLAIN)
        return {n.partition(":")[0] for values in special for n in values.inputs}

    def _fill(self, index: int) -> None:
        """Make the requests of a node whose upstream nodes have theirs."""
        node, section = self.nodes[index], self.nodes[index].section
        where = self._graph.where(node)
        requests = self._origin(index)
        if isinstance(section, NodeSection):
            requests = drafts.copied(requests, section.copies)
            samples = section.n if section.n > 1 else section.sampling_params.n or 1
            if not section.pools:
                requests = drafts.sampled(requests, samples)
        for name, edge in section.edges.items():
            field = f"{where}.inputs.{name}"
            upstream = [
                (i, self.nodes[i]) for i in self._graph.resolve(edge.sources, f"{field}.from")
            ]
            drafts.join(
                requests,
                upstream,
                edge,
                name,
                field,
                passing=self._passing,
                before=self._graph.before,
            )
        drafts.named_waits(requests, {n.name: (i, n) for i, n in enumerate(self.nodes)})
        if index in self._graph.routers:
            self._route(index, requests)
        drafts.gate_requests(requests, self._kept, self._accepted, self._gate)
        if isinstance(section, PythonSection):
            node.requests, node.num_calls = self._python_requests(index, section, requests)
            return
        if chain := section.chain_section:
            label = "previous" if chain.in_prompt else ""
            drafts.link_chain(requests, chain.by, label, index, f"{where}.chain")
        templates = node_templates(section, self._turns[index], where)
        if templates:
            used = frozenset().union(*templates.values())
            self._take_from_before(requests, used)
            for label in sorted(drafts.hide_unused(requests, used) - {"output"}):
                self.notes.append(
                    f"node {node.name}: the template does not use {label}: it is only waited for"
                )
        self._refuse_vectors(node, requests)
        node.requests = requests

    def _refuse_vectors(self, node: NodeDraft, requests: Sequence[Draft]) -> None:
        """Refuse prompts that embeddings would enter as text."""
        for wait in (w for r in requests for w in r.waits if w.label) if self._embedding else ():
            if wait.node in self._embedding:
                raise InputError(
                    f"{self._graph.where(node)}: its prompt takes the output of "
                    f"{self.nodes[wait.node].name}, which is a vector; work on vectors in a node "
                    "with `python`, or only wait for it with in_prompt: false"
                )

    def _python_requests(
        self, index: int, section: PythonSection, rows: list[Draft]
    ) -> tuple[list[Draft], int]:
        """Return the requests of a Python node, and how many of them are calls."""
        node = self.nodes[index]
        if section.scope == "all":
            return drafts.all_at_once(rows, index, node.name, section.rate), 1
        if section.max is None:
            for row in rows if section.rate < 1 else ():
                row.probability *= section.rate
            return rows, len(rows)
        made = drafts.lists(rows, index, section.max, section.rate * section.max)
        for k in range(len(rows)):
            gate = self._gate(index, k)
            first = len(rows) + k * section.max
            for row in made[first : first + section.max]:
                row.gate = gate
        return made, len(rows)

    def _take_from_before(self, requests: Sequence[Draft], used: AbstractSet[str]) -> None:
        """Give requests the outputs of nodes before that their templates name."""
        names = {n.name for n in self.nodes} | {n.section_name for n in self.nodes}
        wanted = {u.removeprefix("inputs.") for u in used} & names
        own = [{n.name, n.section_name} & wanted for n in self.nodes]
        for request in requests if wanted else ():
            missing = wanted - {w.label for w in request.waits}
            at = request.parent
            while at is not None and missing:
                for name in own[at[0]] & missing:
                    missing.remove(name)
                    if not has_field(request.row, name):
                        request.waits += (drafts.Wait(name, *at),)
                at = self.nodes[at[0]].requests[at[1]].parent

    def _origin(self, index: int) -> list[Draft]:
        """Return a node's requests before copies and inputs."""
        node, section = self.nodes[index], self.nodes[index].section
        where = self._graph.where(node)
        if section.requests:
            return drafts.pick(self._read(node), section, where)
        if section.for_each:
            upstream = self._graph.resolve([section.for_each], where)
            several = len(upstream) > 1
            return [
                draft
                for i in upstream
                for draft in drafts.one_for_each(
                    i, self.nodes[i], "output", f"{self.nodes[i].name}:" if several else ""
                )
            ]
        if index in self._graph.routers:
            router = self._graph.routers[index][0]
            return [
                Draft(r.id, r.item, r.row, None, parent=(router, k))
                for k, r in self.nodes[router].rows
            ]
        name, edge = next(iter(section.edges.items()))
        field = f"{where}.inputs.{name}"
        upstream = self._graph.resolve(edge.sources, field)
        return drafts.one_for_each_value([self.nodes[i] for i in upstream], edge.by, field)

    def _route(self, index: int, requests: Sequence[Draft]) -> None:
        """Make the requests of a branch alternatives to those of the router's other branches."""
        router, position = self._graph.routers[index]
        share = list(self.nodes[router].section.shares.values())[position]
        by_id = {r.id: k for k, r in self.nodes[router].rows}
        where = f"{self._graph.where(self.nodes[index])}: it is a branch of a router"
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
            request.waits = (drafts.Wait("", router, by_id[base]), *request.waits)
            request.probability *= share
            request.choice = self._gate(router, by_id[base])

    def _gate(self, node: int, request: int) -> int:
        """Return a number for what a router or filter decides about one request."""
        return self._gates.setdefault((node, request), len(self._gates))

    def _number_prefixes(self, nodes: Sequence[ModelNode], sources: Sequence[NodeSource]) -> None:
        """Number shared prefixes over the whole application, in place."""
        numbers: dict[str, int] = {}
        for draft, node, source in zip(self.nodes, nodes, sources, strict=False):
            assert isinstance(draft.section, NodeSection)
            ids, lead = node.requests.prefix_id, constant_lead(source)
            with_ = f"{source.lora} " if source.lora else ""  # adapters share no cache
            all_alike = lead or draft.section.prefix_tokens
            for k, request in enumerate(draft.requests):
                values = request.line.values if request.line else PLAIN
                if values is PLAIN and not all_alike:
                    continue
                if values.prefix_id is not None and values.prefix_tokens:
                    ids[k] = numbers.setdefault(f"{with_}line {values.prefix_id}", len(numbers))
                elif lead:
                    ids[k] = numbers.setdefault(f"{with_}turns {lead}", len(numbers))
                elif draft.section.prefix_tokens:
                    ids[k] = numbers.setdefault(f"node {draft.section_name}", len(numbers))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Have no garbage collected: of many rows there is none, and it is looked for ever again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lora(node: NodeDraft) -> bool:
    return isinstance(node.section, NodeSection) and node.section.lora is not None
