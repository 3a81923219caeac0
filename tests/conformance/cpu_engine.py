"""Run real vLLM engines on the CPU and write what their schedulers did, batch by batch.

``python -m tests.conformance.cpu_engine FOLDER < cases.json > rows.json``; a process of its own,
as vLLM leaves threads and signal handlers behind.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)

ROWS: list[dict[str, Any]] = []


def recording_scheduler() -> type:
    """Return vLLM's scheduler, noting every step that schedules tokens in ``ROWS``."""
    from vllm.v1.core.sched.scheduler import Scheduler

    def name(request_id: str) -> int:
        return int(request_id.partition("-")[0])  # the engine appends something random

    class Recorder(Scheduler):  # type: ignore[misc]  # Any, as vLLM is not installed everywhere
        def schedule(self, *arguments: Any, **options: Any) -> Any:
            output = super().schedule(*arguments, **options)
            if output.total_num_scheduled_tokens:
                ROWS.append(
                    {
                        "scheduled": [[name(r), n] for r, n in output.num_scheduled_tokens.items()],
                        "preempted": sorted(name(r) for r in output.preempted_req_ids or ()),
                        "free_blocks": self.kv_cache_manager.block_pool.get_num_free_blocks(),
                    }
                )
            return output

        def update_from_output(self, output: Any, model_output: Any) -> Any:
            before = set(self.requests)
            result = super().update_from_output(output, model_output)
            if output.total_num_scheduled_tokens:
                ROWS[-1]["finished"] = sorted(name(r) for r in before - set(self.requests))
            return result

    return Recorder


def run_case(model: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one engine on the requests of ``case`` and return its rows."""
    from vllm import LLM, SamplingParams

    ROWS.clear()
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 << 20,
        scheduler_cls=recording_scheduler(),
        **case["engine"],
    )
    llm.generate(
        [{"prompt_token_ids": ids} for ids in case["prompts"]],
        [
            SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0, detokenize=False)
            for n in case["outputs"]
        ],
        use_tqdm=False,
    )
    llm.llm_engine.engine_core.shutdown()
    return list(ROWS)


def main() -> None:
    """Run all cases given on stdin."""
    import torch

    # vLLM's attention kernel uses matrix tiles before anything asked the kernel for them.
    torch.cpu._init_amx()
    cases = json.load(sys.stdin)
    rows = [run_case(Path(sys.argv[1]), case) for case in cases]
    sys.stdout.write("\n" + json.dumps(rows) + "\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would be waited for


if __name__ == "__main__":
    main()
