"""Predicted memory against what real CPU engines hold: a plain, a tied and a hybrid model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from samullm_plugin.checkpoints.models import read_checkpoint
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.profiling.memory import replica_groups, tokens_held
from tests.checkpoints.found_memory import BLOCKS, KINDS, MAX_MODEL_LEN


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    program = Path(__file__).with_name("found_memory.py")
    log = folder / "log.txt"
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, str(program), str(folder)], stdout=file, stderr=file, check=False
        )
    print(log.read_text()[-4000:])  # why there is no file, if so
    return folder


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)  # the first has three engines made, by a vLLM imported for them
@pytest.mark.parametrize("kind", KINDS)
def test_engines_hold_what_is_predicted(engines: Path, kind: str) -> None:
    folder = engines / kind
    found = json.loads((folder / "found.json").read_text())
    engine = EngineOptions(
        max_num_seqs=16, max_num_batched_tokens=512, block_size=32, async_scheduling=False
    )
    sizes, longest = read_checkpoint(folder, engine)
    assert longest == 2048
    assert sizes.weight_bytes == pytest.approx(found["weight_bytes"], rel=0.001)
    groups = replica_groups(sizes, engine, 1)
    assert [[g.num_layers, g.block_size, g.page_bytes] for g in groups] == found["groups"]
    spec = ModelSpec(kind, MAX_MODEL_LEN, sizes, engine=engine)
    assert tokens_held(groups, spec, BLOCKS * 32) == found["tokens"]
