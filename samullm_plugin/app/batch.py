"""Outputs in the format of OpenAI's batch interface: one JSON object per line and request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """One line of an output file.

    Attributes:
        custom_id: name of the request.
        model: name of the model.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated.
        finish_reason: ``stop`` or ``length``; None if the request failed.
        text: what was generated; None in simulations.
        error: why the request failed.
        chat: the prompt was a conversation.
        stop_reason: stop string or token that ended it (vLLM's extension).
    """

    custom_id: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    text: str | None = None
    error: str | None = None
    chat: bool = False
    stop_reason: int | str | None = None


def batch_line(output: BatchOutput, line_id: str) -> dict[str, Any]:
    """Return the JSON object of an output.

    Args:
        output: what became of the request.
        line_id: unique in the file.
    """
    if output.error is not None:
        return {
            "id": line_id,
            "custom_id": output.custom_id,
            "response": None,
            "error": {"code": "request_failed", "message": output.error},
        }
    content: dict[str, Any] = {"index": 0}
    if output.chat:
        content["message"] = {"role": "assistant", "content": output.text}
    else:
        content["text"] = output.text
    content |= {"logprobs": None, "finish_reason": output.finish_reason}
    if output.stop_reason is not None:
        content["stop_reason"] = output.stop_reason
    body = {
        "id": line_id,
        "object": "chat.completion" if output.chat else "text_completion",
        "model": output.model,
        "choices": [content],
        "usage": {
            "prompt_tokens": output.prompt_tokens,
            "completion_tokens": output.completion_tokens,
            "total_tokens": output.prompt_tokens + output.completion_tokens,
        },
    }
    return {
        "id": line_id,
        "custom_id": output.custom_id,
        "response": {"status_code": 200, "request_id": line_id, "body": body},
        "error": None,
    }
