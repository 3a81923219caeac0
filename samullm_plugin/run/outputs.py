"""Results of a node as a file in the order of its requests.

Requests that came as lines of OpenAI's batch interface are answered in its format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samullm_plugin.app.nodespec import POOLING_TASKS
from samullm_plugin.files import to_json
from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.model.application import PythonNode
from samullm_plugin.model.logprobs import PositionLogprobs
from samullm_plugin.model.requests import NodePart
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.rundir import RunDirectory
from samullm_plugin.run.user_nodes import UserNodes


class OutputWriter:
    """Writes the outputs of nodes when they have finished, and of the others at the end.

    Args:
        directory: of the run.
        ledger: the results.
        source: names the requests.
    """

    def __init__(self, directory: RunDirectory, ledger: Ledger, source: PromptBuilder) -> None:
        self._directory, self._ledger, self._source = directory, ledger, source
        self._users = UserNodes(ledger.app)
        self._written: set[str] = set()

    def take(self, event: RunEvent) -> None:
        """Follow an event of the run."""
        if event.kind == "node_finished":
            self._write(str(event.fields["node"]))

    def write_rest(self) -> None:
        """Write the outputs of nodes that have not finished, or had before the run went on."""
        for name in self._users.parts:
            if name not in self._written:
                self._write(name)

    def _write(self, name: str) -> None:
        node, part = self._users.parts[name]
        write_outputs(self._directory, node, part, self._ledger, self._source)
        self._written.add(name)


def write_outputs(
    directory: RunDirectory, node: int, part: NodePart, ledger: Ledger, source: PromptBuilder
) -> None:
    """Write ``outputs/<node>.jsonl`` in OpenAI's batch format, in the order of the requests.

    Requests that were not taken (routers, filters) have no line; failed ones have an error.

    Args:
        directory: of the run.
        node: index of a planned node.
        part: one of the user's nodes in it.
        ledger: the results.
        source: names the requests.

    Raises:
        RunError: if the disk is full or fails.
    """
    directory.write(f"outputs/{part.name}.jsonl", _lines(node, part, ledger, source))


def _lines(node: int, part: NodePart, ledger: Ledger, source: PromptBuilder) -> Iterator[bytes]:
    """Yield the lines of a node's outputs; outputs that one line asked for are its choices."""
    served = ledger.app.all_nodes[node]
    model = "" if isinstance(served, PythonNode) else served.model.name
    status = ledger.status[node][part.rows].copy()
    if isinstance(served, PythonNode):
        calls = status[: served.hidden_calls]  # their rows tell what they gave
        calls[calls == Status.FINISHED] = Status.SKIPPED
    first, outputs = 0, list[BatchOutput]()
    for r in np.flatnonzero((status == Status.FINISHED) | (status == Status.FAILED)).tolist():
        if outputs and not source.sample(part.name, r):
            yield _line(source.custom_id(part.name, first), model, outputs, f"{part.name}-{first}")
            outputs = []
        first = first if outputs else r
        result = ledger.results[node, part.place(r)]
        outputs.append(
            BatchOutput(
                result.prompt_tokens,
                result.num_tokens,
                result.finish_reason,
                result.text,
                result.error,
                source.is_chat(part.name, r),
                result.stop_reason,
                result.logprobs,
                result.prompt_logprobs,
                result.value,
                part.task if part.task in POOLING_TASKS else "",
            )
        )
    if outputs:
        yield _line(source.custom_id(part.name, first), model, outputs, f"{part.name}-{first}")


def _line(custom_id: str, model: str, outputs: Sequence[BatchOutput], line_id: str) -> bytes:
    return to_json(batch_line(custom_id, model, outputs, line_id)) + b"\n"


LEAST_LOGPROB = -9999.0
"""What is written for a token that cannot be, as vLLM does."""


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """One answer to one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated.
        finish_reason: ``stop`` or ``length``; None if the request failed.
        text: what was generated; None in simulations.
        error: why the request failed.
        chat: the prompt was a conversation.
        stop_reason: stop string or token that ended it (vLLM's extension).
        logprobs: of each generated token, if asked for.
        prompt_logprobs: of each token of the prompt, if asked for; the first has none.
        value: what a function or a pooling model returned.
        task: of the pooling model; empty: it is none.
    """

    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    text: str | None = None
    error: str | None = None
    chat: bool = False
    stop_reason: int | str | None = None
    logprobs: Sequence[PositionLogprobs] | None = None
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None
    value: Any = None
    task: str = ""


def batch_line(
    custom_id: str, model: str, outputs: Sequence[BatchOutput], line_id: str
) -> dict[str, Any]:
    """Return the JSON object of one line of input.

    Args:
        custom_id: name of the line.
        model: name of the model.
        outputs: its answers, one per choice it asks for. Those that came are written even if
            others failed.
        line_id: unique in the file.
    """
    failed = {k: o.error for k, o in enumerate(outputs) if o.error is not None}
    error: dict[str, Any] | None = None
    if failed:
        message = next(iter(failed.values()))
        if len(outputs) > 1:
            which = ", ".join(map(str, failed))
            message = f"choices {which} of {len(outputs)}: {message}"
        error = {"code": "request_failed", "message": message}
        texts = [o.text for o in outputs if o.error is not None and o.text is not None]
        if texts:  # rejected, and kept
            error["text"] = texts[0]
    response = None
    done = {k: o for k, o in enumerate(outputs) if o.error is None}
    if done:
        body = _body(model, done, line_id)
        response = {"status_code": 200, "request_id": line_id, "body": body}
    return {"id": line_id, "custom_id": custom_id, "response": response, "error": error}


def _body(model: str, outputs: dict[int, BatchOutput], line_id: str) -> dict[str, Any]:
    first = next(iter(outputs.values()))
    if not model:
        return {"id": line_id, "object": "value", "value": first.value}
    prompt_tokens = first.prompt_tokens
    if first.task:  # as vLLM's interfaces of pooling models answer
        kind = "embedding" if first.task == "embed" else first.task
        own = first.value if isinstance(first.value, Mapping) else {"text": first.text}
        return {
            "id": line_id,
            "object": "list",
            "model": model,
            "data": [{"index": 0, "object": kind, **own}],
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
        }
    completion_tokens = sum(o.completion_tokens for o in outputs.values())
    body: dict[str, Any] = {
        "id": line_id,
        "object": "chat.completion" if first.chat else "text_completion",
        "model": model,
        "choices": [_choice(k, o) for k, o in outputs.items()],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    if first.chat and first.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_logprobs(first.prompt_logprobs)
    return body


def _choice(index: int, output: BatchOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if output.value is not None:
        choice["value"] = output.value
    if output.chat:
        choice["message"] = {"role": "assistant", "content": output.text}
    else:
        choice["text"] = output.text
    logprobs = None
    if output.logprobs is not None:
        logprobs = _chat_logprobs(output.logprobs) if output.chat else _logprobs(output.logprobs)
    choice |= {"logprobs": logprobs, "finish_reason": output.finish_reason}
    if output.stop_reason is not None:
        choice["stop_reason"] = output.stop_reason
    if not output.chat and output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = _prompt_logprobs(output.prompt_logprobs)
    return choice


def _most_likely(position: PositionLogprobs) -> PositionLogprobs:
    """Return the tokens asked for beside the generated one, which comes first."""
    others = position[1:]
    rank = position[0].rank or 0
    return others if rank > len(others) else tuple(sorted(position, key=lambda t: t.rank or 0))


def _chat_logprobs(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    def entry(token: str | None, logprob: float) -> dict[str, Any]:
        text = token or ""
        return {
            "token": text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(text.encode(errors="replace")),
        }

    return {
        "content": [
            {
                **entry(position[0].token, position[0].logprob),
                "top_logprobs": [entry(t.token, t.logprob) for t in _most_likely(position)],
            }
            for position in positions
        ]
    }


def _logprobs(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    tokens = [p[0].token or "" for p in positions]
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(p[0].logprob, LEAST_LOGPROB) for p in positions],
        "tokens": tokens,
        "top_logprobs": [
            {t.token or "": max(t.logprob, LEAST_LOGPROB) for t in _most_likely(p)} or None
            for p in positions
        ],
    }


def _prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[Any]:
    return [
        None
        if position is None
        else {
            str(t.token_id): {
                "logprob": max(t.logprob, LEAST_LOGPROB),
                "rank": t.rank,
                "decoded_token": t.token,
            }
            for t in position
        }
        for position in positions
    ]
