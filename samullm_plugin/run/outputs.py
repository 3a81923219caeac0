"""Results of a node as a file in the order of its requests."""

from __future__ import annotations

from pydantic_core import to_json

from samullm_plugin.app.batch import BatchOutput, batch_line
from samullm_plugin.model.application import NodePart
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.rundir import RunDirectory


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
    model = ledger.app.nodes[node].model.name
    lines = []
    for r, status in enumerate(ledger.status[node][part.rows].tolist()):
        if status not in (Status.FINISHED, Status.FAILED):
            continue
        result = ledger.results[node, part.start + r]
        output = BatchOutput(
            source.custom_id(part.name, r),
            model,
            result.prompt_tokens,
            result.num_tokens,
            result.finish_reason,
            result.text,
            result.error,
            source.is_chat(part.name, r),
            result.stop_reason,
        )
        lines.append(to_json(batch_line(output, f"{part.name}-{r}")) + b"\n")
    directory.write_bytes(f"outputs/{part.name}.jsonl", b"".join(lines))
