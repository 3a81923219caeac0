"""What templates and expressions are tried with before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from samullm_plugin.app.expressions import parsed
from samullm_plugin.app.functions import chosen_by
from samullm_plugin.app.graph import NodeGraph
from samullm_plugin.app.nodespec import NodeSection, PythonSection
from samullm_plugin.app.pooling import pooled_example
from samullm_plugin.app.schemas import Schema
from samullm_plugin.app.templates import Output, unknown_output
from samullm_plugin.errors import InputError, Reject, suggest

SAMPLE = "1. A first line.\n2. A second line.\n3. A third line."
"""What templates are tried with in place of an output of which nothing is known."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """What templates are tried with in place of an output.

    Attributes:
        node: whose output it is.
        blank: as short as it may be; its tokens are not counted.
        sample: one that looks like an output.
        known: outputs are like the sample, because the user says so.
    """

    node: str
    blank: Output
    sample: Output
    known: bool = False


class Trials:
    """Outputs as nodes may give them.

    Args:
        graph: the nodes; their requests are there when they are asked for.
        schemas: what outputs must be, by node.
    """

    def __init__(self, graph: NodeGraph, schemas: Mapping[int, Schema]) -> None:
        self._graph, self._schemas = graph, schemas

    def stand_ins(self, index: int) -> dict[str, StandIn]:
        """Return what the templates of a node are tried with, by the names of its inputs."""
        found: dict[str, StandIn] = {}
        for request in self._graph.nodes[index].requests[:1]:
            for wait in request.waits:
                if wait.label:
                    found.setdefault(wait.label, self._stand_in(wait.node))
        return found

    def _stand_in(self, index: int) -> StandIn:
        node = self._graph.nodes[index]
        section, schema = node.section, self._schemas.get(index)
        known: dict[str, Any] = {"copy": 1, "index": 1, "node": node.name, "num_tokens": 1}
        if isinstance(section, NodeSection):
            known["finish_reason"] = "stop"
            if section.asks_logprobs:
                known["logprob"] = -0.5
        if section.sample is not None:
            text = section.sample if isinstance(section.sample, str) else None
            value: Any = None if text is not None else section.sample
            if text is not None and schema is not None:
                try:
                    value = schema.parse(text)
                except Reject as error:
                    where = f"{self._graph.where(node)}.sample"
                    raise InputError(f"{where}: it does not follow output_schema: {error}") from (
                        error
                    )
            sample = Output.of(text, value, **known)
            return StandIn(node.name, Output.of("", value, **known), sample, known=True)
        if schema is not None:
            value = schema.example()
            text = value if isinstance(value, str) else None
            blank = Output.of("", value, **known)
            return StandIn(node.name, blank, Output.of(text, value, **known), known=True)
        if isinstance(section, NodeSection) and section.pools:
            value = pooled_example(section.task, node.model)
            blank = Output.of("", value, **known)
            return StandIn(node.name, blank, Output.of(None, value, **known), known=True)
        if isinstance(section, PythonSection) or section.check is not None:
            return StandIn(node.name, unknown_output(), unknown_output())
        return StandIn(node.name, Output.of("", **known), Output.of(SAMPLE, **known))

    def check_conditions(self, index: int) -> None:
        """Refuse expressions that use a field which rows of a node do not have."""
        node = self._graph.nodes[index]
        section, where = node.section, self._graph.where(node)
        written = [("keep.expr", section.keep.expr)] if section.keep else []
        written += [(f"route.{n}.expr", b.expr) for n, b in section.route.items()]
        for field, text in written:
            if text is None:
                continue
            self._check_names(text, index, f"{where}.{field}")
        by = chosen_by(section.python) if isinstance(section, PythonSection) else None
        if by is not None and len(section.edges) > 1:
            raise InputError(
                f"{where}.python: it chooses among the rows of one input, and there are "
                f"{len(section.edges)}; name the nodes in one input: `{{from: [...]}}`"
            )
        for edge in section.edges.values() if by is not None else ():
            for source in self._graph.resolve(edge.sources, f"{where}.inputs"):
                self._check_names(by or "", source, f"{where}.python")

    def _check_names(self, expression: str, index: int, where: str) -> None:
        """Refuse an expression over rows of a node that uses a field they do not have."""
        known = self._known_fields(index)
        for name in sorted(parsed(expression).names - known) if known is not None else ():
            hint = suggest(name, known or ()) or f"; there are {', '.join(sorted(known or ()))}"
            asked = "; ask for it with sampling_params.logprobs" if name == "logprob" else hint
            raise InputError(f"{where}: there is no field {name!r}{asked}")

    def _known_fields(self, index: int) -> set[str] | None:
        """Return the names that an expression of a node may use; None: nobody can tell."""
        node, known = (
            self._graph.nodes[index],
            {"output", "id", "item", "node", "finish_reason", "num_tokens"},
        )
        section, schema = node.section, self._schemas.get(index)
        if isinstance(section.sample, Mapping):
            known |= set(section.sample)
        elif isinstance(section, PythonSection) or section.check is not None:
            return None
        elif section.pools:
            known |= set(pooled_example(section.task, node.model))
        elif schema is not None:
            if schema.properties is None:
                return None
            known |= schema.properties
        if isinstance(section, NodeSection) and section.asks_logprobs:
            known |= {"logprob"}
        for request in node.requests[-1:]:
            known |= set(request.fields) | {w.label for w in request.waits if w.label}
            at: tuple[int, int] | None = (index, len(node.requests) - 1)
            while at is not None:
                before = self._graph.nodes[at[0]]
                known |= {before.name, before.section_name}
                at = before.requests[at[1]].parent
        return known
