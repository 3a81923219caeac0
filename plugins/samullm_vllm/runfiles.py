"""The files of a run's engines: their logs, and what lasts only as long as they do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO

from samullm_vllm.scratch import make_scratch, remove_scratch


class RunFiles:
    """Logs in the run directory, and a scratch folder.

    Attributes:
        scratch: the scratch folder; engines have it as their ``TMPDIR``.
        kept: logs stay when the run is over.
    """

    def __init__(self, run_dir: Path | None) -> None:
        """Make the folders.

        Args:
            run_dir: logs go to its ``logs``; None: to the scratch folder.
        """
        self.scratch = make_scratch()
        self.kept = run_dir is not None
        self._log_dir = (run_dir or self.scratch) / "logs"
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
        return self.scratch / f"{self.scratch.name}-{self._meetings}"

    def close(self) -> None:
        """Close the logs and remove the scratch folder."""
        for file in self._open:
            file.close()
        self._open.clear()
        remove_scratch(self.scratch)
