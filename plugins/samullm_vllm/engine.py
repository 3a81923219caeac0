"""Build a vLLM engine inside this process."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samullm_vllm.protocol import Start

_LINE = 400

PRELOADED = (
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "samullm_vllm.recording",
    "samullm_vllm.ranks",
)
"""What a first engine would import, so that a process can import it once and fork engines."""


def last_line(error: BaseException) -> str:
    """Return the last line of an error's traceback."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:_LINE]


def import_vllm() -> None:
    """Import what every engine needs, whatever it computes on."""
    importlib.import_module("vllm.engine.arg_utils")
    importlib.import_module("vllm.v1.engine.llm_engine")


def preload() -> None:
    """Import what engines on CPUs need, and let each forked copy use AMX."""
    import torch

    import_vllm()
    for name in PRELOADED:
        importlib.import_module(name)
    torch.cpu._init_amx()


def build_engine(start: Start, rank: int) -> Any:
    """Return vLLM's ``LLMEngine`` for one rank of a replica, its scheduler recording iterations."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    args = dict(start.engine_args)
    if args.get("enforce_eager") and current_platform.is_cpu():
        # A helper of tensor parallelism would still be compiled, in each process for a second.
        torch.compiler.set_stance("force_eager")
    asynchronous = bool(args.pop("async_scheduling", False))
    if start.num_ranks > 1:
        args["distributed_executor_backend"] = "external_launcher"
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": start.num_ranks}
        os.environ.update({name: str(value) for name, value in world.items()})
    if start.latency is not None:
        args["distributed_executor_backend"] = "samullm_vllm.emulation.ModelledExecutor"
        args["additional_config"] = {"latency": start.latency, "time_scale": start.time_scale}
    config = EngineArgs(**args, async_scheduling=asynchronous).create_engine_config(
        UsageContext.ENGINE_CONTEXT
    )
    scheduling = config.scheduler_config
    if start.latency is not None:
        scheduling.async_scheduling = asynchronous  # vLLM turns it off on a CPU
    name = "RecordingAsyncScheduler" if scheduling.async_scheduling else "RecordingScheduler"
    scheduling.scheduler_cls = f"samullm_vllm.recording.{name}"
    executor = Executor.get_class(config)
    if start.num_ranks > 1:
        from samullm_vllm.ranks import RankExecutor

        executor = RankExecutor.meeting_at(start.rendezvous)
    return LLMEngine(
        vllm_config=config, executor_class=executor, log_stats=False, multiprocess_mode=False
    )


def kv_cache_tokens(engine: Any) -> int:
    """Return the KV-cache capacity of an engine."""
    cache = engine.vllm_config.cache_config
    return int((cache.num_gpu_blocks - 1) * cache.block_size)


def has_tokenizer(model: str) -> bool:
    """Return whether a model's folder holds a tokenizer; anything but a folder is taken to."""
    folder = Path(model)
    if not folder.is_dir():
        return True
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((folder / name).exists() for name in names)


def engine_args(
    model: str, options: Mapping[str, Any], *, kv_tokens: int, platform: str
) -> dict[str, Any]:
    """Return vLLM's engine arguments of a replica, those given explicitly last.

    Both batch limits are always set, because vLLM's defaults depend on how it is called. The KV
    cache is a number of blocks, so that nothing is measured beside another engine on the device;
    vLLM takes ``kv_cache_memory_bytes`` as word that it need not measure, and the blocks as size.

    Args:
        model: folder or hub id.
        options: arguments of this replica; ``block_size`` and the batch limits must be there.
        kv_tokens: KV-cache capacity.
        platform: ``cpu`` or ``cuda``.
    """
    return {
        "model": model,
        "skip_tokenizer_init": not has_tokenizer(model),
        "num_gpu_blocks_override": kv_tokens // int(options["block_size"]) + 1,  # one is never used
        "kv_cache_memory_bytes": 1 << 20,
        "enforce_eager": platform == "cpu",
        "disable_log_stats": True,
        **options,
    }
