"""Tokens of texts and conversations by a model's own tokenizer, where it is on this machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any

from samullm_plugin.checkpoints.machine_cache import keep, read_kept
from samullm_plugin.checkpoints.models import find_checkpoint
from samullm_plugin.model.application import ModelSpec

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Texts that are counted side by side, in all of the library's threads."""
_KEPT_CHARACTERS = 100_000
"""Counts of windows with as many characters are kept for the next command."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json")


class OwnTokenizers:
    """Counts tokens; texts that come in windows are counted in parallel, and long ones once.

    Called with a model and a text; None without a tokenizer of the model here.
    """

    def __init__(self) -> None:
        """Know no counts yet."""
        self._counted: dict[tuple[str, str], int] = {}
        self._framing: dict[tuple[str, ...], int] = {}

    def __call__(self, model: ModelSpec, text: str) -> int | None:
        """Return the tokens of a text; None without a tokenizer of the model here."""
        place = _place(model)
        if (place, text) in self._counted:
            return self._counted[place, text]
        return own_tokenizer(place).count(text)

    def prime(self, model: ModelSpec, texts: Sequence[str]) -> None:
        """Count texts that will be asked for next, all at once; earlier ones are forgotten."""
        place = _place(model)
        unique = list(dict.fromkeys(texts))
        counts = own_tokenizer(place).count_all(unique)
        self._counted = {}
        if counts is not None:
            self._counted = {(place, t): n for t, n in zip(unique, counts, strict=True)}

    def framing(
        self,
        model: ModelSpec,
        messages: Sequence[Mapping[str, object]],
        options: Mapping[str, object],
    ) -> int:
        """Return the tokens that the chat template adds to those of the messages' texts.

        Found once for each sequence of roles, since templates put the same around every text.

        Args:
            model: whose template it is.
            messages: of the conversation.
            options: ``chat_template`` and ``chat_template_kwargs``, if given.

        Returns:
            0 where tokenizer or template are missing; less than 0 for a template that leaves out
            what the tokenizer puts before every text.
        """
        place = _place(model)
        key = (place, repr(sorted(options.items())), *(str(m.get("role")) for m in messages))
        if key not in self._framing:
            own = own_tokenizer(place)
            whole = own.count_conversation(messages, options)
            texts = own.count("\n".join(str(m.get("content") or "") for m in messages))
            self._framing[key] = 0 if whole is None or texts is None else whole - texts
        return self._framing[key]


def count_prompt_tokens(
    place: str,
    prompt: str | Sequence[Mapping[str, object]],
    options: Mapping[str, object] | None = None,
) -> int | None:
    """Return the tokens of a prompt as the engine counts them.

    Args:
        place: folder of the checkpoint, or hub id of one that is in the local cache.
        prompt: a text, or the messages of a conversation for the chat template.
        options: ``chat_template`` and ``chat_template_kwargs``, if given.

    Returns:
        None if there is no tokenizer here, or the conversation cannot be put through its template.
    """
    own = own_tokenizer(place)
    return own.count(prompt) if isinstance(prompt, str) else own.count_conversation(prompt, options)


class OwnTokenizer:
    """The tokenizer of one place; whatever it lacks is answered by None. Nothing is downloaded."""

    def __init__(self, place: str) -> None:
        """Take the files of a folder, or of a hub id that was downloaded."""
        self.place = place
        folder = find_checkpoint(place)
        files = [folder / name for name in _FILES] if folder is not None else []
        self.files = [f for f in files if f.is_file()]

    def count(self, text: str) -> int | None:
        """Return the tokens of a text."""
        if self._fast is not None:
            return len(self._fast.encode(text).ids)
        if self._whole is None:
            return None
        return len(self._whole(text)["input_ids"])

    def count_all(self, texts: Sequence[str]) -> list[int] | None:
        """Return the tokens of each text; those of long windows are kept on this machine."""
        if self._fast is None:
            return None
        key = self._key(texts) if sum(map(len, texts)) >= _KEPT_CHARACTERS else None
        if key is not None and (kept := read_kept("token_counts", key)) is not None:
            return list(kept["counts"])
        counts = [len(encoding.ids) for encoding in self._fast.encode_batch_fast(list(texts))]
        if key is not None:
            keep("token_counts", key, {"counts": counts})
        return counts

    def count_conversation(
        self,
        messages: Sequence[Mapping[str, object]],
        options: Mapping[str, object] | None = None,
    ) -> int | None:
        """Return the tokens of a conversation put through the chat template."""
        if self._whole is None:
            return None
        given = dict(options or {})
        own = given.pop("chat_template_kwargs", None)
        try:
            ids = self._whole.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **{k: v for k, v in given.items() if v is not None},
                **(own if isinstance(own, Mapping) else {}),
            )
            return len(ids)
        except Exception as error:  # templates raise whatever their authors chose
            logger.info("%s: tokens cannot be counted: %s", self.place, error)
            return None

    def _key(self, texts: Sequence[str]) -> str:
        """Return the name of some counts: of the tokenizer's file as it is, and of the texts."""
        digest = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            digest.update(f"{file} {status.st_mtime_ns} {status.st_size}\n".encode())
        for text in texts:
            digest.update(f"{len(text)} ".encode() + text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    @cached_property
    def _fast(self) -> Any:
        """Return what its ``tokenizer.json`` says, without importing transformers."""
        file = next((f for f in self.files if f.name == "tokenizer.json"), None)
        if file is None or find_spec("tokenizers") is None:
            return None
        from tokenizers import Tokenizer

        try:
            found = Tokenizer.from_file(str(file))
        except Exception:  # the library raises nothing narrower; the engine names what is wrong
            return None
        found.no_truncation()
        found.no_padding()
        return found

    @cached_property
    def _whole(self) -> Any:
        """Return it as transformers reads it, with its chat template."""
        if not self.files or find_spec("transformers") is None:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.files[0].parent, local_files_only=True)
        except Exception as error:  # not readable: counts are estimates then
            logger.info("%s: no tokenizer: %s", self.place, error)
            return None


@lru_cache(maxsize=16)
def own_tokenizer(place: str) -> OwnTokenizer:
    """Return the tokenizer of a place, read once."""
    return OwnTokenizer(place)


def _place(model: ModelSpec) -> str:
    """Return where the tokenizer of a model is: with its files, or where engine arguments say."""
    return str(model.engine.given("tokenizer") or model.path or model.name)
