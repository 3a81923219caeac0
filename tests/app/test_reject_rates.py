"""What the plan expects of requests that wait for outputs which may be rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.errors import InputError
from samullm_plugin.model.scenarios import draw_taken

MODEL = {"model": "THUDM/chatglm3-6b", "max_model_len": 4096}
LIMIT = {"sampling_params": {"max_tokens": 8}}


def load(folder: Path, nodes: dict[str, Any], rows: int = 4) -> LoadedApplication:
    lines = [json.dumps({"id": f"r{i}", "prompt": "go on"}) for i in range(rows)]
    (folder / "r.jsonl").write_text("\n".join(lines) + "\n")
    nodes = {n: {"model": "m", **LIMIT, **s} for n, s in nodes.items()}
    app = {"version": 1, "name": "t", "models": {"m": MODEL}, "nodes": nodes}
    (folder / "app.yaml").write_text(json.dumps(app))
    return load_application(folder / "app.yaml")


FIRST = {"requests": "r.jsonl", "output_schema": {"choice": ["a", "b"]}, "reject_rate": 0.4}


def probabilities(loaded: LoadedApplication, node: str) -> Any:
    return loaded.app.nodes[loaded.app.index(node)].requests.probability


def test_what_waits_fails_with_it(tmp_path: Path) -> None:
    nodes = {"first": FIRST, "second": {"for_each": "first"}, "third": {"for_each": "first"}}
    loaded = load(tmp_path, nodes, rows=400)
    assert (probabilities(loaded, "first") == 1).all()  # it is asked all the same
    assert probabilities(loaded, "second") == pytest.approx(0.6)
    taken = dict(zip(nodes, draw_taken(loaded.app, np.random.default_rng(0)), strict=True))
    assert 200 < taken["second"].sum() < 280
    assert (taken["second"] == taken["third"]).all()  # one output, one fate


def test_retries_leave_fewer(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"first": {**FIRST, "retries": 2}, "second": {"for_each": "first"}})
    assert probabilities(loaded, "second") == pytest.approx(1 - 0.4**3)


def test_all_joined_outputs_must_be_accepted(tmp_path: Path) -> None:
    other = {"for_each": "first", "output_schema": {"regex": "a+"}, "reject_rate": 0.5}
    joined = {"inputs": {"a": "first", "b": "other"}}
    loaded = load(tmp_path, {"first": FIRST, "other": other, "joined": joined})
    assert probabilities(loaded, "joined") == pytest.approx(0.6 * 0.5)


def test_a_filter_that_may_be_rejected(tmp_path: Path) -> None:
    first = {**FIRST, "keep": {"when": "a", "probability": 0.5}}
    loaded = load(tmp_path, {"first": first, "second": {"for_each": "first"}})
    assert probabilities(loaded, "second") == pytest.approx(0.6 * 0.5)


def test_a_rate_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nodes\.first: reject_rate: nothing is rejected"):
        load(tmp_path, {"first": {"requests": "r.jsonl", "reject_rate": 0.1}})
