"""Results of a node as a file in the order of its requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from samullm_plugin.app.batch import BatchOutput, batch_line
from samullm_plugin.app.nodespec import POOLING_TASKS
from samullm_plugin.files import to_json
from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.model.application import NodePart, PythonNode
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
