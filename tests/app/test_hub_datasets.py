"""Tables that are datasets of the Hugging Face hub, by their names: from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.serving import served

pytest.importorskip("datasets")

COMMIT = "a" * 40
NAME = "acme/questions"
FILES = {
    "README.md": b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: more
  data_files: data/test-*
---
# Questions
""",
    "data/train-00000-of-00002.parquet": range(3),
    "data/train-00001-of-00002.parquet": range(3, 5),
    "data/test-00000-of-00001.parquet": range(90, 92),
}


def content(name: str) -> bytes:
    held = FILES[name]
    if isinstance(held, bytes):
        return held
    rows = [{"id": f"q{k}", "question": f"What is {k}?", "level": k} for k in held]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one dataset in parts of Parquet, and one that is gated."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(body=True, paths=given.get("paths", ()))

    def log_message(self, *args: object) -> None:
        """Say nothing on stderr."""

    def _answer(self, *, body: bool, paths: Any = ()) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        headers = {"X-Repo-Commit": COMMIT, "Content-Type": "application/json"}
        status, found = 404, b"{}"
        name = path.removeprefix(files).partition("/")[2]
        if "/gated" in path:
            status, headers["X-Error-Code"] = 403, "GatedRepo"
        elif path.startswith(files) and name in FILES:
            status, found = 200, content(name)
            headers["ETag"] = f'"{hashlib.sha1(found).hexdigest()}"'
        elif path.startswith(files):
            headers["X-Error-Code"] = "EntryNotFound"
        elif path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/").partition("/")[2]
            status, found = 200, json.dumps(self._entries(below)).encode()
        elif path.startswith(f"{api}/paths-info/"):
            known = [e for e in self._entries("") if e["path"] in paths]
            status, found = 200, json.dumps(known).encode()
        elif path == api or path.startswith(f"{api}/revision/"):
            about = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
            status, found = 200, json.dumps(about).encode()
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        if body:
            self.wfile.write(found)

    def _entries(self, below: str) -> list[dict[str, Any]]:
        """Return what is in a folder of the repository, and in those in it."""
        names = [n for n in FILES if not below or n.startswith(f"{below}/")]
        entries = [
            {
                "type": "file",
                "path": n,
                "size": len(content(n)),
                "oid": hashlib.sha1(n.encode()).hexdigest(),
            }
            for n in names
        ]
        return (
            [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}, *entries]
            if not below
            else entries
        )


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with one dataset, and what it was asked for."""
    Hub.asked = []
    with served(Hub) as address:
        yield address, Hub.asked


SCRIPT = """
import json, sys
from pathlib import Path
from samullm_plugin.app.loading import load_application
from samullm_plugin.errors import InputError

for k, table in enumerate(json.loads(sys.argv[1])):
    node = {"model": "m", "requests": table, "prompt": "x", "sampling_params": {"max_tokens": 8}}
    app = {"version": 1, "name": "asked", "models": {"m": {"model": "THUDM/chatglm3-6b"}}}
    Path(f"app{k}.yaml").write_text(json.dumps({**app, "nodes": {"answer": node}}))
    try:
        source = load_application(Path(f"app{k}.yaml")).sources[0]
        print(json.dumps([source.ids, list(source.fields)]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def loaded(
    folder: Path, endpoint: str, *tables: dict[str, Any], offline: bool = False
) -> list[Any]:
    """Return ids and fields of tables, or why they are refused, of a process with its own cache."""
    hub = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint}
    env = {**os.environ, **hub, "HF_HUB_OFFLINE": str(int(offline))}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(tables)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(*numbers: int) -> list[Any]:
    fields = [{"id": f"q{k}", "question": f"What is {k}?", "level": k} for k in numbers]
    return [[f["id"] for f in fields], fields]


def test_datasets_by_their_names(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    """All parts of the split that is named, in order; what the hub does not give is said."""
    found = loaded(
        tmp_path,
        hub[0],
        {"dataset": NAME, "config": "main", "split": "train", "id": "id"},
        {"dataset": NAME, "config": "main"},
        {"dataset": NAME, "config": "main", "split": "trian"},
        {"dataset": NAME, "split": "train"},
        {"dataset": NAME, "config": "more"},
        {"dataset": "acme/absent", "split": "train"},
        {"dataset": "acme/gated", "split": "train"},
    )
    where = "nodes.answer.requests"
    assert found[0] == rows(*range(5))
    assert found[1].endswith(f"{where}.split: say which; splits: train, test")
    assert "trian" in found[2]
    assert "Config name is missing" in found[3]
    assert found[4] == rows(90, 91)
    for reason in (*found[2:4], *found[5:]):
        assert f"{where}: dataset " in reason
        assert " cannot be loaded: " in reason
        assert "\n" not in reason
    offline = loaded(
        tmp_path,
        "http://127.0.0.1:9",
        {"dataset": NAME, "config": "main", "split": "train", "where": {"level": [1, 3]}},
        {"dataset": "acme/elsewhere", "split": "train"},
        offline=True,
    )
    assert offline[0] == rows(1, 3)
    assert "dataset 'acme/elsewhere' cannot be loaded" in offline[1]


def test_a_saved_folder_has_no_configurations(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    tables = {"dataset": "saved"}, {"dataset": "saved", "config": "main"}
    found, refused = loaded(tmp_path, "http://127.0.0.1:9", *tables, offline=True)
    assert [f["prompt"] for f in found[1]] == ["a"]
    assert "requests.config: " in refused
