"""What Python processes on emulated GPUs need besides the driver.

Kernels compute nothing, so tokens are made up where vLLM's scheduler hears of them: each follows
from the last one and its place, so that a request that was moved goes on as it would have.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

TOKENS = 500


def next_token(last: int, count: int) -> int:
    """Return the token that follows ``count`` tokens of which ``last`` is the last."""
    return 3 + (7 * last + 13 * count) % TOKENS


def _scheduler(module: ModuleType) -> None:
    taken = module.Scheduler.update_from_output

    def update_from_output(self: Any, scheduled: Any, made: Any) -> Any:
        before = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        tokens: list[list[int]] = []
        for name in made.req_ids:
            request = self.requests.get(name)
            computed = before.get(name, 0) + scheduled.num_scheduled_tokens[name]
            if request is None or computed < request.num_prompt_tokens:
                tokens.append([])
            else:
                tokens.append([next_token(request.all_token_ids[-1], request.num_tokens)])
        made.sampled_token_ids = tokens
        return taken(self, scheduled, made)

    module.Scheduler.update_from_output = update_from_output


def _devices(module: ModuleType) -> None:
    module._DRIVER = ("/proc/self/exe",)


def _runtime(module: ModuleType) -> None:
    # NVIDIA's own may be loaded as well, by its path; it would ask for a real driver.
    module.find_loaded_library = lambda name: os.environ["LD_PRELOAD"]


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "vllm.v1.core.sched.scheduler": _scheduler,
    "vllm.distributed.device_communicators.cuda_wrapper": _runtime,
    "samullm_vllm.devices": _devices,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules named above and changes them once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del target
        if name not in HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            HOOKS[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one only
        return spec


sys.meta_path.insert(0, _Finder())
