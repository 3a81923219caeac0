"""Mutations of app.yaml, requests, profiles, plans and journals, and what must come of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import samullm_plugin
from samullm_plugin.cli.app import main

_BUNDLED = Path(samullm_plugin.__file__).parent / "data" / "latency" / "a100-80gb.json"

DRAWN = (
    "app.yaml", "requests", "requests", "requests", "plan.json", "journal", "lengths", "run",
    "profile", "profile",
)  # fmt: skip
"""Kinds of files, as often as they are tried."""

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(2**64), 0.5, 1e308, float("inf"),
    float("nan"), "", " ", "x", "\u2028", "\x85", "\x00", "é🚲", "../..", "{{ x }}", "{{", "{% for",
    "(", "1e5", "007", "null", "a" * 5000, [], {}, [[]], [None], {"": None}, {"x": {"x": {"x": 1}}},
    ["a", "a"], [0, -1, 2**40],
)  # fmt: skip
"""Values that are written where another is expected."""

BYTES = (
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"\\ud800",
    b'"',
    b"{",
    b"}",
    b",",
    b"1e999",
)

APP: dict[str, Any] = {
    "version": 1,
    "name": "fuzz",
    "models": {
        "a": {"model": "lmsys/vicuna-13b-v1.5", "engine_args": {"max_num_seqs": 8}},
        "b": {"model": "chatglm3-6b", "max_model_len": 4096},
    },
    "nodes": {
        "draft": {
            "model": ["a", "b"],
            "requests": "r.jsonl",
            "prompt": "{{ prompt }} {{ topic }}",
            "sampling_params": {"max_tokens": 9, "temperature": 0.5, "stop": ["x"], "n": 2},
        },
        "filter": {
            "model": "b",
            "for_each": "draft",
            "keep": {"when": "yes", "probability": 0.5},
            "sampling_params": {"max_tokens": 3},
        },
        "judge": {
            "model": "a",
            "inputs": {"answers": {"from": "filter", "by": "item"}},
            "prompt": "{% for x in inputs.answers %}{{ x }}{% endfor %}",
            "sampling_params": {"max_tokens": 5, "extra": {"logprobs": 1}},
            "chat": True,
        },
    },
    "cluster": {"gpus": 2, "nvlink": 2},
    "planner": {"scheduler": "max-heuristic", "scenarios": 1, "length_estimator": "fixed"},
    "executor": "simulated",
}

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "hello there", "topic": "x"},
    {"id": "b", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
     "topic": 3, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"id": "c", "prompt_token_ids": [1, 2, 3], "topic": "y", "max_tokens": 4},
    {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "topic": None,
     "body": {"model": "x", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3,
              "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "seed": 1,
              "response_format": {"type": "json_object"}}},
    {"id": "e", "chunks": ["one", "two", 7], "topic": "z", "prefix_id": "p", "prefix_tokens": 1},
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """A case that went wrong.

    Attributes:
        seed: makes it again.
        kind: of file.
        what: what was wrong.
        content: the file.
    """

    seed: int
    kind: str
    what: str
    content: bytes

    def save(self, folder: Path) -> None:
        """Write the file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.kind}-{self.seed}").write_bytes(self.content)


def mutated(value: Any, rng: random.Random) -> Any:
    """Return a tree with one to three places changed: replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        todo = [value]
        while todo:
            one = todo.pop()
            keys = list(one) if isinstance(one, dict) else list(range(len(one)))
            places += [(one, k) for k in keys]
            todo += [one[k] for k in keys if isinstance(one[k], dict | list)]
        if not places:
            return rng.choice(NASTY)
        parent, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):
            parent[f"{key}{rng.choice('sx_')}"] = parent.pop(key)
        elif how == 2:
            parent[key] = copy.deepcopy(rng.choice(places)[0])
        elif how == 3 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with a few cut out, put in or changed."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + rng.choice(BYTES) + data[at:]
        elif how == 2:
            data = data[:at] + data[at + rng.randint(1, 9) :]
        else:
            data = data[:at] + data[rng.randrange(len(data) + 1) :]
    return data


def _small_profile() -> dict[str, Any]:
    """Return a bundled profile of the device with two models and short tables."""
    profile: dict[str, Any] = json.loads(_BUNDLED.read_text())
    served = ("vicuna-13b", "chatglm3-6b")
    for name in ("models", "starts"):
        profile[name] = [m for m in profile[name] if any(s in m["model"] for s in served)]
    known = profile["architectures"]
    profile["architectures"] = {k: v for k, v in known.items() if any(s in k for s in served)}
    for model in profile["models"]:
        for table in model["latency"].values():
            if isinstance(table, dict):
                table |= {k: v[:4] for k, v in table.items() if isinstance(v, list)}
    return profile


class Corpus:
    """Good files, and a way to try bad ones made of them.

    Args:
        folder: to work in.
    """

    def __init__(self, folder: Path) -> None:
        logging.disable(logging.CRITICAL)
        self.folder = folder
        self.rows = b"".join(json.dumps(r).encode() + b"\n" for r in ROWS)
        (folder / "r.jsonl").write_bytes(self.rows)
        (folder / "good.yaml").write_text(yaml.safe_dump(APP))
        self.good = str(folder / "good.yaml")
        self.run_dir = folder / "run"
        code, said = self.samullm("run", self.good, "--output-dir", str(self.run_dir))
        if code != 0:
            raise RuntimeError(f"the good files do not run: {said}")
        self.plan = json.loads((self.run_dir / "plan.json").read_text())
        self.journal = (self.run_dir / "events.jsonl").read_bytes()
        lengths = {
            "format": "samullm-lengths-1", "source": "x",
            "lengths": [{"model": "chatglm3-6b", "task": "", "prompt_tokens": [3, 4],
                         "output_tokens": [5, 6], "censored": [False, True]}],
        }  # fmt: skip
        self.lengths: Any = lengths
        self.profile = _small_profile()
        self._makers: dict[str, Callable[[random.Random], tuple[bytes, int, str]]] = {
            "app.yaml": self._app, "requests": self._rows, "plan.json": self._plan,
            "journal": self._journal, "lengths": self._lengths, "run": self._run,
            "profile": self._profile,
        }  # fmt: skip

    @staticmethod
    def samullm(*words: str) -> tuple[int, str]:
        """Return exit code and what was said."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(list(words))
        return code, said.getvalue()

    def run(self, seed: int, kind: str | None = None) -> tuple[str, int, Fault | None]:
        """Try one file; return its kind, the exit code and what went wrong.

        Args:
            seed: makes the file, the same one of a kind whatever other kinds there are.
            kind: of file; None: the seed chooses one.
        """
        chosen = kind or random.Random(f"kind {seed}").choice(DRAWN)
        try:
            content, code, said = self._makers[chosen](random.Random(seed))
        except BaseException as error:  # nothing may come out of a command
            return chosen, -1, Fault(seed, chosen, f"{type(error).__name__}: {error}", b"")
        what = None
        if "internal error" in said or "Traceback" in said:
            what = said.strip()[-300:]
        elif code not in (0, 1, 2):
            what = f"exit code {code}"
        elif code == 2 and not said.strip():
            what = "refused without a word"
        elif code == 1 and "unsaid" in said:
            what = said
        return chosen, code, None if what is None else Fault(seed, chosen, what, content)

    def _try_app(self, content: bytes, *command: str) -> tuple[int, str]:
        path = self.folder / "app.yaml"
        path.write_bytes(content)
        return self.samullm(command[0], str(path), *command[1:])

    def _app(self, rng: random.Random) -> tuple[bytes, int, str]:
        content = yaml.safe_dump(mutated(APP, rng), allow_unicode=True).encode(errors="replace")
        if rng.random() < 0.2:
            content = damaged(content, rng)
        (self.folder / "r.jsonl").write_bytes(self.rows)
        command = rng.choice((("validate",), ("plan", "--scheduler", "max-heuristic")))
        return content, *self._try_app(content, *command)

    def _bad_rows(self, rng: random.Random) -> bytes:
        rows = mutated(ROWS, rng)
        rows = rows if isinstance(rows, list) else [rows]
        content = b"".join(
            json.dumps(r, ensure_ascii=rng.random() < 0.5).encode(errors="replace") + b"\n"
            for r in rows
        )
        return damaged(content, rng) if rng.random() < 0.4 else content

    def _rows(self, rng: random.Random) -> tuple[bytes, int, str]:
        content = self._bad_rows(rng)
        (self.folder / "r.jsonl").write_bytes(content)
        app = {**APP, "on_bad_row": rng.choice(("fail", "skip"))}
        return content, *self._try_app(yaml.safe_dump(app).encode(), "validate")

    def _run(self, rng: random.Random) -> tuple[bytes, int, str]:
        """Run over bad rows that are skipped; if the run fails, an output must say why."""
        content = self._bad_rows(rng)
        (self.folder / "r.jsonl").write_bytes(content)
        shutil.rmtree(self.folder / "other", ignore_errors=True)
        app = {**APP, "on_bad_row": "skip"}
        out = self.folder / "other"
        code, said = self._try_app(yaml.safe_dump(app).encode(), "run", "--output-dir", str(out))
        if code == 1:
            bad = [
                json.loads(line)
                for file in (out / "outputs").glob("*.jsonl")
                for line in file.read_text().split("\n")
                if line
            ]
            if not any(line["error"] for line in bad):
                said += "unsaid: the run failed, and no output says why"
        return content, code, said

    def _plan(self, rng: random.Random) -> tuple[bytes, int, str]:
        (self.folder / "r.jsonl").write_bytes(self.rows)
        content = json.dumps(mutated(self.plan, rng)).encode()
        if rng.random() < 0.2:
            content = damaged(content, rng)
        path = self.folder / "plan.json"
        path.write_bytes(content)
        out = self.folder / "planned"
        shutil.rmtree(out, ignore_errors=True)
        command = ("run", self.good, "--plan", str(path), "--output-dir", str(out), "--no-replan")
        return content, *self.samullm(*command)

    def _journal(self, rng: random.Random) -> tuple[bytes, int, str]:
        (self.folder / "r.jsonl").write_bytes(self.rows)
        lines = [json.loads(line) for line in self.journal.splitlines()]
        if rng.random() < 0.5:
            lines = mutated(lines, rng)
            lines = lines if isinstance(lines, list) else [lines]
        lines = lines[: rng.randint(0, len(lines))]
        content = b"".join(json.dumps(r).encode() + b"\n" for r in lines)
        if rng.random() < 0.3:
            content = damaged(content, rng)
        again = self.folder / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(self.run_dir, again)
        (again / "events.jsonl").write_bytes(content)
        retry = ["--retry-failed"] if rng.random() < 0.3 else []
        command = ("run", self.good, "--resume", str(again), "--no-replan", *retry)
        return content, *self.samullm(*command)

    def _lengths(self, rng: random.Random) -> tuple[bytes, int, str]:
        """Estimate lengths by a damaged profile of them."""
        component = ("length_estimator", "ecdf")
        return self._try_profile(self.lengths, rng, component, "validate")

    def _profile(self, rng: random.Random) -> tuple[bytes, int, str]:
        """Plan by a damaged profile of the device."""
        return self._try_profile(self.profile, rng, ("latency_model", "linear"), "plan")

    def _try_profile(
        self, good: Any, rng: random.Random, component: tuple[str, str], command: str
    ) -> tuple[bytes, int, str]:
        """Change a profile, and have it read by a component of the planner."""
        (self.folder / "r.jsonl").write_bytes(self.rows)
        content = json.dumps(mutated(good, rng)).encode()
        if rng.random() < 0.2:
            content = damaged(content, rng)
        path = self.folder / "profile.json"
        path.write_bytes(content)
        field, plugin = component
        part = {"type": plugin, "options": {"profile": str(path)}}
        app = {**APP, "planner": {**APP["planner"], field: part}}
        return content, *self._try_app(yaml.safe_dump(app).encode(), command)
