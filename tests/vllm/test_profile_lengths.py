"""Output lengths measured on real engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.profiling.observations import read_length_profile
from tests.models import make_tiny_llama

pytestmark = pytest.mark.vllm


def test_outputs_of_a_model_and_of_one_that_reads_them(tmp_path: Path, wordy: Path) -> None:
    """Both models of a chain; what ends at max_tokens is censored, what stops is not."""
    make_tiny_llama(tmp_path / "second", seed=3, tokenizer=True)
    lines = [
        {"id": f"q{i}", "prompt": " ".join(f"w{3 + (7 * i + k) % 500}" for k in range(6)),
         "sampling_params": {"seed": i}}
        for i in range(30)
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = {"dtype": "float32", "block_size": 32, "max_num_seqs": 16}
    sampling = {"max_tokens": 60, "temperature": 1.0}
    app = {
        "version": 1,
        "name": "pair",
        "models": {
            "first": {"model": "me/first", "path": str(wordy), "max_model_len": 512,
                      "engine_args": engine},
            "second": {"model": "me/second", "path": str(tmp_path / "second"),
                       "max_model_len": 512, "engine_args": engine},
        },
        "nodes": {
            "answer": {"model": "first", "requests": "r.jsonl", "sampling_params": sampling},
            "check": {"model": "second", "for_each": "answer", "task": "check",
                      "prompt": "w4 {{ output }}", "sampling_params": sampling},
        },
    }  # fmt: skip
    (tmp_path / "app.yaml").write_text(json.dumps(app))
    out = tmp_path / "lengths.json"
    command = ["profile", "lengths", str(tmp_path / "app.yaml"), "--sample=24", f"-o{out}"]
    assert main([*command, f"--log-dir={tmp_path / 'logs'}"]) == 0
    profile = read_length_profile(out)
    assert "nothing was measured" not in profile.source
    first, second = profile.observations
    assert (first.model, second.model, second.task) == ("me/first", "me/second", "check")
    for seen in (first, second):
        assert len(seen.output_tokens) == 24
        # random weights stop at any token with about equal chance: some do, some do not
        assert ((seen.output_tokens == 60) | ~seen.censored).all()
        assert seen.censored[seen.output_tokens == 60].mean() > 0.5
        assert (~seen.censored).any()
    assert (first.prompt_tokens == 6).all()
    # the second one's prompts hold the first one's outputs, whose last token may be an end mark
    assert np.abs(second.prompt_tokens - 1 - first.output_tokens).max() <= 3
