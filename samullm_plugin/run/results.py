"""Results of settled requests: the last ones in memory, all of them in the run's journal.

A result is kept in memory until it is in the journal and so much has come after it that
:data:`KEPT_BYTES` are reached; later it is read back from its place there. So what a run holds does
not grow with the texts it generates. Runs without a journal keep everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from samullm_plugin.model.logprobs import PositionLogprobs, TokenLogprob
from samullm_plugin.model.types import Ints

RequestId = tuple[int, int]
"""Index of a node and of a request in its table."""

KEPT_BYTES = 32 << 20
"""About how much of results that are in the journal is kept in memory as well."""

_RESULT_BYTES = 300
_BYTES_IN_MEMORY = 2
"""What a byte of a journal record takes in memory, about: small numbers are objects there."""

_UNWRITTEN = -1

_OPTIONAL = ("stop_reason", "logprobs", "prompt_logprobs", "seconds")
"""What is in the record of a finished request if it is known, and mostly is not."""


class Result(msgspec.Struct, frozen=True):  # made twice as fast as a frozen dataclass
    """What came of a settled request.

    Attributes:
        num_tokens: tokens generated in all.
        prompt_tokens: tokens of its own prompt.
        finish_reason: ``stop`` or ``length``; ``error`` if it failed.
        text: what it generated.
        token_ids: the same as tokens.
        error: why it failed.
        stop_reason: stop string or token that ended it.
        logprobs: of each generated token, if asked for.
        prompt_logprobs: of each token of its prompt, if asked for; the first has none.
        value: what a Python function returned, or a check of the output, or a pooling model's.
        seconds: that a function took.
    """

    num_tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    error: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    value: Any = None
    seconds: float | None = None


def fields_of(result: Result, *, ids: bool, value: bool) -> dict[str, Any]:
    """Return what a finished request's journal record has of its result.

    Args:
        result: the result.
        ids: its token ids are wanted again.
        value: its value is.
    """
    fields: dict[str, Any] = {
        "prompt_tokens": result.prompt_tokens, "num_tokens": result.num_tokens
    }  # fmt: skip
    if result.text is not None:
        fields["text"] = result.text
    if result.finish_reason is not None:
        fields["finish_reason"] = result.finish_reason
    for field in _OPTIONAL:
        if (content := getattr(result, field)) is not None:
            fields[field] = content
    if ids and result.token_ids is not None:
        fields["token_ids"] = result.token_ids
    if value and result.value is not None:
        fields["value"] = result.value
    return fields


def result_of(record: Mapping[str, Any]) -> Result:
    """Return a settled request's result as its journal record has it."""
    ids = record.get("token_ids")
    failed = record.get("kind") == "failed"
    return Result(
        int(record.get("num_tokens", 0)),
        int(record.get("prompt_tokens", 0)),
        "error" if failed else record.get("finish_reason"),
        record.get("text"),
        None if ids is None else tuple(ids),
        record.get("error"),
        record.get("stop_reason"),
        logprobs_of(record.get("logprobs")),
        logprobs_of(record.get("prompt_logprobs")),
        record.get("value"),
        record.get("seconds"),
    )


def logprobs_of(rows: Any) -> Any:
    """Return log probabilities as they were before they were written."""
    if rows is None:
        return None
    return tuple(None if r is None else tuple(TokenLogprob(*t) for t in r) for r in rows)


def single_numbers(arrays: Iterable[NDArray[Any]]) -> list[Any]:
    """Return the memory of arrays, to read and write single numbers: numpy takes longer for one."""
    return [memoryview(array) for array in arrays]  # type: ignore[arg-type]  # they have buffers


class Results:
    """A mapping from settled requests to their results.

    Attributes:
        read: returns the journal's record at a place; None: there is no journal.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Begin with none.

        Args:
            sizes: requests per node.
        """
        self.read: Callable[[int], Mapping[str, Any]] | None = None
        self._place = [np.full(n, _UNWRITTEN, np.int64) for n in sizes]
        self._places = single_numbers(self._place)
        self._unwritten: dict[RequestId, Result] = {}
        self._recent: dict[RequestId, tuple[Result, int]] = {}
        self._recent_bytes = 0
        self._order: deque[RequestId] = deque()  # of recent ones; the first key of a dict is slow
        self._pinned: dict[RequestId, Result] = {}

    def add(self, request: RequestId, result: Result, *, pinned: bool = False) -> None:
        """Keep a result.

        Args:
            request: whose it is.
            result: what came of it.
            pinned: it is kept whole until :meth:`unpin`, because its record does not hold it all.
        """
        if pinned:
            self._pinned[request] = result
        else:
            self._unwritten[request] = result

    def unpin(self, request: RequestId) -> None:
        """Forget a pinned result: nobody asks for more than its record holds."""
        self._pinned.pop(request, None)

    def written(self, request: RequestId, place: int, num_bytes: int = 0) -> None:
        """Note where a result is in the journal, so that it need not be held any longer.

        Args:
            request: whose it is.
            place: where its record begins.
            num_bytes: of the record.
        """
        self._places[request[0]][request[1]] = place
        result = self._unwritten.pop(request, None)
        if result is not None and self.read is not None:
            size = _RESULT_BYTES + _BYTES_IN_MEMORY * num_bytes
            self._recent[request] = result, size
            self._recent_bytes += size
            self._order.append(request)
            while self._recent_bytes > KEPT_BYTES and len(self._recent) > 1:
                self._forget(self._order.popleft())

    def all_written(self, node: int, requests: Ints, places: Ints) -> None:
        """Note where results of a node's requests are in the journal, none of which is held."""
        self._place[node][requests] = places

    def _forget(self, request: RequestId) -> None:
        _, size = self._recent.pop(request, (None, 0))
        self._recent_bytes -= size

    def get(self, request: RequestId) -> Result | None:
        """Return a result; None if there is none."""
        if (recent := self._recent.get(request)) is not None:
            return recent[0]
        for held in (self._unwritten, self._pinned):
            if (found := held.get(request)) is not None:
                return found
        place = self._places[request[0]][request[1]]
        if place == _UNWRITTEN or self.read is None:
            return None
        return result_of(self.read(place))

    def __getitem__(self, request: RequestId) -> Result:
        """Return a result.

        Raises:
            KeyError: if there is none.
        """
        if (found := self.get(request)) is None:
            raise KeyError(request)
        return found

    def __contains__(self, request: RequestId) -> bool:
        """Return whether there is a result."""
        if self._places[request[0]][request[1]] != _UNWRITTEN:
            return True
        return request in self._unwritten or request in self._pinned

    def pop(self, request: RequestId) -> None:
        """Forget a result: the request is asked again."""
        self._places[request[0]][request[1]] = _UNWRITTEN
        self._unwritten.pop(request, None)
        self._pinned.pop(request, None)
        self._forget(request)

    def __iter__(self) -> Iterator[RequestId]:
        """Yield the requests that have results, by node and number."""
        found = {*self._unwritten, *self._pinned}
        for node, places in enumerate(self._place):
            found |= {(node, r) for r in np.flatnonzero(places != _UNWRITTEN).tolist()}
        yield from sorted(found)

    def items(self) -> Iterator[tuple[RequestId, Result]]:
        """Yield requests and their results."""
        for request in self:
            yield request, self[request]
