"""Where requests come from: what is to be asked once the outputs they wait for are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.scenarios import LengthScenario
from samullm_plugin.services.running.ledger import Ledger, RequestId


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request that can be given to an engine.

    Attributes:
        prompt_tokens: its length in tokens; an estimate where the engine tokenises.
        max_tokens: limit of its output.
        token_ids: the prompt, if tokenised.
        text: the prompt, if the engine is to tokenise it.
        messages: the prompt as chat messages for the model's chat template.
        sampling: vLLM sampling parameters by name.
        output_tokens: what it will generate, for executors that model engines; else None.
    """

    prompt_tokens: int
    max_tokens: int
    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that cannot be asked, such as one whose template broke."""

    reason: str


class RequestSource(ABC):
    """Makes prompts from what is in the ledger."""

    @abstractmethod
    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        """Return the prompt of a request whose inputs are all settled and did not fail.

        Returns:
            None if the request is not taken: a router chose another or a filter dropped it.
        """

    def untaken(self, node: int) -> NDArray[np.bool_] | None:
        """Return which requests are known beforehand not to be taken; None if nobody knows."""
        del node
        return None

    def custom_id(self, request: RequestId) -> str:
        """Return the name of a request in the outputs."""
        return f"request-{request[1]}"


class LengthSource(RequestSource):
    """Requests without content, for executors that model engines: lengths only."""

    def __init__(self, truth: LengthScenario) -> None:
        """Keep what is true.

        Args:
            truth: output lengths, 0 where a request is not taken.
        """
        self._truth = truth
        self._untaken: list[NDArray[np.bool_]] = [np.asarray(o == 0) for o in truth.output_tokens]

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        """Return the lengths of a request, the outputs of its inputs included."""
        node, r = request
        output = int(self._truth.output_tokens[node][r])
        if output == 0:
            return None
        table, model = ledger.app.nodes[node].requests, ledger.app.nodes[node].model
        part = slice(table.input_indptr[r], table.input_indptr[r + 1])
        tokens = int(table.prompt_tokens[r])
        inputs = zip(table.input_node[part], table.input_request[part], strict=True)
        for (i, q), enters in zip(inputs, table.input_in_prompt[part], strict=True):
            if enters:
                tokens += int(ledger.generated[i][q])
        tokens = min(tokens, model.max_model_len - 1)
        limit = min(int(table.max_tokens[r]), model.max_model_len - tokens)
        return Prompt(tokens, limit, output_tokens=min(output, limit))

    def untaken(self, node: int) -> NDArray[np.bool_] | None:
        """Return which requests are not taken."""
        return self._untaken[node]
