"""Bring a vLLM engine up inside this process, in two steps: before and after it has a device."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samullm_vllm.protocol import Go, Start

if TYPE_CHECKING:
    from samullm_plugin.host.interfaces.executor import EngineSpec

_LINE = 400

_PRELOADED = (
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.renderers.hf",
    "vllm.distributed.elastic_ep.elastic_execute",
)
PRELOADED: Mapping[str, tuple[str, ...]] = {
    "cpu": (
        *_PRELOADED,
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.attention.backends.cpu_attn",
        "samullm_vllm.recording",
        "samullm_vllm.rank_executor",
        "samullm_vllm.worker",
    ),
    "cuda": (
        *_PRELOADED,
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu.model_runner",
        "vllm.v1.attention.backends.flash_attn",
        "vllm.compilation.backends",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "samullm_vllm.recording",
    ),
}
"""What a first engine would import, so that a process can import it once and fork engines."""

SHARE_OF_GPU = 0.05
"""The ``gpu_memory_utilization`` given to vLLM on CUDA. As the KV cache is a number of blocks,
vLLM uses it for one thing: to refuse to start when less than that share of the whole device is
free. A plan's own figure would keep engines from starting beside another process's or a sleeping
engine's memory, whatever they need themselves."""


def last_line(error: BaseException) -> str:
    """Return the last line of an error's traceback."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:_LINE]


def import_vllm() -> None:
    """Import what every engine needs, whatever it computes on."""
    importlib.import_module("vllm.engine.arg_utils")
    importlib.import_module("vllm.v1.engine.llm_engine")


def preload(platform: str) -> None:
    """Import what engines need, and let each forked copy use AMX on CPUs."""
    import_vllm()
    for name in PRELOADED[platform]:
        with suppress(ModuleNotFoundError):  # another version of vLLM; an engine imports its own
            importlib.import_module(name)
    if platform == "cpu":
        import torch

        torch.cpu._init_amx()
        _register_kernels()


def _register_kernels() -> None:
    """Let vLLM put its kernels in place of Triton's now, and forked engines not once more each.

    It searches every module for them, which is a third of an engine's start on a CPU.
    """
    from vllm.platforms import current_platform

    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None and current_platform.is_cpu():
        register()
        type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)


CUDA_BEGUN = "importing vLLM has touched CUDA, so that no engine can be forked from it"


def cuda_in_use() -> bool:
    """Return whether this process has touched CUDA, so that it must not be forked.

    Counting the devices is enough: then CUDA is not initialised here, but torch refuses to
    initialise it in any process forked afterwards. Only such a process can be asked.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if torch.cuda.is_initialized():
        return True
    pid = os.fork()
    if pid == 0:
        os._exit(1 if torch.cuda._is_in_bad_fork() else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def use_devices(go: Go, rank: int) -> None:
    """Take the devices that an engine was given.

    Called before anything has touched a device, but perhaps after vLLM has asked about one that it
    saw while it was imported: its answers are forgotten.
    """
    os.environ.update(go.environment)
    print(f"devices of rank {rank}: {go.environment or go.cores}", flush=True)  # noqa: T201  # this process's log
    if go.cores:
        core = {go.cores[rank]}
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), core)
    if "CUDA_VISIBLE_DEVICES" in go.environment:
        from vllm.platforms import current_platform

        for name in dir(type(current_platform)):
            forget = getattr(getattr(type(current_platform), name, None), "cache_clear", None)
            if forget is not None:
                forget()


class Bringup:
    """An engine on its way up.

    On CPUs all of it needs memory and some core only, so all can be done ahead; on CUDA what is
    done before there is a device ends with the configuration.

    Attributes:
        parts: seconds of what has been done, by part.
    """

    def __init__(self, start: Start, rank: int) -> None:
        """Begin with nothing done.

        Args:
            start: what to be.
            rank: which of the ranks.
        """
        self._start, self._rank = start, rank
        self._config: Any = None
        self._engine: Any = None
        self._cores: tuple[int, ...] = ()
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a part."""
        began_s = time.monotonic()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - began_s

    def prepare(self) -> None:
        """Do what needs no device."""
        from vllm.platforms import current_platform

        if self._config is None:
            with self.part("configuration"):
                self._config = self._configure()
            if current_platform.is_cpu():
                self._engine = self._build()

    def use_devices(self, go: Go) -> None:
        """Take the devices; the rest of the work may touch them."""
        self._cores = go.cores
        use_devices(go, self._rank)

    def finish(self) -> Any:
        """Do the rest and return vLLM's ``LLMEngine``."""
        self.prepare()
        return self._engine if self._engine is not None else self._build()

    def help_leader(self) -> None:
        """Run the ranks of this machine for the process that leads, on another, until they end."""
        from samullm_vllm import machines

        config = self._configure()
        machines.prepare_workers(self._cores)
        machines.run_ranks(config)

    def _configure(self) -> Any:
        """Return vLLM's configuration."""
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        start, rank = self._start, self._rank
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
            args["additional_config"] = {
                "latency": start.latency, "time_scale": start.time_scale
            }  # fmt: skip
        if start.num_machines > 1:
            args |= {
                "distributed_executor_backend": "mp",
                "nnodes": start.num_machines,
                "node_rank": start.machine,
                "master_addr": start.master,
                "master_port": start.master_port,
            }
        config = EngineArgs(**args, async_scheduling=asynchronous).create_engine_config(
            UsageContext.ENGINE_CONTEXT, headless=start.machine > 0
        )
        scheduling = config.scheduler_config
        if start.latency is not None:
            scheduling.async_scheduling = asynchronous  # vLLM turns it off on a CPU
        name = "RecordingAsyncScheduler" if scheduling.async_scheduling else "RecordingScheduler"
        scheduling.scheduler_cls = f"samullm_vllm.recording.{name}"
        return config

    def _build(self) -> Any:
        """Build the engine; the seconds of its own compiling are a part of their own."""
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        executor = Executor.get_class(self._config)
        if self._start.num_ranks > 1:
            from samullm_vllm.rank_executor import RankExecutor

            executor = RankExecutor.meeting_at(self._start.rendezvous)
        if self._start.num_machines > 1:
            from samullm_vllm import machines

            machines.prepare_workers(self._cores)
        timed = _timed(executor, self)
        with self.part("caches and graphs"):
            engine = LLMEngine(
                vllm_config=self._config,
                executor_class=timed,
                log_stats=False,
                multiprocess_mode=False,
            )
        compile_s = float(self._config.compilation_config.compilation_time)
        self.parts["compilation"] = compile_s
        for name in ("model and weights", "compilation"):
            self.parts["caches and graphs"] -= self.parts.get(name, 0.0)
        if self._start.num_ranks > 1:
            from samullm_vllm.rank_executor import warm_up

            warm_up(engine)
        if self._start.num_machines > 1:
            machines.warm_up(engine)
        if self._start.latency is None and self._config.model_config.runner_type == "generate":
            with self.part("first iterations"):
                first_iterations(engine)
        return engine


def _timed(executor: type[Any], bringup: Bringup) -> type[Any]:
    """Return vLLM's executor class, taking the time of workers, model and weights."""

    def init(self: Any) -> None:
        with bringup.part("model and weights"):
            executor._init_executor(self)

    return type(executor.__name__, (executor,), {"_init_executor": init})


def first_iterations(engine: Any) -> None:
    """Run a prefill and a decode, so that what first ones compile and import is over."""
    from vllm import SamplingParams

    from samullm_vllm import recording

    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    engine.add_request("first", {"prompt_token_ids": [1, 1]}, params, arrival_time=0.0)
    while engine.has_unfinished_requests():
        engine.step()
    recording.take_rows()
    recording.interrupted()


def kv_cache_tokens(engine: Any) -> int:
    """Return the KV-cache capacity of an engine."""
    cache = engine.vllm_config.cache_config
    return int((cache.num_gpu_blocks - 1) * cache.block_size)


def usable_kv_tokens(spec: EngineSpec, block_size: int) -> int:
    """Return the capacity to give an engine on cores: no more than it can ever use.

    There a cache is filled with zeros when it is made, and its memory given back page by page when
    the engine ends: with 8 GiB for a small model, two of them on two cores took 20 s of a start and
    5 s of a stop. Without prefix caching no engine holds more than its longest sequences.

    Args:
        spec: the engine; its capacity is the plan's.
        block_size: tokens of a block as the engine will have it.
    """
    options = spec.model.engine
    groups = () if spec.costs is None else spec.costs.kv_cache_groups
    plain = all(g.kind == "full" for g in groups) and len(groups) <= 1
    more = options.enable_prefix_caching or options.given("speculative_config") is not None
    if more or not plain:
        return spec.kv_cache_tokens
    blocks = -(-spec.model.max_model_len // block_size) + 1
    return min(spec.kv_cache_tokens, options.max_num_seqs * blocks * block_size)


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
    On CUDA ``gpu_memory_utilization`` is :data:`SHARE_OF_GPU`.

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
        **({"gpu_memory_utilization": SHARE_OF_GPU} if platform == "cuda" else {}),
        **options,
    }
