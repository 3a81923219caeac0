"""Log probabilities of tokens."""

from __future__ import annotations

from typing import NamedTuple


class TokenLogprob(NamedTuple):
    """How likely a token was in its place.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        rank: 1 for the most likely one of its place.
        token: its text, if the engine detokenises.
    """

    token_id: int
    logprob: float
    rank: int | None = None
    token: str | None = None


PositionLogprobs = tuple[TokenLogprob, ...]
"""The token in one place, then the most likely ones there, as vLLM orders them."""
