"""From a checked ``app.yaml`` to an application and the texts of its requests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from samullm_plugin.app import drafts
from samullm_plugin.app.badrows import bad_rows_message
from samullm_plugin.app.drafts import Draft, NodeDraft
from samullm_plugin.app.expressions import parsed
from samullm_plugin.app.functions import function_of
from samullm_plugin.app.loaded import Branch, NodeSource, PythonCall
from samullm_plugin.app.modelspecs import model_specs
from samullm_plugin.app.requests import PLAIN, Line, TokenCounter, read_requests
from samullm_plugin.app.schemas import Schema, SchemaResolver, json_schema, schema_of_class
from samullm_plugin.app.spec import (
    AppSpec,
    ChoiceSection,
    MessageSection,
    NodeSection,
    PythonSection,
    RegexSection,
)
from samullm_plugin.app.tables import StandIn, constant_lead, python_node, request_table
from samullm_plugin.app.templates import Output, referenced, unknown_output
from samullm_plugin.errors import InputError, Reject, suggest
from samullm_plugin.model.application import Application, ModelNode

SAMPLE = "1. A first line.\n2. A second line.\n3. A third line."
"""What templates are tried with in place of an output of which nothing is known."""


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
        models = model_specs(spec, path)
        self.nodes: list[NodeDraft] = []
        self.members: dict[str, list[int]] = {}
        for name, section in spec.nodes.items():
            if isinstance(section, PythonSection):
                continue
            if section.pools or section.lora is not None:
                field = "lora" if section.lora is not None else "task"
                raise InputError(
                    f"{path}: nodes.{name}.{field}: pooling tasks and adapters are part of the "
                    "format but cannot be planned or run yet; leave it out"
                )
            for model in section.models:
                if model not in models:
                    hint = suggest(model, models) or f"; models: {', '.join(models) or 'none'}"
                    raise InputError(f"{path}: nodes.{name}.model: no model {model!r}{hint}")
                full = name if isinstance(section.model, str) else f"{name}.{model}"
                self.members.setdefault(name, []).append(len(self.nodes))
                self.nodes.append(NodeDraft(full, name, section, models[model]))
        self._num_models = len(self.nodes)
        for name, section in spec.nodes.items():
            if isinstance(section, PythonSection):
                self.members[name] = [len(self.nodes)]
                self.nodes.append(NodeDraft(name, name, section, None))
        names = [n.name for n in self.nodes]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise InputError(f"{path}: nodes: two nodes are named {twice!r}; rename one")
        self._lines: dict[str, tuple[Line, ...]] = {}
        self._gates: dict[tuple[int, int], int] = {}
        self._routers = self._find_routers()
        self._passing = {i for i, n in enumerate(self.nodes) if n.section.otherwise == "pass"}
        self._before: list[set[int]] = [set() for _ in self.nodes]
        self._resolve_schema = resolve_schema or schema_of_class
        self._schemas: dict[int, Schema] = {}
        for i, node in enumerate(self.nodes):
            if isinstance(node.section, NodeSection):
                schema = self._schema(node.section, self._where(node))
                if schema is not None:
                    self._schemas[i] = schema

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
        sources = [self._source(i) for i in range(len(self.nodes))]
        nodes, python = [], []
        for index, draft in enumerate(self.nodes):
            self._check_conditions(index)
            if draft.model is None:
                python.append(python_node(draft))
                continue
            assert isinstance(draft.section, NodeSection)
            where, stand_ins = self._where(draft), self._stand_ins(index)
            table, notes = request_table(draft, sources[index], stand_ins, where, self.count_tokens)
            self.notes += notes
            refused = {k: r.error for k, r in enumerate(draft.requests) if r.error is not None}
            sources[index] = replace(sources[index], refused=refused)
            nodes.append(ModelNode(draft.name, draft.model, table, draft.section.task))
        self._number_prefixes(nodes, sources)
        remarks = tuple(dict.fromkeys(self.notes))
        return Application(self.spec.name, tuple(nodes), remarks, tuple(python)), tuple(sources)

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
        for index in order:
            self._before[index] = graph[index].union(*(self._before[u] for u in graph[index]))
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
        if isinstance(section, NodeSection):
            requests = drafts.copied(requests, section.copies)
            samples = section.n if section.n > 1 else section.sampling_params.n or 1
            requests = drafts.sampled(requests, samples)
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
        drafts.mark_fallbacks(requests, self._passing, self._before)  # these are no gates
        drafts.gate_requests(requests, filters, self._gate)
        if isinstance(section, PythonSection):
            node.requests, node.num_calls = self._python_requests(index, section, requests)
            return
        if chain := section.chain_section:
            label = "previous" if chain.in_prompt else ""
            drafts.link_chain(requests, chain.by, label, index, f"{where}.chain")
        templates = self._templates(section, where)
        if templates:
            used = frozenset().union(*templates.values())
            self._take_from_before(index, requests, used)
            for label in sorted(drafts.hide_unused(requests, used) - {"output"}):
                self.notes.append(
                    f"node {node.name}: the template does not use {label}: it is only waited for"
                )
        node.requests = requests
        drafts.mark_fallbacks(requests, self._passing, self._before)

    def _templates(self, section: NodeSection, where: str) -> dict[str, frozenset[str]]:
        """Return the names that each template of a node uses, by the template."""
        written = [] if section.prompt is None else [("prompt", section.prompt)]
        turns = self._turns(section, where)
        written += [(f"messages.{role}", text) for role, text in turns if role != "history"]
        written += [] if section.pair is None else [("pair", section.pair)]
        if turns and not written:
            return {"": frozenset()}
        found = {}
        for name, template in written:
            try:
                found[template] = referenced(template)
            except InputError as error:
                raise InputError(f"{where}.{name}: {error}") from error
        return found

    def _turns(self, section: NodeSection, where: str) -> tuple[tuple[str, str], ...]:
        """Return role and template of every turn of a node, with those declared elsewhere."""

        def expanded(messages: Sequence[MessageSection], above: tuple[str, ...]) -> Iterator[
            tuple[str, str]
        ]:  # fmt: skip
            for message in messages:
                if message.turn is not None:
                    yield message.turn
                elif message.history is not None:
                    yield "history", message.history
                elif (name := message.include or "") in above:
                    raise InputError(f"{where}.messages: {name!r} includes itself")
                elif name not in self.spec.messages:
                    known = self.spec.messages
                    hint = suggest(name, known) or f"; messages: {', '.join(known) or 'none'}"
                    raise InputError(f"{where}.messages: no messages are named {name!r}{hint}")
                else:
                    yield from expanded(self.spec.messages[name], (*above, name))

        return tuple(expanded(section.messages, ()))

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

    def _take_from_before(
        self, index: int, requests: Sequence[Draft], used: AbstractSet[str]
    ) -> None:
        """Give requests the outputs of nodes before that their templates name."""
        names = {n.name for n in self.nodes} | {n.section_name for n in self.nodes}
        wanted = {u.removeprefix("inputs.") for u in used} & names
        for request in requests if wanted else ():
            have = {w.label for w in request.waits}
            at = request.parent
            while at is not None:
                before = self.nodes[at[0]]
                for name in {before.name, before.section_name} & wanted - have:
                    if name not in request.fields:
                        request.waits.append(drafts.Wait(name, *at))
                        have.add(name)
                at = before.requests[at[1]].parent

    def _stand_ins(self, index: int) -> dict[str, StandIn]:
        """Return what the templates of a node are tried with, by the names of its inputs."""
        found: dict[str, StandIn] = {}
        for request in self.nodes[index].requests[:1]:
            for wait in request.waits:
                if wait.label:
                    found.setdefault(wait.label, self._stand_in(wait.node))
        return found

    def _stand_in(self, index: int) -> StandIn:
        node = self.nodes[index]
        section, schema = node.section, self._schemas.get(index)
        known: dict[str, Any] = {"copy": 1, "index": 1, "node": node.name}
        if section.sample is not None:
            text = section.sample if isinstance(section.sample, str) else None
            value: Any = None if text is not None else section.sample
            if text is not None and schema is not None:
                try:
                    value = schema.parse(text)
                except Reject as error:
                    raise InputError(
                        f"{self._where(node)}.sample: it does not follow output_schema: {error}"
                    ) from error
            sample = Output.of(text, value, **known)
            return StandIn(node.name, Output.of("", value, **known), sample, known=True)
        if schema is not None:
            value = schema.example()
            text = value if isinstance(value, str) else None
            blank = Output.of("", value, **known)
            return StandIn(node.name, blank, Output.of(text, value, **known), known=True)
        if isinstance(section, PythonSection) or section.pools or section.check is not None:
            return StandIn(node.name, unknown_output(), unknown_output())
        return StandIn(node.name, Output.of("", **known), Output.of(SAMPLE, **known))

    def _check_conditions(self, index: int) -> None:
        """Refuse expressions that use a field which rows of a node do not have."""
        node = self.nodes[index]
        section, where = node.section, self._where(node)
        written = [("keep.expr", section.keep.expr)] if section.keep else []
        written += [(f"route.{n}.expr", b.expr) for n, b in section.route.items()]
        for field, text in written:
            if text is None:
                continue
            known = self._known_fields(index)
            if known is None:
                continue
            for name in sorted(parsed(text).names - known):
                hint = suggest(name, known) or f"; there are {', '.join(sorted(known))}"
                raise InputError(f"{where}.{field}: there is no field {name!r}{hint}")

    def _known_fields(self, index: int) -> set[str] | None:
        """Return the names that an expression of a node may use; None: nobody can tell."""
        node, known = self.nodes[index], {"output", "id", "item", "finish_reason", "num_tokens"}
        section, schema = node.section, self._schemas.get(index)
        if isinstance(section.sample, Mapping):
            known |= set(section.sample)
        elif isinstance(section, PythonSection) or section.check is not None or section.pools:
            return None
        elif schema is not None:
            if schema.properties is None:
                return None
            known |= schema.properties
        if isinstance(section, NodeSection):
            known |= {"logprob"}
        for request in node.requests[-1:]:
            known |= set(request.fields) | {w.label for w in request.waits if w.label}
            at: tuple[int, int] | None = (index, len(node.requests) - 1)
            while at is not None:
                before = self.nodes[at[0]]
                known |= {before.name, before.section_name}
                at = before.requests[at[1]].parent
        return known

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
            return [
                Draft(r.id, r.item, r.fields, None, parent=(router, k))
                for k, r in self.nodes[router].rows
            ]
        name, edge = next(iter(section.edges.items()))
        field = f"{where}.inputs.{name}"
        upstream = self._resolve(edge.sources, field)
        return drafts.one_for_each_value([self.nodes[i] for i in upstream], edge.by, field)

    def _route(self, index: int, requests: Sequence[Draft]) -> None:
        """Make the requests of a branch alternatives to those of the router's other branches."""
        router, position = self._routers[index]
        share = list(self.nodes[router].section.shares.values())[position]
        by_id = {r.id: k for k, r in self.nodes[router].rows}
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
        where = self._where(node)
        branches = tuple(
            Branch(
                self._resolve([name], f"{where}.route")[0],
                drafts.condition(branch.when, branch.expr),
            )
            for name, branch in section.route.items()
        )
        labels = tuple(w.label for r in node.requests for w in r.waits)
        fallback = [w.fallback for r in node.requests for w in r.waits]
        inputs = dict.fromkeys((*section.edges, *labels))
        common = NodeSource(
            ids=tuple(r.id for r in node.requests),
            items=tuple(r.item for r in node.requests),
            fields=tuple(r.fields for r in node.requests),
            labels=labels,
            inputs=tuple(n for n in inputs if n and n != "previous"),
            name=node.section_name,
            parents=tuple(r.parent for r in node.requests),
            fallback=frozenset(k for k, is_fallback in enumerate(fallback) if is_fallback),
            branches=branches,
            keep=drafts.condition(section.keep.when, section.keep.expr) if section.keep else None,
            passes=section.otherwise == "pass",
            own_prompt=section.requests is not None,
        )
        if isinstance(section, PythonSection):
            function = function_of(
                section.python, self.path.parent, section.options, f"{where}.python"
            )
            call = PythonCall(
                function, section.scope, section.max, section.batch_size, section.timeout_s,
                section.workers, node.num_calls,
            )  # fmt: skip
            return replace(common, call=call)
        return self._with_texts(index, section, common)

    def _with_texts(self, index: int, section: NodeSection, common: NodeSource) -> NodeSource:
        """Return the texts of a model's node."""
        node, where = self.nodes[index], self._where(self.nodes[index])
        lines = {k: r.line.values for k, r in enumerate(node.requests) if r.line}
        sampling = section.sampling_params.given()
        sampling.pop("n", None)
        own: dict[int, Mapping[str, object]] = {}
        for k, request in enumerate(node.requests):
            values = request.line.values if request.line else PLAIN
            given = values.sampling
            if values.max_tokens is not None:
                given = {**given, "max_tokens": values.max_tokens}
            if request.sample and (seed := given.get("seed", sampling.get("seed"))) is not None:
                given = {**given, "seed": int(str(seed)) + request.sample}  # as vLLM's n does
            if given:
                own[k] = given
        schema = self._schemas.get(index)
        if schema is not None:
            sampling["structured_outputs"] = schema.structured_outputs
        conditions = [section.keep.expr] if section.keep else []
        conditions += [b.expr for b in section.route.values()]
        if any(c is not None and "logprob" in parsed(c).names for c in conditions):
            sampling.setdefault("logprobs", 0)
        options = {
            "chat_template": section.chat_template,
            "chat_template_kwargs": dict(section.chat_template_kwargs) or None,
        }
        check = None
        if section.check is not None:
            check = function_of(section.check, self.path.parent, {}, f"{where}.check")
        return replace(
            common,
            template=section.prompt,
            turns=self._turns(section, where),
            chat=section.chat or bool(section.messages),
            chat_options={k: v for k, v in options.items() if v is not None},
            sampling=sampling,
            request_sampling=own,
            prompt_token_ids={
                k: v.prompt_token_ids for k, v in lines.items() if v.prompt_token_ids
            },
            request_chat={k: v.chat for k, v in lines.items() if v.chat},
            samples={k: r.sample for k, r in enumerate(node.requests) if r.sample},
            schema=schema,
            check=check,
            retries=section.retries,
            retry_temperature=section.retry_temperature,
            lora=section.lora,
            pair=section.pair,
            task=section.task,
        )

    def _schema(self, section: NodeSection, where: str) -> Schema | None:
        """Return what the outputs of a node must be."""
        given, where = section.output_schema, f"{where}.output_schema"
        if given is None:
            return None
        if isinstance(given, RegexSection):
            return Schema("regex", given.regex)
        if isinstance(given, ChoiceSection):
            return Schema("choice", json.dumps(given.choice))
        if isinstance(given, Mapping):
            return json_schema(given, where)
        if isinstance(given, str):
            function = function_of(given, self.path.parent, {}, where)
            return json_schema(self._resolve_schema(function, where), where)
        return json_schema(given.model_json_schema(), where)

    def _number_prefixes(self, nodes: Sequence[ModelNode], sources: Sequence[NodeSource]) -> None:
        """Number shared prefixes over the whole application, in place."""
        numbers: dict[str, int] = {}
        for draft, node, source in zip(self.nodes, nodes, sources, strict=False):
            assert isinstance(draft.section, NodeSection)
            ids, lead = node.requests.prefix_id, constant_lead(source)
            for k, request in enumerate(draft.requests):
                values = request.line.values if request.line else None
                if values and values.prefix_id is not None and values.prefix_tokens:
                    ids[k] = numbers.setdefault(f"line {values.prefix_id}", len(numbers))
                elif lead:
                    ids[k] = numbers.setdefault(f"turns {lead}", len(numbers))
                elif draft.section.prefix_tokens:
                    ids[k] = numbers.setdefault(f"node {draft.section_name}", len(numbers))
