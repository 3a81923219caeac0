"""The first rows of a run end to end, kept for its report: prompts as they were asked, outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samullm_plugin.run.joined import JoinedTable
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.prompts import Prompt, PromptBuilder
from samullm_plugin.run.rows import FOLDER, RunRows
from samullm_plugin.run.rundir import RunDirectory
from samullm_plugin.run.user_nodes import UserNodes

SAMPLES_FILE = f"{FOLDER}/samples.json"
ROWS = 10
_LONGEST = 20_000
_HEAD = 100


def sample_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the first rows of a run: with prompts if it has ended, else what is there.

    Returns:
        Nothing for runs without texts.
    """
    path = folder / SAMPLES_FILE
    if path.is_file():
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if not (folder / FOLDER / "items.parquet").is_file():
        return []
    rows = RunRows(folder)
    try:
        rows.advance()
        return _from_journal(rows)
    finally:
        rows.close()


def _from_journal(rows: RunRows) -> list[dict[str, Any]]:
    table = JoinedTable(rows, ("id",))
    found = []
    for item, (name, fields) in zip(range(ROWS), rows.items(), strict=False):
        requests = [
            _shown(node.name, node.ids[r].as_py(), rows.record(i, r) or {}, None)
            for i, node in enumerate(rows.nodes)
            for r in table.of_item(i, item)
        ]
        found.append({"id": name, "head": _head(fields), "requests": requests})
    return found


def write_samples(directory: RunDirectory, ledger: Ledger, prompts: PromptBuilder) -> None:
    """Keep the first rows of a run that has come to its end.

    Args:
        directory: of the run.
        ledger: what became of its requests.
        prompts: made them.

    Raises:
        RunError: if the disk is full or fails.
    """
    if not (directory.path / FOLDER / "items.parquet").is_file():
        return
    rows, users = RunRows(directory.path), UserNodes(ledger.app)
    try:
        table = JoinedTable(rows, ("id",))
        found = []
        for item, (name, fields) in zip(range(ROWS), rows.items(), strict=False):
            requests = []
            for i, node in enumerate(rows.nodes):
                for r in table.of_item(i, item):
                    planned = users.planned(node.name, int(r))
                    if planned is None:
                        continue
                    status = Status(int(ledger.status[planned[0]][planned[1]]))
                    result = ledger.results.get(planned)
                    record: dict[str, Any] = {"kind": status.name.lower()}
                    if result is not None:
                        record |= {
                            "text": result.text,
                            "value": getattr(result, "value", None),
                            "error": result.error,
                            "finish_reason": result.finish_reason,
                            "prompt_tokens": result.prompt_tokens,
                        }
                    made = prompts.rendered(planned, ledger) if _was_asked(status) else None
                    requests.append(_shown(node.name, node.ids[r].as_py(), record, made))
            found.append({"id": name, "head": _head(fields), "requests": requests})
    finally:
        rows.close()
    directory.write_json(SAMPLES_FILE, found)


def _was_asked(status: Status) -> bool:
    return status in (Status.FINISHED, Status.FAILED)


def _shown(
    node: str, name: str, record: Mapping[str, Any], prompt: Prompt | None
) -> dict[str, Any]:
    """Return one request as the report shows it."""
    output = record.get("value")
    output = record.get("text") if output is None else json.dumps(output, ensure_ascii=False)
    messages = None if prompt is None or prompt.messages is None else prompt.messages
    return {
        "node": node,
        "id": name,
        "status": record.get("kind"),
        "prompt": None if prompt is None else _cut(prompt.text),
        "messages": None
        if messages is None
        else [
            {"role": str(m.get("role")), "content": _cut(str(m.get("content")))} for m in messages
        ],
        "prompt_tokens": record.get("prompt_tokens"),
        "finish_reason": record.get("finish_reason"),
        "output": _cut(output),
        "error": record.get("error"),
    }


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … ({len(text):,} characters)"


def _head(fields: dict[str, Any]) -> str:
    """Return the beginning of an item's first text."""
    text = next((v for v in fields.values() if isinstance(v, str)), "")
    text = " ".join(text.split())
    return text if len(text) <= _HEAD else f"{text[:_HEAD]}…"
