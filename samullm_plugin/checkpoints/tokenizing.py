"""Tokens of texts and conversations by a model's own tokenizer, where it is on this machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.asking import installed, keep, read_kept
from samullm_plugin.checkpoints.images import Size, image_tokens, images_of, size_of, with_marks
from samullm_plugin.checkpoints.models import checkpoint_of, find_checkpoint
from samullm_plugin.model.application import ModelSpec

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Texts that are counted side by side, in all of the library's threads."""
_KEPT_CHARACTERS = 100_000
"""Counts of windows with as many characters are kept for the next command."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json")
_TELLING = frozenset({".json", ".jinja", ".model", ".txt"})
"""Of a model's files those that may say how a conversation is put into tokens."""


class OwnTokenizers:
    """Counts tokens; texts that come in windows are counted in parallel, and long ones once.

    Called with a model and a text; None without a tokenizer of the model here.
    """

    def __init__(self) -> None:
        """Know no model yet."""
        self._framing: dict[tuple[str, ...], int] = {}
        self._own: dict[str, OwnTokenizer] = {}
        self._images: dict[tuple[str, Size], int] = {}

    def __call__(self, model: ModelSpec, text: str) -> int | None:
        """Return the tokens of a text; None without a tokenizer of the model here."""
        return self._tokenizer(_place(model)).count(text)

    def counts(self, model: ModelSpec, texts: Sequence[str]) -> dict[str, int]:
        """Return the tokens of texts, counted all at once; none without a tokenizer here."""
        tokenizer = self._tokenizer(_place(model))
        unique = list(dict.fromkeys(texts))
        if (counts := tokenizer.count_all(unique)) is not None:
            return dict(zip(unique, counts, strict=True))
        found = {}
        for text in unique:
            if (one := tokenizer.count(text)) is None:
                break  # nor has it one for the others
            found[text] = one
        return found

    def framing(
        self,
        model: ModelSpec,
        messages: Sequence[Mapping[str, object]],
        text: str,
        options: Mapping[str, object],
    ) -> int:
        """Return the tokens that the chat template adds to those of the messages' texts.

        Found once for each sequence of roles, since templates put the same around every text.

        Args:
            model: whose template it is.
            messages: of the conversation.
            text: of all messages, as it is counted.
            options: ``chat_template`` and ``chat_template_kwargs``, if given.

        Returns:
            0 where tokenizer or template are missing; less than 0 for a template that leaves out
            what the tokenizer puts before every text.
        """
        place = _place(model)
        key = (place, repr(sorted(options.items())), *turn_kinds(messages))
        if key not in self._framing:
            self._framing[key] = self._tokenizer(place).framing(messages, text, options) or 0
        return self._framing[key]

    def image_tokens(
        self, model: ModelSpec, messages: Sequence[Mapping[str, object]]
    ) -> int | None:
        """Return what images of a conversation add to the marks that its chat template puts.

        None: one of them is not at hand, or the model's processor is not or does not tell.
        """
        sizes = [size_of(image) for image in images_of(messages)]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return None
        new = list(dict.fromkeys(s for s in known if (_place(model), s) not in self._images))
        if new:
            options = model.engine.given("mm_processor_kwargs")
            told = image_tokens(
                find_checkpoint(_place(model)), new, options if isinstance(options, dict) else {}
            )
            if told is None:
                return None
            places = ((_place(model), size) for size in new)
            self._images.update(zip(places, told, strict=True))
        return sum(self._images[_place(model), size] - 1 for size in known)

    def _tokenizer(self, place: str) -> OwnTokenizer:
        """Return the tokenizer of a place as it was when it was first asked for."""
        if place not in self._own:
            self._own[place] = own_tokenizer(place)
        return self._own[place]


def count_prompt_tokens(
    model: ModelSpec,
    prompt: str | Sequence[Mapping[str, object]],
    options: Mapping[str, object] | None = None,
) -> int | None:
    """Return the tokens of a prompt as the engine counts them.

    Args:
        model: whose tokenizer and chat template count.
        prompt: a text, or the messages of a conversation for the chat template.
        options: variables of the chat template, itself included, if given.

    Returns:
        None if there is no tokenizer here, or the conversation cannot be put through its template.
    """
    own = own_tokenizer(_place(model))
    return own.count(prompt) if isinstance(prompt, str) else own.count_conversation(prompt, options)


def turn_kinds(messages: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """Return for each turn its role and, if it holds images, how many."""
    counts = (len(images_of([m])) for m in messages)
    return tuple(f"{m.get('role')}{n or ''}" for m, n in zip(messages, counts, strict=True))


class OwnTokenizer:
    """The tokenizer of one place; whatever it lacks is answered by None. Nothing is downloaded."""

    def __init__(self, place: str) -> None:
        """Take the files of a folder, or of a hub id that was downloaded."""
        self.place = place
        self.telling = _telling(place)
        self.files = [f for f in self.telling if f.name in _FILES]

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
        long = sum(map(len, texts)) >= _KEPT_CHARACTERS
        key = _key(self.files, texts) if long else None
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
        given = {k: v for k, v in (options or {}).items() if v is not None}
        own = given.pop("chat_template_kwargs", None)
        variables = dict(own) if isinstance(own, Mapping) else {}
        if (effort := given.get("reasoning_effort")) is not None:  # as vLLM's chat interface does
            variables.setdefault("enable_thinking", effort != "none")
        given.setdefault("add_generation_prompt", not given.get("continue_final_message", False))
        try:
            ids = self._whole.apply_chat_template(
                with_marks(messages),
                tokenize=True,
                return_dict=False,
                **{**variables, **given},
            )
            return len(ids)
        except Exception as error:  # templates raise whatever their authors chose
            logger.info("%s: tokens cannot be counted: %s", self.place, error)
            return None

    def framing(
        self,
        messages: Sequence[Mapping[str, object]],
        text: str,
        options: Mapping[str, object],
    ) -> int | None:
        """Return the tokens that a conversation has beside those of its text, kept on this machine.

        Returns:
            None without tokenizer or template.
        """
        library = installed("transformers")
        if not self.files or library is None:
            return None
        kinds = turn_kinds(messages)
        key = _key(self.telling, [library, repr(sorted(options.items())), *kinds])
        if (kept := read_kept("framings", key)) is not None:
            return int(kept["tokens"])
        whole, texts = self.count_conversation(messages, options), self.count(text)
        if whole is None or texts is None:
            return None
        keep("framings", key, {"tokens": whole - texts})
        return whole - texts

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


def own_tokenizer(place: str) -> OwnTokenizer:
    """Return the tokenizer of a place, read once as long as its files stay as they are."""
    files = _telling(place)
    return _read(place, tuple(files), _stamps(files))


@lru_cache(maxsize=16)
def _read(place: str, files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> OwnTokenizer:
    return OwnTokenizer(place)


def _telling(place: str) -> list[Path]:
    """Return all files but weights of a folder, or of a hub id that was downloaded."""
    folder = find_checkpoint(place)
    found = folder.iterdir() if folder is not None and folder.is_dir() else ()
    return sorted(f for f in found if f.suffix in _TELLING and f.is_file())


def _stamps(files: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    """Return what changes with files: when they were written, and their sizes."""
    return tuple((s.st_mtime_ns, s.st_size) for s in (f.stat() for f in files))


def _key(files: Sequence[Path], texts: Sequence[str]) -> str:
    """Return the name of an answer: of a tokenizer's files as they are, and of texts."""
    digest = hashlib.sha256()
    for file, (changed_ns, size) in zip(files, _stamps(files), strict=True):
        digest.update(f"{file} {changed_ns} {size}\n".encode())
    for text in texts:
        digest.update(f"{len(text)} ".encode() + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _place(model: ModelSpec) -> str:
    """Return where the tokenizer of a model is: with its files, or where engine arguments say."""
    return str(model.engine.given("tokenizer") or checkpoint_of(model) or model.path or model.name)
