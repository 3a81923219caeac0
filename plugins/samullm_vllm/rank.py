"""One rank of an engine: vLLM's engine and the requests it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from samullm_plugin import EngineRequest, RequestOutput
from samullm_vllm import pooling, prompts, sampling, tracking
from samullm_vllm.protocol import Message, Sleep, Start, Submit, Wake


class Rank:
    """One rank of an engine: its engine and the requests it has.

    Args:
        start: what it is.
        engine: vLLM's ``LLMEngine``.
    """

    def __init__(self, start: Start, engine: Any) -> None:
        self.start = start
        self.engine = engine
        skipped = bool(start.engine_args.get("skip_tokenizer_init", False))
        self.tokenizer = None if skipped else self.engine.get_tokenizer()
        from vllm.exceptions import VLLMClientError

        self._refusals = (
            prompts.RequestError, VLLMClientError, ValueError, TypeError, NotImplementedError
        )  # fmt: skip
        self.tracked: dict[int, tracking.Tracked] = {}
        self._adapters: dict[str, int] = {}
        self._arrivals = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.engine.has_unfinished_requests())

    def apply(self, message: Message) -> list[RequestOutput]:
        """Do what a message says; return the requests it ended."""
        if isinstance(message, Submit):
            return self.add(message.requests)
        if isinstance(message, Sleep):
            self._sleep(message.seconds)
        elif isinstance(message, Wake):
            self._wake(message.seconds)
        return []

    def add(self, requests: Sequence[EngineRequest]) -> list[RequestOutput]:
        """Give requests to the engine; return those it refuses."""
        return [refused for r in requests if (refused := self._add(r)) is not None]

    def _add(self, request: EngineRequest) -> RequestOutput | None:
        self._arrivals += 1.0  # the same on all ranks, unlike the time
        try:
            if self.start.latency is None:
                if request.task is not None:
                    prompt, params = pooling.prompt_and_params(request, self.engine, self.tokenizer)
                else:
                    prompt = prompts.engine_prompt(request, self.engine, self.tokenizer)
                    params = sampling.sampling_params(request, self.tokenizer)
            else:
                prompt = prompts.modelled_prompt(request)
                params = sampling.modelled_params(request)
            self.engine.add_request(
                str(request.request),
                prompt.inputs,
                params,
                arrival_time=self._arrivals,
                lora_request=self._adapter(request.lora),
                priority=request.priority,
            )
        except self._refusals as error:
            self.engine.abort_request([str(request.request)])  # in case half of it was taken
            return RequestOutput(
                request.request, 0, (), finish_reason="error", error=str(error) or repr(error)
            )
        tokenised = request.prompt is not None or request.messages is not None
        own = tuple(prompt.token_ids) if tokenised and request.prompt_token_ids is None else None
        self.tracked[request.request] = tracking.Tracked(request, own, prompt.media)
        return None

    def _adapter(self, folder: str | None) -> Any:
        """Return vLLM's name of an adapter; they are numbered as they come."""
        if folder is None or self.start.latency is not None:
            return None
        from vllm.lora.request import LoRARequest

        number = self._adapters.setdefault(folder, len(self._adapters) + 1)
        return LoRARequest(f"adapter-{number}", number, folder)

    def _sleep(self, seconds: float) -> None:
        """Free the device's memory; a modelled engine takes so many seconds."""
        if self.start.latency is None:
            self.engine.sleep(level=2)
        else:
            time.sleep(seconds * self.start.time_scale)

    def _wake(self, seconds: float) -> None:
        """Undo that: weights are loaded again before there is a KV cache."""
        if self.start.latency is None:
            self.engine.wake_up(tags=["weights"])
            self.engine.collective_rpc("reload_weights")
            self.engine.wake_up(tags=["kv_cache"])
        else:
            time.sleep(seconds * self.start.time_scale)

    def step(self) -> list[RequestOutput]:
        """Run an iteration; return the requests that finished."""
        outputs = []
        for output in self.engine.step():
            if output.finished:
                tracked = self.tracked.pop(int(output.request_id))
                made = pooling.request_output if tracked.request.task else sampling.request_output
                outputs.append(made(tracked, output, self.tokenizer))
        return outputs
