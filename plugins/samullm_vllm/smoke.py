"""A tiny model with random weights, run through the whole product as a user would run one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samullm_vllm.devices import Platform

REQUESTS, TOKENS = 8, 16
_LIMIT_S = 600.0
_VOCAB = 512

APP = """\
version: 1
name: doctor
models:
  tiny:
    model: tiny
    path: model
    max_model_len: 256
    engine_args: {{load_format: dummy, dtype: {dtype}, block_size: {block}, max_num_seqs: 8,
                  max_num_batched_tokens: 256}}
nodes:
  answer:
    model: tiny
    requests: requests.jsonl
    sampling_params: {{temperature: 0, ignore_eos: true, max_tokens: {tokens}}}
cluster: {{gpus: 1, gpu: doctor, gpu_memory_gib: 0.05}}
planner:
  scheduler: min-heuristic
  length_estimator: fixed
  latency_model: {{type: linear, options: {{profile: profile.json}}}}
executor: {{type: vllm, options: {{platform: {platform}}}}}
"""


@dataclass(frozen=True, slots=True)
class SmokeResult:
    """What came of it.

    Attributes:
        error: why it failed; empty if it did not.
        total_s: seconds of everything, planning and imports included.
        run_s: seconds of the run.
        parts: seconds of the engine's start by part.
    """

    error: str = ""
    total_s: float = 0.0
    run_s: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """Return it in a line."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.parts.items())
        return (
            f"{REQUESTS} requests of {TOKENS} tokens planned and answered in {self.total_s:.0f} s, "
            f"the run {self.run_s:.1f} s" + (f" (engine start: {parts})" if parts else "")
        )


def smoke_run(folder: Path, platform: Platform) -> SmokeResult:
    """Plan and run the application in a new folder.

    Args:
        folder: for model, requests, profile and run.
        platform: what to compute on.

    Raises:
        subprocess.TimeoutExpired: if it is not over after ten minutes.
    """
    _write_model(folder / "model")
    block, dtype = (32, "float32") if platform == "cpu" else (16, "bfloat16")
    app = APP.format(tokens=TOKENS, platform=platform, block=block, dtype=dtype)
    (folder / "app.yaml").write_text(app)
    (folder / "profile.json").write_text(json.dumps(_profile()))
    lines = [{"id": f"r{i}", "prompt": f"w{i + 3} w{i + 4} w{i + 5}"} for i in range(REQUESTS)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "requests.jsonl").write_text(text)
    command = [
        sys.executable, "-m", "samullm_plugin", "run", "app.yaml", "--output-dir", "run",
        "--reuse", "off",
    ]  # fmt: skip
    began_s = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    total_s = time.monotonic() - began_s
    if done.returncode != 0:
        return SmokeResult(_last_words(done.stderr) or f"exit status {done.returncode}")
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    tokens = metrics["nodes"]["answer"]["completion_tokens"]
    if tokens != REQUESTS * TOKENS:
        return SmokeResult(f"{tokens} tokens came back, and {REQUESTS * TOKENS} were asked for")
    return SmokeResult(
        "", total_s, float(metrics["makespan_s"]["measured"]), _start_parts(folder / "run")
    )


def _start_parts(directory: Path) -> dict[str, float]:
    """Return the seconds of the engine's start by part, as the run's journal has them."""
    for line in (directory / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("kind") == "engine_ready":
            return dict(event.get("parts", {}))
    return {}


def _last_words(stderr: str) -> str:
    """Return the error of a command, without colours and progress."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stderr)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("Error", "error", "samullm:"))]
    return (errors or lines or [""])[-1]


def _write_model(folder: Path) -> None:
    """Write what vLLM and the tokenizer library read of a very small Llama."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, _VOCAB)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _profile() -> dict[str, object]:
    """Return figures of a device that nobody has; only the plan uses them."""
    flat = {"knots": [0.0], "values": [0.01]}
    none = {"knots": [0.0], "values": [0.0]}
    latency = {"by_tokens": flat, "by_seqs": none, "host_by_seqs": none}
    model = {
        "model": "tiny", "tensor_parallel_size": 1, "latency": latency, "num_rows": 1,
        "mape_pct": 0.0,
    }  # fmt: skip
    start = {"model": "tiny", "tensor_parallel_size": 1, "warm_s": 5.0}
    memory = ("one_bytes", "two_bytes", "more_bytes", "logit_factor", "hidden_factor", "mlp_factor")
    return {
        "format": "samullm-profile-1",
        "device": "doctor",
        "source": "made up for samullm doctor",
        "models": [model],
        "starts": [start],
        "memory": dict.fromkeys(memory, 0.0),
    }
