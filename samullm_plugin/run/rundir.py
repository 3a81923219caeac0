"""The directory of a run: everything that is needed to understand it and to go on with it.

``run.json`` says which application it is of, ``app.yaml`` and ``plan.json`` what was asked and
planned, ``events.jsonl`` is the journal, ``outputs/`` holds the results by node, ``logs/`` those of
the engines, ``metrics.json`` and ``trace.json`` are written at the end.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from samullm_plugin.errors import InputError
from samullm_plugin.files import read_json, replace_file, to_json
from samullm_plugin.run.identity import SHOWN, differences
from samullm_plugin.run.journal import disk_error

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems answer that have no ``flock``."""

_BEFORE_RUN = frozenset(
    {"run.lock", "outputs", "run.json", "rows", "app.yaml", "plan.json", "planned.json"}
)
"""What a run writes before its journal: without one, nothing of it is worth keeping."""

FORMAT = 1
"""Version of the directory's layout."""


class RunDirectory:
    """Paths and small files of a run; held by one process at a time.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        """Name the directory; nothing is touched."""
        self.path = path
        self._lock = -1

    journal_path = property(lambda self: self.path / "events.jsonl", doc="The journal.")

    @classmethod
    def create(
        cls, path: Path, identity: Mapping[str, str], facts: Mapping[str, Any]
    ) -> RunDirectory:
        """Make a new run directory.

        Args:
            path: must not hold a run yet.
            identity: of the application, field by field.
            facts: what else ``run.json`` is to say.

        Raises:
            InputError: if the folder holds a run or other files, or cannot be made.
        """
        directory = cls(path)
        if directory.journal_path.exists():
            raise InputError(
                f"{path}: holds a run already; continue it with --resume {path}, or give another "
                "--output-dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(p.name not in _BEFORE_RUN for p in path.iterdir()):
                raise InputError(f"{path}: is not empty; give an --output-dir that is")
            directory.lock()
            directory._clear()
            (path / "outputs").mkdir()
            directory.write_json("run.json", {"format": FORMAT, **facts, "identity": identity})
        except OSError as error:
            directory.close()
            raise InputError(f"{path}: {error.strerror}") from error
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def reopen(cls, path: Path, identity: Mapping[str, str]) -> RunDirectory:
        """Open the directory of a run that is to go on.

        Raises:
            InputError: if it holds no run, another process runs it, or the application differs from
                the run's in fields that its journal depends on.
        """
        directory = cls(path)
        facts = read_facts(path)
        require_begun(path)
        if changed := differences(facts.get("identity") or {}, identity):
            more = f"; and {len(changed) - SHOWN} more nodes" if len(changed) > SHOWN else ""
            where = facts.get("app_file")
            raise InputError(
                f"{path}: is a run of {facts.get('application')}, which has changed since in "
                f"{'; '.join(changed[:SHOWN])}{more}. Engine arguments, paths, cluster and planner "
                "may be repaired before a run goes on, requests and what they ask may not: give "
                f"the application as it was{f' ({where})' if where else ''}, or another "
                "--output-dir"
            )
        directory.lock()
        return directory

    def _clear(self) -> None:
        """Remove what a run left that was stopped before it began.

        Raises:
            InputError: if there are outputs: they are of something else.
        """
        outputs = self.path / "outputs"
        if outputs.exists() and any(outputs.iterdir()):
            raise InputError(f"{self.path}: is not empty; give an --output-dir that is")
        for name in _BEFORE_RUN - {"run.lock"}:
            file = self.path / name
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything in the directory, and let go of it: the run was never begun."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def lock(self) -> None:
        """Hold the directory until :meth:`close` or the end of the process.

        Raises:
            InputError: if another process does.
        """
        self._lock = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = -1
            raise InputError(f"{self.path}: another process runs in this directory") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.close()
                raise InputError(f"{self.path}: {error.strerror}") from error
            logger.warning(
                "%s: its file system has no locks (%s); see that no other process runs there",
                self.path,
                error.strerror,
            )

    def close(self) -> None:
        """Let go of the directory; safe to call twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write_json(self, name: str, value: object) -> None:
        """Write a file in one step: readers see the old or the new content, never half of it.

        Raises:
            RunError: if the disk is full or fails.
        """
        self.write(name, [to_json(value, indent=1)])

    def write(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a file in one step.

        Raises:
            RunError: if the disk is full or fails.
        """
        path = self.path / name
        try:
            path.parent.mkdir(exist_ok=True)  # nodes of several applications have a folder each
            replace_file(path, parts, sync=True)
        except OSError as error:
            raise disk_error(path, error) from error


def require_begun(path: Path) -> None:
    """Refuse to go on with a run that was stopped before it began.

    Raises:
        InputError: naming the remedy.
    """
    if (path / "run.json").exists() and not any(
        (path / name).exists() for name in ("plan.json", "events.jsonl")
    ):
        raise InputError(
            f"{path}: the run was stopped before it began; start it anew with --output-dir {path}"
        )


def read_facts(path: Path) -> dict[str, Any]:
    """Return what ``run.json`` says of a run directory.

    Raises:
        InputError: if the folder holds no run of this version's format.
    """
    file = path / "run.json"
    if not file.exists():
        raise InputError(
            f"{path}: holds no run (there is no run.json); give the --output-dir of a run"
        )
    facts = read_json(file)
    found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
    if found != FORMAT:
        raise InputError(f"{file}: its format is {found}, this version reads {FORMAT}")
    return dict(facts)
