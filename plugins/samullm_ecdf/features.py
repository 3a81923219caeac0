"""Features of a prompt that tell something about the length of its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from samullm_plugin.model.types import Floats, Ints

_CUES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(list|enumerate|steps?|outline)\b",
        r"\b(write|compose|draft|create|generate|story|essay|poem|article)\b",
        r"\b(summari[sz]e|summary|shorten|brief|tl;?dr)\b",
        r"\b(classify|label|true or false|yes or no|which of|choose|option)\b",
        r"\b(explain|describe|discuss|compare|why|how)\b",
        r"\b(code|function|python|java|sql|script|program)\b",
        r"\b(translate|rewrite|paraphrase|correct)\b",
        r"\b(one|single) (word|sentence|line)\b",
    )
)
_NUMBER = re.compile(r"\b(\d{1,4})\s*(words?|sentences?|paragraphs?|items?|examples?|ideas?)\b")


def prompt_features(prompt_tokens: Ints, prompts: Sequence[str] | None, task: float) -> Floats:
    """Return one row of features per prompt; NaN where texts are not known.

    Args:
        prompt_tokens: shape ``(n,)``.
        prompts: texts, or None.
        task: code of the task, NaN if unknown.

    Returns:
        Shape ``(n, 15)``.
    """
    count = len(prompt_tokens)
    columns = np.full((count, 15), np.nan)
    columns[:, 0] = np.log1p(prompt_tokens)
    columns[:, 1] = task
    if prompts is not None:
        for row, text in enumerate(prompts):
            asked = _NUMBER.search(text)
            columns[row, 2:7] = (
                np.log1p(len(text)),
                text.count("?"),
                text.count("\n"),
                sum(c.isdigit() for c in text) / max(len(text), 1),
                float(asked.group(1)) if asked else np.nan,
            )
            columns[row, 7:] = [bool(cue.search(text)) for cue in _CUES]
    return columns
