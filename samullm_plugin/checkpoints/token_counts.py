"""Exact token counts by a checkpoint's own tokenizer, where it is on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

logger = logging.getLogger(__name__)


def count_prompt_tokens(
    place: str,
    prompt: str | Sequence[Mapping[str, object]],
    chat_options: Mapping[str, object] | None = None,
) -> int | None:
    """Return the tokens of a prompt as the engine counts them.

    Args:
        place: folder of the checkpoint, or hub id of one that is in the local cache.
        prompt: a text, or the messages of a conversation for the chat template.
        chat_options: what the chat template is told.

    Returns:
        None if there is no tokenizer here, or the conversation cannot be put through its template.
    """
    tokenizer = _tokenizer(place)
    if tokenizer is None:
        return None
    try:
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"])
        ids = tokenizer.apply_chat_template(
            [dict(m) for m in prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **(chat_options or {}),
        )
        return len(ids)
    except Exception as error:  # templates raise whatever their authors chose
        logger.info("%s: tokens cannot be counted: %s", place, error)
        return None


@lru_cache(maxsize=16)
def _tokenizer(place: str) -> Any:
    """Return a tokenizer, or None; nothing is downloaded."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # not there, or not readable: counts are estimates then
        logger.info("%s: no tokenizer: %s", place, error)
        return None
