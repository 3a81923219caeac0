"""What running a workload through the executor costs, against plain ``LLM.generate``.

Both engines are loaded side by side, on the same core; workloads run in turn, one engine idle
while the other works. The plain engine runs in its caller's process, which is vLLM's fastest way on
a CPU. On a machine that does other things too, the processor time of the two engine processes is
the steadier figure. Also measured: how long engines take to start, each way.

    python benchmarks/executor_overhead.py --pairs 20
    python benchmarks/executor_overhead.py --start-up
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from samullm_plugin import (
    Cluster,
    EngineOptions,
    EngineRequest,
    EngineSpec,
    Gpu,
    ModelSpec,
)
from samullm_plugin.model.types import Floats

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models import make_tiny_llama  # the checkout's own

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}
LIMITS = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "block_size": 32}
MAX_MODEL_LEN, KV_TOKENS = 1024, 32_768

PLAIN = """
import json, os, sys, time
settings = json.loads(sys.argv[1])
os.sched_setaffinity(0, {settings.pop("core")})
began = time.monotonic()
import torch
torch.cpu._init_amx()
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(**settings)
    print(time.monotonic() - began, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        prompts = [{"prompt_token_ids": p} for p in work["prompts"]]
        params = [
            SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0, detokenize=False)
            for n in work["max_tokens"]
        ]
        began = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - began
        print(json.dumps([seconds, sum(len(o.outputs[0].token_ids) for o in outputs)]), flush=True)
    os._exit(0)
"""


class Plain:
    """``LLM.generate`` in a process of its own."""

    def __init__(self, model: Path, core: int, *, multiprocessing: bool = False) -> None:
        settings = {
            "model": str(model),
            "core": core,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 1 << 30,
            "num_gpu_blocks_override": KV_TOKENS // LIMITS["block_size"] + 1,
            "max_model_len": MAX_MODEL_LEN,
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            **LIMITS,
        }
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PLAIN, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def _line(self) -> str:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("the plain engine ended; run it by hand to see why")
            if line[0] in "[0123456789":
                return line

    def wait_ready(self) -> float:
        """Return the seconds it took to start."""
        return float(self._line())

    def run(self, prompts: list[list[int]], max_tokens: list[int]) -> tuple[float, int]:
        """Return seconds and tokens of a workload."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self.process.stdin.flush()
        seconds, tokens = json.loads(self._line())
        return seconds, tokens

    def close(self) -> None:
        """End it and everything it started."""
        from samullm_vllm.processes import RecordedProcess, kill

        if (recorded := RecordedProcess.of(self.process.pid)) is not None:
            kill([recorded])  # with the engine and worker processes vLLM may have started
        self.process.wait(60)


class Executed:
    """The same through the executor."""

    key = "a"

    def __init__(self, model: Path, folder: Path, method: str = "auto") -> None:
        from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

        self.model = model
        self.executor = VllmExecutor(VllmOptions(start_method=method))  # type: ignore[arg-type]  # a literal
        began = time.monotonic()
        self.executor.open(Cluster.uniform(Gpu("core", 1 << 30), 2, nvlink=2), folder)
        self.open_s = time.monotonic() - began

    def start(self, key: str, devices: tuple[int, ...]) -> float:
        """Return the seconds until an engine is ready."""
        options = EngineOptions(**LIMITS, dtype="bfloat16")
        model = ModelSpec("bench", MAX_MODEL_LEN, path=str(self.model), engine=options)
        began = time.monotonic()
        self.executor.start_engine(EngineSpec(key, 0, model, devices, len(devices), 1, KV_TOKENS))
        while True:
            for event in self.executor.poll(1.0):
                if event.kind != "ready":
                    raise SystemExit(event.reason)
                return time.monotonic() - began

    def pid(self, key: str) -> int:
        """Return the process id of an engine."""
        return int(self.executor._replicas[key].launched.pids[0])

    def run(self, prompts: list[list[int]], max_tokens: list[int]) -> tuple[float, int]:
        """Return seconds and tokens of a workload."""
        sampling = {"temperature": 0.0, "ignore_eos": True}
        began = time.monotonic()
        self.executor.submit(
            self.key,
            [
                EngineRequest(i, tuple(p), len(p), n, sampling=sampling)
                for i, (p, n) in enumerate(zip(prompts, max_tokens, strict=True))
            ],
        )
        done = tokens = 0
        while done < len(prompts):
            for event in self.executor.poll(1.0):
                done += len(event.outputs)
                tokens += sum(o.num_tokens for o in event.outputs)
        return time.monotonic() - began, tokens


def interval(ratios: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """Return the bootstrap 95 % confidence interval of the median."""
    samples = rng.choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(samples, axis=1), [0.025, 0.975])
    return float(low), float(high)


def overhead(model: Path, pairs: int, requests: int, tokens: int) -> dict[str, object]:
    """Run workloads in turn and compare."""
    rng = np.random.default_rng(0)
    core = sorted(os.sched_getaffinity(0))[0]
    plain = Plain(model, core)
    executed = Executed(model, Path(tempfile.mkdtemp()))
    ratios, cpu_ratios, outside, step_ms = [], [], [], []
    try:
        plain.wait_ready()
        executed.start("a", (0,))
        processes = [psutil.Process(n) for n in (plain.process.pid, executed.pid("a"))]
        for pair in range(-1, pairs):
            prompts = rng.integers(3, 8000, (requests, 32)).tolist()
            lengths = rng.integers(tokens // 2, tokens + 1, requests).tolist()
            wall, cpu = [0.0, 0.0], [0.0, 0.0]
            for side in (0, 1) if pair % 2 else (1, 0):
                before = sum(processes[side].cpu_times()[:2])
                run = executed.run if side else plain.run
                wall[side], generated = run(prompts, lengths)
                cpu[side] = sum(processes[side].cpu_times()[:2]) - before
                assert generated == sum(lengths)
            steps, seconds = executed.executor.take_steps("a") or (None, np.zeros(0))
            if pair < 0 or steps is None:
                continue  # the first of each warms up
            ratios.append(wall[1] / wall[0])
            cpu_ratios.append(cpu[1] / cpu[0])
            outside.append(wall[1] / seconds.sum())
            step_ms.append(1000 * wall[0] / len(steps))
            print(f"{pair}: {wall[0]:.3f} s, {wall[1]:.3f} s", file=sys.stderr)
    finally:
        executed.executor.close()
        plain.close()
    return {
        "pairs": pairs,
        "wall_pct": _summary(ratios, rng),
        "engine_cpu_pct": _summary(cpu_ratios, rng),
        "outside_iterations_pct": _summary(outside, rng),
        "median_step_ms": round(float(np.median(step_ms)), 1),
        "load_average": os.getloadavg()[0],
    }


def _summary(ratios: list[float], rng: np.random.Generator) -> dict[str, object]:
    """Return median and confidence interval of what is beyond 1, in percent."""
    values = np.array(ratios)
    low, high = interval(values, rng)
    median = float(np.median(values))
    return {
        "median": round(100 * (median - 1), 2),
        "ci95": [round(100 * (low - 1), 2), round(100 * (high - 1), 2)],
    }


def start_up(model: Path, repeats: int) -> dict[str, object]:
    """Measure how long engines take to be ready."""
    result: dict[str, object] = {}
    executed = Executed(model, Path(tempfile.mkdtemp()))
    try:
        result["opening the executor, with the import of vLLM"] = [executed.open_s]
        result["first engine"] = [executed.start("first", (0,))]
        executed.executor.stop_engine("first")
        for name, devices in (("further engine", (0,)), ("further engine, 2 cores", (0, 1))):
            times, stops = [], []
            for i in range(repeats):
                times.append(executed.start(f"{name}{i}", devices))
                began = time.monotonic()
                executed.executor.stop_engine(f"{name}{i}")
                stops.append(time.monotonic() - began)
            result[name], result[f"{name}: stop"] = times, stops
    finally:
        executed.executor.close()
    fresh = Executed(model, Path(tempfile.mkdtemp()), "fresh")
    try:
        result["fresh interpreter"] = [fresh.start(f"f{i}", (0,)) for i in range(2)]
    finally:
        fresh.executor.close()
    for name, multiprocessing in (("LLM()", True), ("LLM() in its caller's process", False)):
        plain = Plain(model, sorted(os.sched_getaffinity(0))[0], multiprocessing=multiprocessing)
        result[name] = [plain.wait_ready()]
        plain.close()
    return {
        name: {"n": len(times), "median_s": round(float(np.median(times)), 2)}
        for name, times in result.items()
        if isinstance(times, Sequence)
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--start-up", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "mid", dtype="bfloat16", **SIZES)
        if options.start_up:
            result = start_up(model, 5)
        else:
            result = overhead(model, options.pairs, options.requests, options.max_tokens)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
