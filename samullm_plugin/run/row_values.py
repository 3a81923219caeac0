"""What is known of rows: outputs, and the mappings that functions and expressions are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from samullm_plugin.app.loaded import LoadedApplication, NodeSource
from samullm_plugin.app.templates import Output
from samullm_plugin.errors import InputError, Reject
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.results import RequestId, Result


def mean_logprob(result: Result) -> float | None:
    """Return the mean log probability of the generated tokens; None if it was not asked for."""
    if not result.logprobs or result.token_ids is None:
        return None
    found = []
    for token, position in zip(result.token_ids, result.logprobs, strict=False):
        entry = next((e for e in position if e.token_id == token), None)
        if entry is not None:
            found.append(entry.logprob)
    return sum(found) / len(found) if found else None


_OWN = ("id", "item", "node")

KNOWN: Mapping[str, Callable[[Result], Any]] = {
    "finish_reason": lambda result: result.finish_reason,
    "num_tokens": lambda result: result.num_tokens,
    "logprob": mean_logprob,
}
"""What rows have of a generated output beside its text and value; None: it is not known."""


def known_of(result: Result) -> dict[str, Any]:
    """Return what is known of a generated output beside its text and value."""
    found = {name: read(result) for name, read in KNOWN.items()}
    return {name: value for name, value in found.items() if value is not None}


class RowValues:
    """Rows of a run; requests are named as the user wrote them.

    Args:
        loaded: the application with its texts.
        planned: from a request as it was written to the same as it is planned.
    """

    def __init__(
        self, loaded: LoadedApplication, planned: Callable[[RequestId], RequestId]
    ) -> None:
        if loaded.sources is None:
            raise InputError(f"application {loaded.app.name} has no texts")
        self._loaded, self._planned = loaded, planned
        self._sources: tuple[NodeSource, ...] = loaded.sources
        self._names = [n.name for n in loaded.app.all_nodes]

    def result(self, request: RequestId, ledger: Ledger) -> Result | None:
        """Return what came of a request; None if it has not finished."""
        i, q = self._planned(request)
        return ledger.results[i, q] if ledger.status[i][q] == Status.FINISHED else None

    def output(
        self, request: RequestId, ledger: Ledger, result: Result | None = None
    ) -> Output | None:
        """Return the output of a request; None if it has not finished.

        Args:
            request: as it is written.
            ledger: the results.
            result: of the request, if it is not there yet.
        """
        result = result or self.result(request, ledger)
        if result is None:
            return None
        node, r = request
        source = self._sources[node]
        fields, value = source.fields[r], result.value
        if value is None and source.schema is not None and result.text is not None:
            try:
                value = source.schema.parse(result.text)
            except Reject:
                value = None
        known = {
            "copy": fields.get("copy"),
            "index": fields.get("index"),
            "node": self._names[node],
            **known_of(result),
        }
        return Output.of(result.text if source.call is None else None, value, **known)

    def row(
        self, request: RequestId, ledger: Ledger, result: Result | None = None
    ) -> dict[str, Any]:
        """Return a row with the output of its request and of those before, if they are there.

        Fields of the line by their names; by the name of each node before what it gave: a text,
        or the value it was parsed to; fields of the last value by their names as well; ``output``
        is the last text; :func:`known_of` the last model's output. Arguments as of :meth:`output`.
        """
        node = request[0]
        source = self._sources[node]
        row = self.without_output(request, ledger)
        output = self.output(request, ledger, result)
        if output is None:
            return row
        value = str(output) if output.value is None else output.value
        if isinstance(value, Mapping):
            row.update({k: v for k, v in value.items() if k not in _OWN})
        row[source.name] = row[self._names[node]] = value
        row["output"], row["node"] = str(output), self._names[node]
        if source.call is None:
            mine = output.fields.keys() & KNOWN.keys() - source.fields[request[1]].keys()
            row.update({name: output.fields[name] for name in mine})
        return row

    def without_output(self, request: RequestId, ledger: Ledger) -> dict[str, Any]:
        """Return a row as it is before its request is answered."""
        node, r = request
        source = self._sources[node]
        above = source.parent(r)
        row = {} if above is None else self.row(above, ledger)
        row.update(source.fields[r])
        row["id"], row["item"] = source.ids[r], source.items[r]
        return row

    def given(
        self, request: RequestId, ledger: Ledger, output_of: Callable[[int, int], Output | None]
    ) -> dict[str, Any]:
        """Return the row that a function is given: each of its inputs is a list of rows."""
        node, r = request
        source, table = self._sources[node], self._loaded.app.all_nodes[node].requests
        row = self.without_output(request, ledger)
        spare: dict[str, list[dict[str, Any]]] = {}
        lists: dict[str, list[dict[str, Any]]] = {
            n: [] for n in source.inputs if n not in ("output", "call")
        }
        for entry in table.entries(r):
            label = source.labels[entry]
            at = int(table.input_node[entry]), int(table.input_request[entry])
            if label in lists and output_of(*at) is not None:
                place = spare if entry in source.fallback else lists
                place.setdefault(label, []).append(self.row(at, ledger))
        return {**row, **{n: found or spare.get(n, []) for n, found in lists.items()}}

    def context(
        self, request: RequestId, ledger: Ledger, result: Result | None = None
    ) -> dict[str, Any]:
        """Return what expressions over a finished request find by name; arguments as before."""
        row, output = self.row(request, ledger, result), self.output(request, ledger, result)
        if output is None:
            return row
        known = {k: v for k, v in output.fields.items() if k not in ("text", "value")}
        return {**known, **row}
