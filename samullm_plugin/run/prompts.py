"""What prompts are, and who makes them once the outputs they wait for are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from samullm_plugin.model.types import Bools
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.python_calls import Call, CallRunner, ImitatedCalls
from samullm_plugin.run.results import RequestId, Result


class Prompt(msgspec.Struct, frozen=True):  # made twice as fast as a frozen dataclass
    """A request that can be given to an engine.

    Attributes:
        prompt_tokens: its length in tokens; an estimate where the engine tokenises.
        max_tokens: limit of its output.
        token_ids: the prompt, if tokenised.
        text: the prompt, if the engine is to tokenise it.
        messages: the prompt as chat messages for the model's chat template.
        sampling: vLLM sampling parameters by name.
        chat: variables passed to the chat template.
        output_tokens: what it will generate, for executors that model engines; else None.
        task: of a pooling model; None: text is generated.
        pair: the second text, for ``task: score``.
        lora: folder of its adapter.
    """

    prompt_tokens: int
    max_tokens: int
    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    sampling: Mapping[str, object] = msgspec.field(default_factory=dict)
    chat: Mapping[str, object] = msgspec.field(default_factory=dict)
    output_tokens: int | None = None
    task: str | None = None
    pair: str | None = None
    lora: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that cannot be asked, such as one whose template broke."""

    reason: str


@dataclass(frozen=True, slots=True)
class Given:
    """A request whose result is there without an engine or a call.

    Attributes:
        value: its value; None in imitations.
        num_tokens: of the value in prompts.
    """

    value: Any
    num_tokens: int


Prepared = Prompt | Call | Given | Refused | None
"""What is to be done for a request; None: it is not taken."""

A_PROMPT = Prompt(0, 0)
"""Some prompt, where it is enough that there is one."""


class PromptBuilder(ABC):
    """Makes prompts from what is in the ledger."""

    @abstractmethod
    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return the prompt of a request whose inputs are all settled and did not fail.

        Returns:
            None if the request is not taken: a router chose another or a filter dropped it.
        """

    @property
    def with_token_ids(self) -> bool:
        """Whether outputs enter prompts as tokens, so that texts alone do not do."""
        return False

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return what :meth:`prepare` would, but a prompt without content.

        Prompts are made when engines have room for them. One that cannot be made then has failed.
        """
        return self.prepare(request, ledger)

    def call_runner(self) -> CallRunner:
        """Return what runs the calls of Python nodes."""
        return ImitatedCalls()

    def judge(self, request: RequestId, result: Result, ledger: Ledger) -> str | Call | None:
        """Return why an output is rejected, or a call that is to decide; None: it is accepted."""
        del request, result, ledger
        return None

    def pooled(self, request: RequestId, numbers: Sequence[float]) -> Any:
        """Return the value of an output of a pooling model."""
        del request
        return list(numbers)

    def again(self, request: RequestId, prompt: Prompt, attempt: int) -> Prompt | None:
        """Return how a rejected request is asked again; None: it is not.

        Args:
            request: as it is planned.
            prompt: as it was asked first.
            attempt: how often it was rejected.
        """
        del request, prompt, attempt
        return None

    def untaken(self, node: int) -> Bools | None:
        """Return which requests are known beforehand not to be taken; None if nobody knows."""
        del node
        return None

    def sample(self, node: str, request: int) -> int:
        """Return which of its line's outputs a request is, from 0."""
        del node, request
        return 0

    def custom_id(self, node: str, request: int) -> str:
        """Return the name of a request in the outputs.

        Args:
            node: name of a node as the user wrote it.
            request: index of one of its requests.
        """
        del node
        return f"request-{request}"

    def unique_id(self, node: str, request: int) -> str:
        """Return a name that no other request of the node has, named as in :meth:`custom_id`."""
        return self.custom_id(node, request)

    def rendered(self, request: RequestId, ledger: Ledger) -> Prompt | None:
        """Return the prompt of a request with its text, for people; None if it has none."""
        del request, ledger
        return None

    def stand_in(self, request: RequestId, num_tokens: int, ledger: Ledger) -> Result | None:
        """Return text and value that stand for an output that was only modelled; None: nothing.

        Args:
            request: as it is planned.
            num_tokens: its length.
            ledger: the results so far.
        """
        del request, num_tokens, ledger
        return None

    def is_chat(self, node: str, request: int) -> bool:
        """Return whether a request, named as in :meth:`custom_id`, is a conversation."""
        del node, request
        return False
