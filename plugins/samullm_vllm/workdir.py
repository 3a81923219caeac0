"""The files of a run's engines: their logs, and a folder of what lasts only as long as they do."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import IO

PREFIX = "samullm-"


def remove_temporary(folder: str | Path) -> None:
    """Remove a run's temporary folder, and the shared memory that ranks have named after it."""
    path = Path(folder)
    if not path.name.startswith(PREFIX):
        return
    for left in Path("/dev/shm").glob(f"{path.name}-*"):
        left.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


class WorkDir:
    """Logs in the run directory, and a temporary folder.

    Attributes:
        temporary: the temporary folder; engines have it as their ``TMPDIR``.
        kept: logs stay when the run is over.
    """

    def __init__(self, run_dir: Path | None) -> None:
        """Make the folders.

        Args:
            run_dir: logs go to its ``logs``; None: to the temporary folder.
        """
        self.temporary = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.kept = run_dir is not None
        self._log_dir = (run_dir or self.temporary) / "logs"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._open: list[IO[bytes]] = []
        self._meetings = 0

    def open_log(self, name: str) -> IO[bytes]:
        """Return a log to append to."""
        safe = re.sub(r"[^\w.-]+", "_", name)
        file = (self._log_dir / f"{safe}.log").open("ab")
        self._open.append(file)
        return file

    def rendezvous(self) -> Path:
        """Return a new file for ranks to meet by; vLLM names their shared memory by it."""
        self._meetings += 1
        return self.temporary / f"{self.temporary.name}-{self._meetings}"

    def close(self) -> None:
        """Close the logs and remove the temporary folder."""
        for file in self._open:
            file.close()
        self._open.clear()
        remove_temporary(self.temporary)
