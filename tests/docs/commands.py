"""Runs ``samullm`` commands in processes forked from one that has imported everything.

A documentation page has a dozen commands, each of which would import the same libraries for two
seconds. Started as a script this is that process; the class is the other end.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

SHELL = re.compile(r"[|&;<>$`*?~#(){}]|\[\[|\n(?!$)")

LONGEST_S = 200
"""Seconds that one command may take, which includes compiling the simulator once."""

TIMED_OUT = -signal.SIGALRM
"""What a command ends with that took longer."""


def words_of(script: str) -> list[str] | None:
    """Return the arguments of a ``samullm`` command; None for what needs a shell."""
    script = script.replace("\\\n", " ").strip()
    if not script.startswith("samullm ") or SHELL.search(script):
        return None
    return shlex.split(script)[1:]


class CommandServer:
    """A process that forks a child for each command."""

    def __init__(self) -> None:
        """Start it; it imports while the first command waits."""
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, words: list[str], folder: Path, output: Path, **variables: str) -> int:
        """Run a command and return its exit code; stdout and stderr go to a file together."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"words": words, "folder": str(folder), "output": str(output)}
        # What fixtures have set for this test is not what was set when the process began.
        asked["env"] = {**os.environ, **variables}  # type: ignore[assignment]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs commands has ended"
        code = int(answer)
        assert code != TIMED_OUT, f"samullm {shlex.join(words)}: more than {LONGEST_S} s"
        return code

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _serve() -> None:
    from samullm_plugin.cli.app import COMMANDS
    from samullm_plugin.host.manager import PluginHost

    for command in COMMANDS.values():
        import_module(command.target.partition(":")[0])
    for name in ("planning.planner", "run.run", "run.report", "bench.rows", "api.app", "simulator"):
        import_module(f"samullm_plugin.{name}")
    PluginHost.from_settings()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _carry_out(asked)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _carry_out(asked: dict[str, object]) -> None:
    """Run one command in this process, and end it."""
    from samullm_plugin.cli.app import main

    os.setsid()
    signal.alarm(LONGEST_S)
    os.environ.clear()
    os.environ.update(asked["env"])  # type: ignore[call-overload]
    os.chdir(str(asked["folder"]))
    output = os.open(str(asked["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    code = 70
    try:
        code = main(asked["words"])  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
