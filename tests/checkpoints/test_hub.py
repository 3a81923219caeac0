"""Models of the Hugging Face hub, from its cache and from a server that answers as it does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from samullm_plugin.app.loading import load_application
from samullm_plugin.checkpoints.hub import has_weights, snapshot
from samullm_plugin.checkpoints.models import find_checkpoint
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.this_machine import usual_executor
from tests.models import make_tiny_llama
from tests.serving import served

pytest.importorskip("huggingface_hub", reason="the hub's client makes the cache")

MODEL = "acme/Tiny-1"
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two revisions of a model; the older one was downloaded last."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repository = tmp_path / "hf" / "hub" / "models--acme--Tiny-1"
    (repository / "refs").mkdir(parents=True)
    for commit, longest in ((MAIN, 1024), (OLD, 256)):
        make_tiny_llama(
            repository / "snapshots" / commit, tokenizer=True, max_position_embeddings=longest
        )
    (repository / "refs" / "main").write_text(MAIN)
    (repository / "refs" / "v0").write_text(OLD)
    return repository


def app(folder: Path, **model: object) -> Path:
    file = folder / "app.yaml"
    (folder / "rows.jsonl").write_text('{"q": "w3 w4"}\n' * 3)
    node = {"model": "m", "requests": "rows.jsonl", "prompt": "{{ q }}",
            "sampling_params": {"max_tokens": 4}}  # fmt: skip
    spec = {"version": 1, "name": "hub", "models": {"m": {"model": MODEL, **model}}}
    file.write_text(json.dumps({**spec, "nodes": {"n": node}}))
    return file


@pytest.mark.parametrize(
    ("given", "longest", "commit"),
    [
        ({}, 1024, MAIN),
        ({"engine_args": {"revision": "v0"}}, 256, OLD),
        ({"engine_args": {"revision": OLD}}, 256, OLD),
        ({"model": "own name", "path": MODEL}, 1024, MAIN),
    ],
)
def test_the_revision_decides_which_files_are_read_and_loaded(
    cache: Path, tmp_path: Path, given: dict[str, object], longest: int, commit: str
) -> None:
    loaded = load_application(app(tmp_path, **given))
    model = loaded.app.nodes[0].model
    assert model.max_model_len == longest
    assert model.path == str(cache / "snapshots" / commit)


def test_a_revision_that_is_not_here_is_not_another(cache: Path) -> None:
    assert snapshot(MODEL, "v1") is None
    (cache / "refs" / "main").unlink()
    assert find_checkpoint(MODEL) is None
    assert find_checkpoint(MODEL, revision="v0") == cache / "snapshots" / OLD


def test_files_without_weights_are_described_and_left_to_vllm(cache: Path, tmp_path: Path) -> None:
    (cache / "snapshots" / MAIN / "model.safetensors").unlink()
    model = load_application(app(tmp_path)).app.nodes[0].model
    assert model.max_model_len == 1024
    assert model.path is None


def test_half_of_the_weights_are_none(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "1.safetensors").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert has_weights(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one repository."""

    files: Path
    asked: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        """Say nothing on stderr."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        known = {f.name: f for f in self.files.iterdir()}
        headers = {"X-Repo-Commit": MAIN, "Content-Type": "application/json"}
        if "/gated" in path:
            self.send_response(403)
            headers["X-Error-Code"] = "GatedRepo"
            content = b"{}"
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            files = [
                {"type": "file", "path": name, "size": f.stat().st_size, "oid": "0"}
                for name, f in known.items()
            ]
            self.send_response(200)
            content = json.dumps(files).encode()
        elif path.startswith(f"/api/models/{MODEL}"):
            siblings = [{"rfilename": name} for name in known]
            self.send_response(200)
            content = json.dumps({"id": MODEL, "sha": MAIN, "siblings": siblings}).encode()
        elif path.startswith(f"/{MODEL}/resolve/") and path.rsplit("/", 1)[1] in known:
            content = known[path.rsplit("/", 1)[1]].read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            self.send_response(200)
        else:
            self.send_response(404)
            headers["X-Error-Code"] = "RepoNotFound"
            content = b"{}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with one model, and what it was asked for."""
    Hub.files = make_tiny_llama(tmp_path / "served", tokenizer=True, max_position_embeddings=512)
    Hub.asked = []
    with served(Hub) as address:
        yield address, Hub.asked


def samullm(*words: str, folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    hub = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    env = {**os.environ, **hub}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-m", "samullm_plugin", *words],
        cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_model_of_the_hub_is_planned_without_its_weights(
    tmp_path: Path, hub: tuple[str, list[str]]
) -> None:
    endpoint, asked = hub
    done = samullm("validate", str(app(tmp_path)), folder=tmp_path, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    fetched = {name.rsplit("/", 1)[1] for name in asked if "/resolve/" in name}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not any(name.endswith(".safetensors") for name in fetched)
    asked.clear()
    shown = samullm("model", MODEL, "--json", folder=tmp_path, endpoint=endpoint)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["max_model_len"] == 512
    assert asked == []  # what was fetched once is here


@pytest.mark.parametrize(
    ("name", "said"),
    [("acme/Absent", "cannot be read from the hub"), ("acme/gated", "HF_TOKEN")],
)
def test_a_model_the_hub_does_not_give_is_refused(
    tmp_path: Path, hub: tuple[str, list[str]], name: str, said: str
) -> None:
    done = samullm("validate", str(app(tmp_path, model=name)), folder=tmp_path, endpoint=hub[0])
    assert done.returncode == 2
    assert "app.yaml: models.m: " in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_out_of_reach_is_said(tmp_path: Path) -> None:
    done = samullm("validate", str(app(tmp_path)), folder=tmp_path, endpoint="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr


@pytest.mark.vllm
def test_weights_that_the_hub_has_count_as_loadable(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (cache / "snapshots" / MAIN / "model.safetensors").unlink()
    loaded = load_application(app(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert usual_executor(PluginHost(), loaded) == "simulated"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert usual_executor(PluginHost(), loaded) == "vllm"
