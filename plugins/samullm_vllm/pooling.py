"""Requests to vLLM's pooling runner: vectors, scores and classes instead of text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from samullm_plugin import EngineRequest, RequestOutput
from samullm_vllm.prompts import EnginePrompt, RequestError, engine_prompt
from samullm_vllm.tracking import Tracked


def prompt_and_params(
    request: EngineRequest, engine: Any, tokenizer: Any
) -> tuple[EnginePrompt, Any]:
    """Return a request's prompt and vLLM's ``PoolingParams``.

    Args:
        request: the request.
        engine: vLLM's ``LLMEngine``; it says which tasks its model supports.
        tokenizer: None if the engine has none.

    Raises:
        RequestError: for a task that the model does not support, or a pair without a tokenizer.
    """
    from vllm import PoolingParams

    task = _task(request, engine)
    activation = False if request.task == "reward" else None
    params = PoolingParams(task=task, use_activation=activation)
    if request.pair is None:
        chat = {"add_generation_prompt": False, **request.chat}  # nothing will be generated
        return engine_prompt(replace(request, chat=chat), engine, tokenizer), params
    if request.prompt is None or tokenizer is None:
        raise RequestError("task score needs two texts, and a tokenizer in the model's folder")
    return _pair(request.prompt, request.pair, engine, tokenizer, params)


def _task(request: EngineRequest, engine: Any) -> Any:
    """Return vLLM's name of what is asked for."""
    supported = engine.get_supported_tasks()
    wanted = {"embed": ("embed",), "reward": ("classify", "token_classify")}
    for name in wanted.get(request.task or "", ("classify",)):
        if name in supported:
            return name
    raise RequestError(
        f"task {request.task}: vLLM serves this model for {', '.join(supported) or 'nothing'} only"
    )


def _pair(
    first: str, second: str, engine: Any, tokenizer: Any, params: Any
) -> tuple[EnginePrompt, Any]:
    """Return two texts as one prompt, put together as vLLM's scores do.

    See ``get_score_prompt`` in ``vllm/entrypoints/pooling/scoring/io_processor.py``.
    """
    from vllm.entrypoints.pooling.scoring.utils import compress_token_type_ids
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.model_executor.models.interfaces import supports_score_template

    config = engine.vllm_config.model_config
    model = get_model_cls(config)
    if supports_score_template(model):
        made = tokenizer(model.get_score_template(first, second))
    elif config.use_sep_token:
        made = tokenizer(text=first, text_pair=second)
    else:
        made = tokenizer(text=first + second)
    types = made.get("token_type_ids")
    if types is not None:
        params.extra_kwargs = {"compressed_token_type_ids": compress_token_type_ids(list(types))}
    prompt = EnginePrompt.of_tokens(list(made["input_ids"]))
    if supports_score_template(model):
        model.post_process_tokens(prompt.inputs)
    return prompt, params


def request_output(tracked: Tracked, output: Any, tokenizer: Any) -> RequestOutput:
    """Return what came of a finished request; arguments as for generated text."""
    del tokenizer
    numbers = tuple(output.outputs.data.flatten().tolist())
    return RequestOutput(
        tracked.request.request,
        1,  # what a plan counts a finished request as
        finish_reason="stop",
        prompt_token_ids=tracked.prompt_token_ids,
        numbers=numbers,
    )
