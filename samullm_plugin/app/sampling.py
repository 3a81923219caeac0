"""Sampling parameters by vLLM's names, each of which is honoured or refused by name.

``tests/app/test_bodies.py`` compares this with the ``SamplingParams`` of the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, JsonValue, model_validator

from samullm_plugin.app.fields import LARGEST, Count, Natural, Section

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]

REFUSED: Mapping[str, str] = {
    "flat_logprobs": "outputs have one form of log probabilities; leave it out",
    "output_kind": "outputs are written when they are whole; leave it out",
    "output_text_buffer_length": "vLLM's own business; leave it out",
    "prompt_logprob_start": "not supported; prompt_logprobs gives those of the whole prompt",
    "prompt_logprob_token_ids": "not supported; prompt_logprobs gives the most likely tokens",
    "routed_experts_prompt_start": "routed experts are not written to the outputs",
    "skip_clone": "vLLM's own business; leave it out",
    "stream_interval": "nothing is streamed; leave it out",
    "trace_decode_token_ids": "traces are not written to the outputs",
}
"""Parameters of vLLM that have no meaning here, and why."""


class SamplingSection(Section):
    """Sampling parameters by vLLM's names (``vllm/sampling_params.py``)."""

    max_tokens: Count | None = Field(default=None, description="Limit of the output.")
    min_tokens: Natural | None = None
    n: int | None = Field(
        default=None, ge=1, le=16384, description="Choices: outputs per request, with other seeds."
    )
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=LARGEST)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Natural] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bad_words: list[str] | None = None
    logit_bias: Mapping[Natural, float] | None = None
    allowed_token_ids: list[Natural] | None = None
    logprobs: int | None = Field(
        default=None,
        ge=-1,
        le=LARGEST,
        description="Write the log probability of each output token, and of as many of the most "
        "likely ones in its place (-1: all).",
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=-1, le=LARGEST, description="The same of each token of the prompt."
    )
    logprob_token_ids: list[Natural] | None = Field(
        default=None, description="Tokens whose log probabilities are written at each place."
    )
    detokenize: bool | None = Field(default=None, description="false: token ids, no texts.")
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    structured_outputs: Mapping[str, JsonValue] | None = Field(
        default=None,
        description="What outputs must be: one of json, regex, choice, grammar, json_object and "
        "structural_tag.",
    )
    thinking_token_budget: int | None = Field(default=None, ge=-1, le=LARGEST)
    repetition_detection: Mapping[str, JsonValue] | None = None
    watermarking: bool | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: Mapping[str, JsonValue] | None = Field(
        default=None, description="Arguments of vLLM's plugins."
    )
    extra: Mapping[str, JsonValue] = Field(
        default={}, description="Any other field of vLLM's SamplingParams, passed on unchecked."
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Check the known fields among ``extra`` as all others; refuse what has no meaning."""
        if not isinstance(value, Mapping):
            return value
        extra = value.get("extra")
        if not isinstance(extra, Mapping):
            extra = {}  # whatever it is, its field says so
        else:
            known = {n: v for n, v in extra.items() if n in cls.model_fields and n != "extra"}
            rest = {n: v for n, v in extra.items() if n not in known}
            value = {**value, **known, "extra": rest}
        for name in (*value, *extra):
            if name in REFUSED:
                raise ValueError(f"{name} is not supported: {REFUSED[name]}")
        return value

    def given(self) -> dict[str, object]:
        """Return the parameters that were set, by vLLM's names."""
        fields = self.model_dump(exclude_none=True, exclude={"extra"})
        return {**fields, **self.extra}
