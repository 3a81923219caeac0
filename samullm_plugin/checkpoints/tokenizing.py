"""Tokens of texts by a model's own tokenizer, where its ``tokenizer.json`` is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.models import find_checkpoint
from samullm_plugin.model.application import ModelSpec

WINDOW = 4096
"""Texts that are counted side by side, in all of the library's threads."""


class OwnTokenizers:
    """Counts tokens; texts that come in windows are counted in parallel."""

    def __init__(self) -> None:
        """Know no tokenizer yet."""
        self._known: dict[str, Any] = {}
        self._counted: dict[tuple[str, str], int] = {}

    def __call__(self, model: ModelSpec, text: str) -> int | None:
        """Return the tokens of a text; None without a tokenizer of the model here."""
        place = _place(model)
        if (place, text) in self._counted:
            return self._counted[place, text]
        tokenizer = self._tokenizer(place)
        return None if tokenizer is None else len(tokenizer.encode(text).ids)

    def prime(self, model: ModelSpec, texts: Sequence[str]) -> None:
        """Count texts that will be asked for next, all at once; earlier ones are forgotten."""
        place = _place(model)
        tokenizer = self._tokenizer(place)
        self._counted = {}
        if tokenizer is None:
            return
        unique = list(dict.fromkeys(texts))
        encodings = tokenizer.encode_batch_fast(unique)
        self._counted = {
            (place, text): len(encoding.ids)
            for text, encoding in zip(unique, encodings, strict=True)
        }

    def _tokenizer(self, place: str) -> Any:
        """Return the tokenizer of a folder, read once; None if there is none."""
        if place not in self._known:
            self._known[place] = _read(place)
        return self._known[place]


def _place(model: ModelSpec) -> str:
    """Return where the tokenizer of a model is: with its files, unless the engine is told else."""
    return str(model.engine.given("tokenizer") or model.path or model.name)


def _read(place: str) -> Any:
    """Return the tokenizer of a folder; None without one, or without the library to read it."""
    folder = find_checkpoint(place)
    file = (folder or Path()) / "tokenizer.json"
    if folder is None or not file.is_file() or find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file))
    except Exception:  # the library raises nothing narrower; the engine names what is wrong with it
        return None
    found.no_truncation()
    found.no_padding()
    return found
