"""Tokens of prompts before there are outputs to fill them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any, NamedTuple

from samullm_plugin.app.bodies import FIELD_TURNS, has_media, media_parts
from samullm_plugin.app.drafts import Draft, NodeDraft, shared_tokens
from samullm_plugin.app.keptrows import Fields, each_fields
from samullm_plugin.app.loaded import NodeSource, conversation, pair_text, prompt_text
from samullm_plugin.app.nodespec import NodeSection
from samullm_plugin.app.requestlines import PLAIN, RowError, TokenCounter, estimate_tokens
from samullm_plugin.app.templates import Output, plain_parts, referenced
from samullm_plugin.app.trying import StandIn
from samullm_plugin.checkpoints.images import is_image
from samullm_plugin.checkpoints.models import config_of, reads_text_only
from samullm_plugin.checkpoints.tokenizing import OwnTokenizers, turn_kinds
from samullm_plugin.errors import InputError, suggest

SHOWN_FIELDS = 12
"""Fields of a row that a message names at most."""


def constant_lead(source: NodeSource) -> str:
    """Return the text of the turns at the beginning that are the same in all conversations."""
    texts = []
    for role, template in source.turns:
        if role in FIELD_TURNS or referenced(template):
            break
        texts.append(template)
    return "\n".join(texts)


class _Asked(NamedTuple):
    """The texts whose tokens a prompt has.

    Attributes:
        text: of the prompt.
        pair: a second text; empty if there is none.
        messages: of a conversation, whose texts ``text`` holds; None: it is none.
        taken: of samples in place of outputs in the text, which do not count.
        extra: tokens beside them.
    """

    text: str
    pair: str
    messages: Sequence[Mapping[str, object]] | None
    taken: str
    extra: int

    @property
    def texts(self) -> tuple[str, str]:
        """Return the texts that are counted."""
        return self.text, self.pair


class PromptCounts:
    """Counts the tokens of a node's prompts without upstream outputs."""

    def __init__(
        self,
        node: NodeDraft,
        source: NodeSource,
        stand_ins: Mapping[str, StandIn],
        where: str,
        count_tokens: TokenCounter | None,
    ) -> None:
        assert isinstance(node.section, NodeSection)
        assert node.model is not None
        self.section, self.model, self.source = node.section, node.model, source
        self.where, self.count_tokens = where, count_tokens
        self.estimated = self.too_long = self.images_left_out = 0
        self.labels = {w.label for r in node.requests for w in r.waits if w.label}
        self.labels |= set(self.section.edges)
        self.blank = {n: [stand_ins[n].blank] for n in self.labels if n in stand_ins}
        self.sample = {n: [stand_ins[n].sample] for n in self.labels if n in stand_ins}
        self.stand_ins = stand_ins
        templates = [source.template] if source.template is not None else []
        templates += [text for role, text in source.turns if role not in FIELD_TURNS]
        asked = frozenset[str]().union(*(referenced(t) for t in templates))
        second = frozenset[str]() if source.pair is None else referenced(source.pair)
        self._field = f"{where}.{'messages' if source.turns else 'prompt'}"
        self._used = {self._field: asked, f"{where}.pair": second}
        self.written = bool(templates) or source.pair is not None
        self.variables = asked | second
        self._uses_own = (
            "prompt" in self.variables if self.written else self.section.requests is not None
        )
        self._parts = self._plain_parts()
        self._most = node.model.max_model_len - 1
        self._constant: int | None = self.section.template_tokens
        self._framing: dict[tuple[str, ...], int] = {}
        self._node = node
        if any(role == "image" for role, _ in source.turns) and self._reads_text_only:
            raise InputError(
                f"{where}.messages.image: model {self.model.name} reads text only; take a model "
                "that reads images, or leave them out"
            )
        self._check_field_turns([r for r in node.requests if r.error is None])
        if self.written:
            self._check([r for r in node.requests if r.error is None])

    @cached_property
    def _reads_text_only(self) -> bool:
        file = config_of(self.model)
        return file is not None and reads_text_only(file)

    def _plain_parts(self) -> list[tuple[str, bool]] | None:
        """Return the texts of the template and the names of fields that stand between them.

        None: there is more to its prompts. Outputs are blank.
        """
        source = self.source
        if source.pair is not None or source.turns:
            return None
        if source.template is None:
            only = (
                self._uses_own
                and source.own_prompt
                and not self.labels
                and not self.section.template_tokens
            )
            return [("prompt", True)] if only else None
        if (parts := plain_parts(source.template)) is None:
            return None
        return [
            (str(self.blank[part][0]), False) if is_name and part in self.blank else (part, is_name)
            for part, is_name in parts
        ]

    def _check_field_turns(self, good: Sequence[Draft]) -> None:
        """Refuse turns that name a field which no row has."""
        for role, name in self.source.turns:
            if role in FIELD_TURNS and good and not any(name in r.fields for r in good):
                known = list(good[0].fields)
                hint = suggest(name, known) or f"; fields: {', '.join(known[:SHOWN_FIELDS])}"
                raise InputError(f"{self._field}.{role}: no row has a field {name!r}{hint}")

    def _check(self, good: Sequence[Draft]) -> None:
        """Refuse templates that use what no row has, or fail on outputs as they may be.

        What single rows lack is for :meth:`checked_tokens` to say.
        """
        others = {"prompt", "previous", "inputs", *self.labels}
        names = {v for vs in self._used.values() for v in vs if "." not in v} - others
        wanted = names | {name for role, name in self.source.turns if role in FIELD_TURNS}
        request = next((r for r in good if wanted <= r.fields.keys()), None)
        if request is None:
            if good:
                self._check_names(good, names)
            return
        try:
            self._rendered(request.fields, self.sample, self._field)
        except InputError as error:
            used = [n for n in sorted(self.labels & self.variables) if n in self.stand_ins]
            if not used:
                raise
            if not any(self.stand_ins[n].known for n in used) and self._works_blank(request):
                return
            tried = "; ".join(f"{{{{ {n} }}}} was {str(self.sample[n][0])!r}" for n in used)
            nodes = ", ".join(dict.fromkeys(self.stand_ins[n].node for n in used))
            raise InputError(
                f"{error} (tried with request {request.id!r}; {tried}; give `sample`, an output as "
                f"it may be, on {nodes})"
            ) from error

    def _check_names(self, good: Sequence[Draft], names: AbstractSet[str]) -> None:
        """Refuse variables that no row has a field for."""
        missing = {n for n in names if not any(n in r.fields for r in good)}
        for field, variables in self._used.items():
            for name in sorted(missing & variables):
                inputs = ", ".join(sorted(self.labels)) or "none"
                known = list(good[0].fields)
                more = ", ..." if len(known) > SHOWN_FIELDS else ""
                raise InputError(
                    f"{field}: {{{{ {name} }}}} is neither a field of request {good[0].id!r} nor "
                    f"an input nor a node before{suggest(name, known)}; fields: "
                    f"{', '.join(known[:SHOWN_FIELDS]) or 'none'}{more}; inputs: {inputs}"
                )

    def _works_blank(self, request: Draft) -> bool:
        try:
            self._rendered(request.fields, self.blank, self._field)
        except InputError:
            return False
        return True

    def _rendered(
        self, fields: Mapping[str, object], outputs: Mapping[str, list[Output]], where: str
    ) -> tuple[str | list[dict[str, object]], str]:
        """Return a prompt and its second text, empty where there is none, for these outputs.

        Raises:
            InputError: if one of the templates fails; ``where`` is that of the prompt.
        """
        made = conversation(self.source, fields, outputs, where)
        if self.source.pair is None:
            return made, ""
        return made, pair_text(self.source, fields, outputs, self.where)

    def checked_tokens(self, requests: Sequence[Draft]) -> list[int]:
        """Return the tokens of prompts; what is wrong with one becomes its request's error.

        Only a length that is known refuses a prompt as too long; an estimate is cut to what fits,
        and the engine decides. Texts are counted side by side.
        """
        found = [1] * len(requests)
        asked: list[tuple[int, _Asked]] = []
        plain: list[int] = []
        texts: list[str] = []
        for k, fields in enumerate(each_fields([r.row for r in requests])):
            request = requests[k]
            if request.error is not None:
                continue
            if (text := self._plain_text(request, fields)) is not None:
                plain.append(k)
                texts.append(text)
                continue
            try:
                prompt = self._prompt(request, fields)
            except RowError as error:
                request.error = str(error)
                continue
            if isinstance(prompt, _Asked):
                asked.append((k, prompt))
            else:
                found[k] = self._checked(request, prompt, estimated=False)
        counts = self._counts([*texts, *(t for _, one in asked for t in one.texts if t)])
        around = 0
        if texts and self.source.chat:
            around = self._around([{"role": "user", "content": texts[0]}], texts[0])
        # No line here has a shared start of its own.
        least, most = self.section.prefix_tokens, self._most
        for k, text in zip(plain, texts, strict=True):
            exact = counts.get(text)
            tokens = max((estimate_tokens(text) if exact is None else exact) + around, 1)
            self.estimated += exact is None
            if not least <= tokens <= most:
                tokens = self._checked(requests[k], tokens, estimated=exact is None)
            found[k] = tokens
        for k, one in asked:
            before = self.estimated
            tokens = max(self._tokens(one, counts) + one.extra, 1)
            found[k] = self._checked(requests[k], tokens, estimated=self.estimated > before)
        return found

    def _checked(self, request: Draft, tokens: int, *, estimated: bool) -> int:
        """Return the tokens of a prompt that is not longer than it may be."""
        most = self._most
        shared = shared_tokens(self._node, request)
        if shared > tokens:
            request.error = f"prefix_tokens is {shared}, but its prompt has {tokens} tokens"
            return 1
        if tokens <= most:
            return tokens
        if estimated:
            self.too_long += 1
            return most
        request.error = (
            f"its prompt has {tokens} tokens, but node {self._node.name} uses {self.model.name} "
            f"with max_model_len {most + 1}; shorten it, split it into chunks, or raise "
            "max_model_len"
        )
        return 1

    def _plain_text(self, request: Draft, fields: Fields) -> str | None:
        """Return the only text that :meth:`_prompt` would ask to count; None: it has to say."""
        if self._parts is None or "messages" in fields:
            return None
        if request.line is not None and request.line.values.says_prompt:
            return None
        if self._uses_own and not fields.get("prompt"):
            return None
        try:
            return "".join([fields[part] if is_name else part for part, is_name in self._parts])
        except (KeyError, TypeError):
            return None

    def _prompt(self, request: Draft, fields: Fields) -> int | _Asked:
        """Return the tokens of one prompt, at least 1, or the texts whose tokens they are.

        Raises:
            RowError: if it can be no prompt.
        """
        section, values = self.section, request.line.values if request.line else PLAIN
        if values.prompt_token_ids:
            return len(values.prompt_token_ids)
        counted = values.prompt_tokens
        if not self.written and section.requests is None:
            return max(section.template_tokens or 0, 1)
        media = has_media(fields.get("messages") or ())
        if media and self._reads_text_only:
            raise RowError(
                f"its messages hold images, audio or video, and model {self.model.name} reads text "
                "only; take a model that reads them, or leave them out"
            )
        if media and self.source.template is not None:
            raise RowError("its messages hold images, audio or video, which no `prompt` can take")
        if self._uses_own and counted is None and not media and not prompt_text(fields):
            raise RowError(
                "it has no prompt; give prompt, messages, prompt_tokens or prompt_token_ids"
            )
        if counted is not None and (self._uses_own or not self.variables - self.labels):
            own = counted if self._uses_own else 0
            return max(own + self._template(request), 1)
        return self._asked(fields, 0 if self.written else (section.template_tokens or 0))

    def lead_tokens(self) -> int:
        """Return the tokens of the turns that all conversations begin with."""
        text = constant_lead(self.source)
        return self._count(text, self._counts([text]), 0) if text else 0

    def _asked(self, fields: Fields, extra: int = 0) -> _Asked:
        """Return the texts of a prompt without those of outputs.

        Args:
            fields: of the row.
            extra: tokens beside those of the texts.

        Raises:
            RowError: if its template fails on the row.
        """
        taken = ""
        try:
            made, second = self._rendered(fields, self.blank, self.where)
        except InputError:  # it takes something out of an output
            try:
                made, second = self._rendered(fields, self.sample, f"node {self._node.name}")
            except InputError as error:
                raise RowError(str(error)) from error
            taken = "".join(s[0] for n, s in self.sample.items() if n in self.variables)
        if isinstance(made, list):
            return _Asked(prompt_text({"messages": made}), second, made, taken, extra)
        return _Asked(made, second, None, taken, extra)

    def _tokens(self, asked: _Asked, counts: Mapping[str, int | None], estimates: int = 1) -> int:
        """Return the tokens of a prompt, those that the chat template adds included."""
        tokens = self._count(asked.text, counts, estimates)
        if asked.messages is not None:
            tokens += self._around(asked.messages, asked.text)
        if asked.pair:
            tokens += self._count(asked.pair, counts, 0)
        if asked.taken:
            tokens = max(tokens - estimate_tokens(asked.taken), 1)
        return tokens

    def _around(self, messages: Sequence[Mapping[str, object]], text: str) -> int:
        """Return the tokens that the chat template adds to a conversation."""
        if not isinstance(self.count_tokens, OwnTokenizers):
            return 0
        kinds = turn_kinds(messages)
        if kinds not in self._framing:
            self._framing[kinds] = self.count_tokens.framing(
                self.model, messages, text, self.source.chat_options
            )
        return self._framing[kinds] + self._of_media(messages)

    def _of_media(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Return the tokens of what is not text; 0, and a remark, where nobody can tell."""
        if not has_media(messages):
            return 0
        assert isinstance(self.count_tokens, OwnTokenizers)
        counted = None
        if all(is_image(part) for part in media_parts(messages)):
            counted = self.count_tokens.image_tokens(self.model, messages)
        self.images_left_out += counted is None
        return counted or 0

    def _template(self, request: Draft) -> int:
        """Return the tokens that the template adds to a stated count, counted once."""
        if self._constant is None:
            self._constant = 0
            if self.written:
                fields = {**request.fields, "prompt": "", "messages": ()}
                asked = self._asked(fields)
                counts = self._counts([t for t in asked.texts if t])
                self._constant = self._tokens(asked, counts, estimates=0)
        return self._constant

    def _counts(self, texts: Sequence[str]) -> Mapping[str, int | None]:
        """Return the tokens of texts, as far as a tokenizer can tell."""
        if isinstance(self.count_tokens, OwnTokenizers):
            return self.count_tokens.counts(self.model, texts)
        if self.count_tokens is None:
            return {}
        return {text: self.count_tokens(self.model, text) for text in texts}

    def _count(self, text: str, counts: Mapping[str, int | None], estimates: int) -> int:
        """Return the tokens of a text, estimated where no tokenizer has counted them."""
        exact = counts.get(text)
        if exact is not None:
            return exact
        self.estimated += estimates
        return estimate_tokens(text)
