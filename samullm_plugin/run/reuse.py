"""Requests whose outputs are there already: in the store, or in an earlier run's directory.

Two requests are the same if the engine would be asked the same: checkpoint, adapter, prompt or
messages and chat template, sampling parameters, schema, engine arguments that change results, and
the engine's version. Where outputs are drawn (temperature above 0, no seed), the place in the
application (node and id) must be the same as well, so that copies of a prompt stay different.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic_core import PydanticSerializationError, to_json

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.files import reread_json
from samullm_plugin.files import to_json as written_json
from samullm_plugin.host.interfaces.executor import EngineRequest
from samullm_plugin.model.application import Application, ModelSpec
from samullm_plugin.run.results import RequestId, Result, result_of
from samullm_plugin.run.store import OutputStore, store_path
from samullm_plugin.run.text_prompts import TextPrompts
from samullm_plugin.run.user_nodes import UserNodes

logger = logging.getLogger(__name__)

KEY_BYTES = 16

_OF_THE_RUN = ("time_s", "kind", "node", "request")
_NOT_CONTENT = ("request", "priority", "prompt_tokens", "num_generated", "output_tokens")
"""Fields of a request that say where and how it is served, not what is asked."""

_FOR_SPEED = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "disable_log_stats",
        "enable_lora",
        "enable_prefix_caching",
        "enable_sleep_mode",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_cpu_loras",
        "max_lora_rank",
        "max_loras",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_seqs",
        "num_gpu_blocks_override",
        "swap_space",
    }
)
"""Engine arguments that change when an output is there, not what is in it."""


@dataclass(frozen=True, slots=True)
class ReuseOptions:
    """Where outputs of equal requests are looked for.

    Attributes:
        source: ``cache``: the user's store; ``off``: nowhere; else the directory of a run.
        fresh: the user's nodes that are asked again in any case.
    """

    source: str = "cache"
    fresh: tuple[str, ...] = ()


NO_REUSE = ReuseOptions("off")


class Outputs(Protocol):
    """Where stored outputs come from."""

    def get(self, key: bytes) -> bytes | None:
        """Return an output, or None."""


def _require_journal(directory: Path) -> Path:
    """Return the journal of a run whose outputs are to be used again.

    Raises:
        InputError: if the folder holds none.
    """
    path = directory / "events.jsonl"
    if not path.is_file():
        raise InputError(f"--reuse {directory}: holds no run (there is no events.jsonl)")
    return path


def _require_nodes(fresh: Iterable[str], users: UserNodes) -> None:
    known = {p.rpartition(".")[0]: None for p in users.parts} | users.parts
    for name in fresh:
        if name not in known:
            hint = suggest(name, known) or f"; nodes: {', '.join(users.parts)}"
            raise InputError(f"--fresh: there is no node {name!r}{hint}")


class RunOutputs:
    """The outputs of an earlier run: their places in its journal, 24 bytes each in memory."""

    def __init__(self, directory: Path) -> None:
        """Read the keys.

        Raises:
            InputError: if the folder holds no run, or one whose outputs cannot be told apart.
        """
        path = _require_journal(directory)
        keys, places, at, finished = bytearray(), list[int](), 0, 0
        with path.open("rb") as file:
            for line in file:
                if b'"finished"' in line[:80] and line.endswith(b"\n"):
                    record = reread_json(line)
                    finished += record["kind"] == "finished"
                    if key := record.get("key"):
                        keys += bytes.fromhex(key)
                        places.append(at)
                at += len(line)
        if finished and not places:
            raise InputError(
                f"--reuse {directory}: the run's outputs have no keys: it was run by an executor "
                "that models engines, or by an older release"
            )
        found = np.frombuffer(bytes(keys), f"S{KEY_BYTES}")
        order = np.argsort(found, kind="stable")
        self._keys, self._places = found[order], np.array(places, np.int64)[order]
        self._file = path.open("rb")

    def get(self, key: bytes) -> bytes | None:
        """Return an output, or None."""
        wanted = np.array([key], f"S{KEY_BYTES}")
        k = int(np.searchsorted(self._keys, wanted)[0])
        if k == len(self._keys) or self._keys[k] != wanted[0]:
            return None
        self._file.seek(int(self._places[k]))
        return self._file.readline()

    def close(self) -> None:
        """Let go of the journal."""
        self._file.close()


class Reuse:
    """Finds requests that were answered before, and keeps what is answered now.

    Attributes:
        counts: by the user's node, how many requests were found.
    """

    def __init__(
        self,
        app: Application,
        engine: str,
        sources: Iterable[Outputs],
        *,
        store: OutputStore | None = None,
        fresh: Iterable[str] = (),
        unique_id: Callable[[str, int], str],
        with_token_ids: bool = False,
    ) -> None:
        """Prepare.

        Args:
            app: as it is planned.
            engine: what computes, and its version; part of every key.
            sources: where outputs are looked for, in order.
            store: where new ones are kept; None: nowhere.
            fresh: the user's nodes that are asked again in any case.
            unique_id: names a request by node and index.
            with_token_ids: outputs enter prompts as tokens, so that texts alone do not do.

        Raises:
            InputError: for a node of ``fresh`` that is not there.
        """
        self.counts: Counter[str] = Counter()
        self._users, self._unique_id = UserNodes(app), unique_id
        self._sources, self._store = list(sources), store
        _require_nodes(fresh, self._users)
        self._fresh, self._with_token_ids = set(fresh), with_token_ids
        self._models = [_model_identity(n.model, engine) for n in app.nodes]
        self._names = [n.model.name for n in app.nodes]
        self._adapters: dict[str, list[object]] = {}

    def key(self, request: RequestId, asked: EngineRequest) -> bytes:
        """Return what stands for a request and everything its output depends on."""
        content = {
            f.name: value
            for f in dataclasses.fields(asked)
            if f.name not in _NOT_CONTENT
            and (value := getattr(asked, f.name)) not in (None, (), {}, [])
        }
        if asked.lora is not None:
            content["lora"] = self._adapter(asked.lora)
        sampling: Mapping[str, Any] = asked.sampling
        drawn = sampling.get("temperature", 1.0) != 0 and sampling.get("seed") is None
        node, index = self._users.written(request)
        place = (node, self._unique_id(node, index)) if drawn else ()
        whole = [self._models[request[0]], content, place]
        try:
            text = to_json(whole, fallback=repr)
        except PydanticSerializationError:  # half of a UTF-16 pair
            text = json.dumps(whole, default=repr).encode()
        return hashlib.sha256(text).digest()[:KEY_BYTES]

    def _adapter(self, folder: str) -> list[object]:
        """Return what tells an adapter's content from another's."""
        if folder not in self._adapters:
            self._adapters[folder] = folder_identity(Path(folder))
        return self._adapters[folder]

    @property
    def hopeful(self) -> bool:
        """Return whether there is any output of one of the models."""
        return any(not isinstance(s, OutputStore) or s.has_any(self._names) for s in self._sources)

    def find(self, request: RequestId, key: bytes) -> Result | None:
        """Return the output of an equal request, or None."""
        node, _ = self._users.written(request)
        if node in self._fresh or node.rpartition(".")[0] in self._fresh:
            return None
        for source in list(self._sources):
            try:
                found = source.get(key)
            except InputError as error:
                logger.warning("%s; the run goes on without it", error)
                self._sources.remove(source)
                continue
            if found is None:
                continue
            result = result_of(reread_json(found))
            if self._with_token_ids and result.token_ids is None:
                continue
            self.counts[node] += 1
            return result
        return None

    def keep(self, request: RequestId, key: bytes, record: Mapping[str, object]) -> None:
        """Keep an output for later runs.

        Args:
            request: the request.
            key: of :meth:`key`.
            record: what the journal says of its output.
        """
        if self._store is None:
            return
        record = {n: v for n, v in record.items() if n not in _OF_THE_RUN}
        try:
            self._store.put(key, written_json(record), self._names[request[0]])
        except InputError as error:
            logger.warning("%s; outputs of this run are not kept", error)
            self._store = None


@contextmanager
def opened_reuse(
    options: ReuseOptions, engine: str | None, loaded: LoadedApplication, app: Application
) -> Iterator[Reuse | None]:
    """Have earlier outputs at hand.

    Args:
        options: where they are looked for.
        engine: what will compute, and its version; None: its outputs are not kept.
        loaded: the application as its user wrote it.
        app: the same as it is planned.

    Yields:
        The outputs, or None if they are not to be used.

    Raises:
        InputError: for a run without outputs, or a node of ``fresh`` that is not there.
    """
    _require_nodes(options.fresh, UserNodes(app))
    if options.source == "off" or engine is None or loaded.sources is None:
        if options.source not in ("off", "cache"):
            _require_journal(Path(options.source))  # wrong input, whatever would be done with it
        yield None
        return
    store: OutputStore | None = None
    run: RunOutputs | None = None
    sources: list[Outputs] = []
    try:
        if options.source != "cache":
            run = RunOutputs(Path(options.source))
            sources.append(run)
        else:
            try:
                store = OutputStore(store_path())
                sources.append(store)
            except InputError as error:  # a run is worth more than what it could save
                logger.warning("%s", error)
        prompts = TextPrompts(loaded, app)
        yield Reuse(
            app,
            engine,
            sources,
            store=store,
            fresh=options.fresh,
            unique_id=prompts.unique_id,
            with_token_ids=prompts.with_token_ids,
        )
    finally:
        if run is not None:
            run.close()
        if store is not None:
            try:
                store.close()
            except InputError as error:
                logger.warning("%s", error)


def _model_identity(model: ModelSpec, engine: str) -> list[object]:
    """Return what of a model decides its outputs; a folder's files by their sizes and times."""
    place = model.path or model.name
    found: list[object] = [engine, place, model.max_model_len, model.engine.dtype]
    found.append(sorted((k, repr(v)) for k, v in model.engine.extra if k not in _FOR_SPEED))
    return [*found, *folder_identity(Path(place))]


def folder_identity(folder: Path) -> list[object]:
    """Return what tells one content of a checkpoint's folder from another; empty for no folder."""
    if not folder.is_dir():
        return []
    files = sorted(p for p in folder.iterdir() if p.is_file())
    found: list[object] = []
    for file in files:
        stat = file.stat()
        if file.suffix in (".json", ".jinja") and stat.st_size < 1 << 22:
            found.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
        else:
            found.append([file.name, stat.st_size, stat.st_mtime_ns])
    return found
