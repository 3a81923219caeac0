"""The reader against transformers, over every causal-LM class that can be built."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.checkpoints.hf_config import read_config_file
from samullm_plugin.checkpoints.stacks import read_layers
from samullm_plugin.errors import InputError

pytest.importorskip("transformers")
pytest.importorskip("torch")

WEIGHTS_OF_NO_CHECKPOINT = {"longcat_flash", "bert", "roberta", "xlm-roberta"}
"""Their classes hold experts that do nothing, which no checkpoint has, or, of encoders, a head that
predicts tokens, which embedding models do not have."""


@cache
def built() -> dict[str, Any]:
    """Return every small and well-known model that transformers builds."""
    program = Path(__file__).with_name("every_class.py")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_parameters_agree_or_the_reader_says_what_is_not_modelled(tmp_path: Path) -> None:
    agreed, refused, wrong = [], [], []
    for name, entry in built().items():
        if "parameters" not in entry:
            continue
        (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
        try:
            found = read_layers(read_config_file(tmp_path)).parameters
        except InputError as error:
            (refused if "not modelled" in str(error) else wrong).append(f"{name}: {error}")
            continue
        error_pct = 100 * (found / entry["parameters"] - 1)
        if name.split()[0] in WEIGHTS_OF_NO_CHECKPOINT:
            continue
        (agreed if abs(error_pct) < 1 else wrong).append(f"{name}: {error_pct:+.2f} %")
    assert not wrong
    assert len(agreed) > 120, (len(agreed), refused)


def test_families_that_vllm_serves_are_read(tmp_path: Path) -> None:
    served = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "mixtral", "phi3",
              "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoehybrid", "nemotron_h", "jamba",
              "falcon_h1", "bamba", "qwen3_next", "kimi_linear", "olmo3", "exaone4", "cohere2",
              "minimax_m2", "ernie4_5_moe", "seed_oss", "lfm2")  # fmt: skip
    for kind in served:
        entry = built().get(f"{kind} full") or built()[f"{kind} small"]
        (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
        assert read_layers(read_config_file(tmp_path)).parameters > 0, kind
