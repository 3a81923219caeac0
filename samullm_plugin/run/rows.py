"""Which requests of a run belong to one row of its joined table, and what the journal says of them.

``rows/items.parquet`` (one row per item: its id and the fields of its input) and
``rows/requests.parquet`` (one row per request: its item, its id, what it waited for) are written
when a run begins, so that its directory is all that an export needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from samullm_plugin.app.loaded import LoadedApplication, NodeSource
from samullm_plugin.app.schemas import Schema
from samullm_plugin.errors import InputError, Reject
from samullm_plugin.files import arrow_input, arrow_output, parse_json, reread_json
from samullm_plugin.model.application import Application, PythonNode
from samullm_plugin.model.types import Ints
from samullm_plugin.run.journal import disk_error
from samullm_plugin.run.log import SETTLED

FOLDER = "rows"
FIELDS = "fields"
"""Where ``items.parquet`` keeps the names of all fields, a list in JSON."""
SCHEMA = "schema"
"""Where ``requests-*.parquet`` keep kind and text of the schema of a node's outputs, in JSON."""
CHECKED = "checked"
"""And whether a function may have put other values in place of them."""
CHUNK_ROWS = 8192
"""Rows of a row group at most."""
CHUNK_BYTES = 32 << 20
"""And about the bytes of its texts."""

_OF_CHUNKS = ("chunk", "num_chunks", "prompt", "prompt_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class NodeRows:
    """The requests of one node of the user's.

    Attributes:
        name: of the node.
        item: index of each request's item, shape ``(n,)``.
        ids: of the requests, as an Arrow array.
        input_node: node of each output that a request waits for, concatenated.
        input_request: that output's request.
        input_indptr: where each request's part of these begins, shape ``(n + 1,)``.
        calls: so many of the first requests are calls whose values are kept by the others.
        schema: what its outputs are, if they must be something.
        checked: a function may have put other values in place of them.
    """

    name: str
    item: Ints
    ids: Any
    input_node: Ints
    input_request: Ints
    input_indptr: Ints
    calls: int = 0
    schema: Schema | None = None
    checked: bool = False

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.item)

    @property
    def fields(self) -> frozenset[str] | None:
        """Return the fields that outputs have; None: nobody knows."""
        return None if self.schema is None or self.checked else self.schema.properties

    def made(self, record: Mapping[str, Any]) -> Any:
        """Return what a request gave, as its record in the journal says: a value, or a text.

        The value of an output that follows a schema is not in the journal beside its text.
        """
        made = record.get("value", record.get("text"))
        if self.schema is None or not isinstance(made, str) or "value" in record:
            return made
        try:
            return self.schema.value(made)
        except Reject:  # of a request that failed
            return made


def write_layout(folder: Path, loaded: LoadedApplication) -> None:
    """Write which requests and inputs belong to which item.

    Args:
        folder: of the run.
        loaded: the application; nothing is written if it has no texts.

    Raises:
        RunError: if the disk is full or fails.
    """
    if loaded.sources is None:
        return
    try:
        _write_layout(folder / FOLDER, loaded.app, loaded.sources)
    except OSError as error:
        raise disk_error(folder / FOLDER, error) from error


def _write_layout(place: Path, app: Application, sources: Sequence[NodeSource]) -> None:
    """Write the files of a layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.mkdir(exist_ok=True)
    numbers: dict[tuple[str, str], int] = {}
    origin: list[tuple[int, int]] = []
    items: list[Ints] = []
    for index, (node, source) in enumerate(zip(app.all_nodes, sources, strict=True)):
        part = node.name.rpartition("/")[0]  # equal ids of applications run together are others
        mine = np.empty(len(source.items), np.int64)
        for k, item in enumerate(source.items):
            mine[k] = number = numbers.setdefault((part, item), len(numbers))
            if number == len(origin):
                origin.append((index, k))
            elif source.ids[k] == item and not _is_item(sources, *origin[number]):
                origin[number] = index, k  # the item's own row, not one made of it
        items.append(mine)
    names = [item for _, item in numbers]
    kind = pa.schema({"id": pa.string(), "fields": pa.string()})
    with (
        arrow_output(place / "items.parquet") as file,
        pq.ParquetWriter(file, kind, compression="zstd") as writer,
    ):
        known: dict[str, None] = {}
        texts, size, last = list[str](), 0, len(origin) - 1
        for k in range(len(origin)):
            fields = _item_fields(sources, *origin[k], names[k])
            if not fields.keys() <= known.keys():
                known |= dict.fromkeys(fields)
            texts.append(to_json(fields, inf_nan_mode="null", fallback=str).decode())
            size += len(texts[-1])
            if len(texts) == CHUNK_ROWS or size > CHUNK_BYTES or k == last:
                ids = names[k + 1 - len(texts) : k + 1]
                writer.write_table(pa.table({"id": ids, "fields": texts}, schema=kind))
                texts, size = [], 0
        writer.add_key_value_metadata({FIELDS: to_json(list(known)).decode()})
    columns = {
        "item": pa.int64(),
        "id": pa.string(),
        "input_node": pa.list_(pa.int32()),
        "input_request": pa.list_(pa.int64()),
    }
    kind = pa.schema(columns)
    for index, (node, source) in enumerate(zip(app.all_nodes, sources, strict=True)):
        calls = node.hidden_calls if isinstance(node, PythonNode) else 0
        about = {"node": node.name, "calls": str(calls), CHECKED: str(int(bool(source.check)))}
        if source.schema is not None:
            about[SCHEMA] = to_json([source.schema.kind, source.schema.text]).decode()
        described = kind.with_metadata(about)
        path = place / f"requests-{index:04d}.parquet"
        table = node.requests
        with (
            arrow_output(path) as file,
            pq.ParquetWriter(file, described, compression="zstd") as writer,
        ):
            for first in range(0, len(table), CHUNK_ROWS):
                last = min(first + CHUNK_ROWS, len(table))
                edges = slice(table.input_indptr[first], table.input_indptr[last])
                starts = pa.array(table.input_indptr[first : last + 1] - edges.start, pa.int32())
                cells = {
                    "item": items[index][first:last],
                    "id": list(source.ids[first:last]),
                    "input_node": _lists(starts, table.input_node[edges], pa.int32()),
                    "input_request": _lists(starts, table.input_request[edges], pa.int64()),
                }
                writer.write_table(pa.table(cells, schema=described))


def _lists(starts: Any, values: Ints, kind: Any) -> Any:
    import pyarrow as pa

    return pa.ListArray.from_arrays(starts, pa.array(values, kind))


def _is_item(sources: Sequence[NodeSource], node: int, request: int) -> bool:
    """Return whether a request is the item itself and not a chunk or an element of a list."""
    return sources[node].ids[request] == sources[node].items[request]


def _item_fields(
    sources: Sequence[NodeSource], node: int, request: int, item: str
) -> dict[str, Any]:
    """Return the fields of an item's input; those of a chunk are not the item's."""
    source = sources[node]
    fields = dict(source.fields[request])
    if source.ids[request] != item:
        fields = {n: v for n, v in fields.items() if n not in _OF_CHUNKS}
    fields.pop("id", None)
    return fields


class RunRows:
    """Items, requests and results of a run, read from its directory as far as it has got.

    Only places in the journal are held in memory: 8 bytes per request.

    Attributes:
        folder: of the run.
        nodes: the user's nodes.
        num_items: rows of the joined table.
        fields: of the items' inputs; those that any of them has.
        item_bytes: what the input of an item takes on average.
    """

    def __init__(self, folder: Path) -> None:
        """Open a run directory.

        Raises:
            InputError: if it holds no run, or one without texts.
        """
        import pyarrow.parquet as pq

        self.folder = folder
        place = folder / FOLDER
        if not (folder / "run.json").is_file():
            raise InputError(
                f"{folder}: holds no run (there is no run.json); give the --output-dir of a "
                "`samullm run`"
            )
        if not (place / "items.parquet").is_file():
            raise InputError(
                f"{folder}: the run has no rows to join: its application has no texts (it is "
                "bundled), or an older release ran it"
            )
        self._items = pq.ParquetFile(arrow_input(place / "items.parquet"))
        self.num_items = int(self._items.metadata.num_rows)
        groups = map(self._items.metadata.row_group, range(self._items.num_row_groups))
        self.item_bytes = sum(g.total_byte_size for g in groups) / max(1, self.num_items)
        self.fields: list[str] = parse_json(self._items.metadata.metadata[FIELDS.encode()])
        self.nodes: list[NodeRows] = []
        for path in sorted(place.glob("requests-*.parquet")):
            table = pq.read_table(arrow_input(path))
            about = table.schema.metadata
            name = about[b"node"].decode()
            given = about.get(SCHEMA.encode())
            nodes, requests = (table[c].combine_chunks() for c in ("input_node", "input_request"))
            self.nodes.append(
                NodeRows(
                    name,
                    table["item"].to_numpy(),
                    table["id"].combine_chunks(),
                    nodes.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
                    requests.flatten().to_numpy(zero_copy_only=False),
                    _offsets(nodes),
                    int(about.get(b"calls", 0)),
                    None if given is None else Schema(*parse_json(given)),
                    about.get(CHECKED.encode()) == b"1",
                )
            )
        self._index = {n.name: i for i, n in enumerate(self.nodes)}
        self._place = [np.full(len(n), -1, np.int64) for n in self.nodes]
        self._read_to = 0
        self._journal = (folder / "events.jsonl").open("rb")

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()
        self._items.close()

    def advance(self) -> bool:
        """Read what the journal has got since the last time; return whether that was anything."""
        before = self._read_to
        self._journal.seek(before)
        while line := self._journal.readline():
            if not line.endswith(b"\n"):
                break
            at, self._read_to = self._read_to, self._read_to + len(line)
            if not any(kind in line[:80] for kind in (b'"finished"', b'"skipped"', b'"failed"')):
                continue
            record = reread_json(line)
            if record["kind"] in SETTLED and record["node"] in self._index:
                self._place[self._index[record["node"]]][int(record["request"])] = at
        return self._read_to > before

    def settled(self, node: int) -> Any:
        """Return which requests of a node are settled, shape ``(n,)``."""
        return self._place[node] >= 0

    def record(self, node: int, request: int) -> Mapping[str, Any] | None:
        """Return what the journal says of a settled request; None before it is."""
        at = int(self._place[node][request])
        if at < 0:
            return None
        self._journal.seek(at)
        found: dict[str, Any] = reread_json(self._journal.readline())
        return found

    def failed(self) -> Iterator[tuple[str, str, str]]:
        """Yield (node, id, reason) of the requests that failed."""
        for i, node in enumerate(self.nodes):
            for r in np.flatnonzero(self._place[i] >= 0).tolist():
                record = self.record(i, r)
                if record is not None and record["kind"] == "failed":
                    yield node.name, node.ids[r].as_py(), str(record.get("error"))

    def items(self, first: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, fields of the input) of the items from one on."""
        done = 0
        for k in range(self._items.num_row_groups):
            count = self._items.metadata.row_group(k).num_rows
            if done + count > first:
                group = self._items.read_row_group(k)
                for row in range(max(0, first - done), count):
                    fields: dict[str, Any] = reread_json(group["fields"][row].as_py())
                    yield group["id"][row].as_py(), fields
            done += count

    def by_item(self, node: int) -> tuple[Ints, Ints]:
        """Return the rows of a node ordered by item, and where each item's begin."""
        item, calls = self.nodes[node].item, self.nodes[node].calls
        order = np.argsort(item[calls:], kind="stable") + calls
        return order, np.searchsorted(item[order], np.arange(self.num_items + 1))

    def ancestors(self, node: int, request: int) -> dict[int, list[int]]:
        """Return by node the requests that led to a request, itself included."""
        found: dict[int, list[int]] = {node: [request]}
        open_ = [(node, request)]
        while open_:
            i, r = open_.pop()
            rows = self.nodes[i]
            part = slice(rows.input_indptr[r], rows.input_indptr[r + 1])
            pairs = zip(rows.input_node[part], rows.input_request[part], strict=True)
            for j, q in ((int(a), int(b)) for a, b in pairs):
                if q not in found.setdefault(j, []):
                    found[j].append(q)
                    open_.append((j, q))
        return found


def _offsets(lists: Any) -> Ints:
    """Return where each list of an Arrow array begins, from 0."""
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
