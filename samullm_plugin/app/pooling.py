"""Pooling models: how their engines are started, what they may be asked for, what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from samullm_plugin.checkpoints.families import FAMILIES
from samullm_plugin.checkpoints.hf_config import ConfigFile, load_json
from samullm_plugin.checkpoints.models import config_of
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec

_CLASSIFIERS = (
    "ForSequenceClassification", "ForTokenClassification", "ClassificationModel", "ForRewardModel",
    "ForProcessRewardModel", "ForRewardModeling", "RewardModel",
)  # fmt: skip
_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
"""Ends of names of architectures, as vLLM tells them apart (``vllm/config/model.py``)."""


def pooling_model(
    model: ModelSpec, task: str, given: Mapping[str, object], where: str
) -> ModelSpec:
    """Return a model whose engines are started with vLLM's pooling runner.

    As vLLM does by itself, they schedule synchronously, and prompts of models whose tokens see
    those behind them, or that pool over all tokens, are computed at once.

    Args:
        model: the model as generating nodes use it.
        task: what the node asks for.
        given: engine arguments that the user wrote.
        where: file and field, for messages.

    Raises:
        InputError: if the model cannot be asked for that, as far as its files tell.
    """
    file = config_of(model)
    whole = False
    if file is not None:
        _check_task(model, task, given, file, where)
        whole = _computed_at_once(file)
    engine = model.engine
    extra = dict(engine.extra)
    extra.setdefault("runner", "pooling")
    if whole:
        for name in ("enable_chunked_prefill", "enable_prefix_caching"):
            if given.get(name) is True:
                raise InputError(
                    f"{where}: {model.name} needs a whole prompt at once, so its engines cannot "
                    f"have {name}; leave it out of engine_args"
                )
        extra["enable_chunked_prefill"] = False
        if engine.max_num_batched_tokens < model.max_model_len:
            if "max_num_batched_tokens" in given:
                raise InputError(
                    f"{where}: {model.name} needs a whole prompt at once: raise "
                    f"max_num_batched_tokens to its max_model_len {model.max_model_len}, or lower "
                    "that"
                )
            engine = replace(engine, max_num_batched_tokens=model.max_model_len)
    asynchronous = engine.async_scheduling and "async_scheduling" in given
    return replace(
        model,
        engine=replace(engine, async_scheduling=asynchronous, extra=tuple(extra.items())),
    )


def check_generates(model: ModelSpec, given: Mapping[str, object], where: str) -> None:
    """Refuse a pooling model where text is to be generated.

    Args:
        model: of a node without a task.
        given: engine arguments that the user wrote.
        where: file and node, for messages.

    Raises:
        InputError: naming the field that is missing.
    """
    why = ""
    if given.get("runner") == "pooling" or given.get("convert") in ("embed", "classify"):
        why = "its engine_args say so"
    elif (file := config_of(model)) is not None:
        names = [str(n) for n in file.raw.get("architectures") or ()]
        if names and all(n.endswith((*_CLASSIFIERS, "Model")) for n in names):
            why = "" if any(n.endswith(_GENERATIVE) for n in names) else names[0]
    if why:
        raise InputError(
            f"{where}.task: missing; {model.name} is a pooling model ({why}) and generates no "
            "text: say whether to embed, score, classify or reward"
        )


def _check_task(
    model: ModelSpec, task: str, given: Mapping[str, object], file: ConfigFile, where: str
) -> None:
    """Refuse a task that a checkpoint is not made for."""
    config, folder = file.raw, file.folder
    names = [str(n) for n in config.get("architectures") or ()]
    if not names or "convert" in given or "hf_overrides" in given:
        return  # the user says what it is
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else int(config.get("num_labels") or 2)
    classifies = any(n.endswith(_CLASSIFIERS) for n in names)
    if task == "embed":
        trained = folder is not None and (
            (folder / "modules.json").is_file() or (folder / "1_Pooling").is_dir()
        )
        if classifies or (not trained and any(n.endswith(_GENERATIVE) for n in names)):
            kind = "a classifier" if classifies else "a generative model"
            raise InputError(
                f"{where}: embed needs an embedding model, and {model.name} ({names[0]}) is {kind};"
                " take another model, or set convert: embed in its engine_args to use its hidden "
                "states all the same"
            )
        return
    if not classifies:
        what = "a reward model" if task == "reward" else "a sequence classifier"
        raise InputError(
            f"{where}: {task} needs {what}, and {model.name} is {names[0]}; take another model, or "
            "set convert: classify in its engine_args"
        )
    sequences = any(n.endswith("ForSequenceClassification") for n in names)
    if task in ("score", "reward") and sequences and count != 1:
        raise InputError(
            f"{where}: {task} needs a model of one label, and {model.name} has {count}; use "
            "task: classify"
        )


def _computed_at_once(file: ConfigFile) -> bool:
    """Return whether a model cannot compute a prompt in parts."""
    if "encoder" in FAMILIES.get(file.text.kind, ()):
        return True
    pooling = None if file.folder is None else file.folder / "1_Pooling" / "config.json"
    if pooling is None or not pooling.is_file():
        return False
    return load_json(pooling, "a pooling configuration").get("pooling_mode_lasttoken") is not True


def class_names(model: ModelSpec) -> tuple[str, ...]:
    """Return the names of a classifier's classes; empty if its files are not here."""
    file = config_of(model)
    labels = None if file is None else file.raw.get("id2label")
    if not isinstance(labels, Mapping):
        return ()
    return tuple(str(labels[k]) for k in sorted(labels, key=int))


def pooled_value(task: str, numbers: Sequence[float], names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a pooling model gave as fields of the output.

    Args:
        task: ``embed`` has the field ``embedding``; ``classify`` ``label``, ``score`` (the
            probability of that label) and ``probs``; ``score`` and ``reward`` have ``score``, the
            last where there is one per token, which are ``scores`` then.
        numbers: as the engine gave them.
        names: of the classes.
    """
    if task == "embed":
        return {"embedding": list(numbers)}
    if task == "classify":
        best = max(range(len(numbers)), key=numbers.__getitem__)
        label = names[best] if best < len(names) else str(best)
        return {"label": label, "score": numbers[best], "probs": list(numbers)}
    if len(numbers) > 1:
        return {"score": numbers[-1], "scores": list(numbers)}
    return {"score": numbers[0]}


def pooled_example(task: str, model: ModelSpec | None) -> dict[str, Any]:
    """Return an output as a pooling model may give it."""
    names = class_names(model) if task == "classify" and model is not None else ()
    return pooled_value(task, [0.5] * max(1, len(names)), names)
