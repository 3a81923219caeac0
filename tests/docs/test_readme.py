"""Blocks of the README and the documentation are run, in order, in a folder like the checkout.

- ``console`` blocks: lines behind ``$ `` are run (a line ending in ``\\`` goes on). What stands
  below is compared with stdout and stderr together; ``...`` stands for anything in a line, and
  alone on a line for any lines.
- ``bash`` blocks are run whole.
- ``<!-- file: NAME -->`` above a block of any language writes it to that file first.
- ``<!-- not run: REASON -->`` above a block leaves it out.
- Commands that set a machine up (``git clone``, ``cd``, ``pip install``) are left out; a ``make``
  target must exist, and is run by CI itself.
"""

from __future__ import annotations

import atexit
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from tests.docs.commands import CommandServer, words_of

REPOSITORY = Path(__file__).parents[2]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"  # run by tests/packaging, which really installs
DOCUMENTS = [
    REPOSITORY / "README.md",
    *(p for p in sorted((REPOSITORY / "docs").rglob("*.md")) if p != TUTORIAL),
]
SET_UP = re.compile(r"(git clone|cd|pip install|python3? -m (venv|pip)|source|nvidia-smi)\b")
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file|not run): (?P<argument>[^\n]+?) -->\n\n?)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Step:
    """A file to write, or a command to run and what it should print."""

    line: int
    file: str | None
    text: str
    expected: str | None = None


def read_steps(document: str) -> Iterator[Step]:
    """Yield what a document asks for, in its order."""
    for match in BLOCK.finditer(document):
        line = document.count("\n", 0, match.start("text")) + 1
        if match["mark"] == "not run":
            continue
        if match["mark"] == "file":
            yield Step(line, match["argument"], match["text"])
        elif match["language"] in ("bash", "sh"):
            yield Step(line, None, match["text"])
        elif match["language"] == "console":
            yield from _console(match["text"], line)


def _console(text: str, line: int) -> Iterator[Step]:
    pattern = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
    for command in pattern.finditer(text):
        at = line + text.count("\n", 0, command.start())
        yield Step(at, None, command[1], command[2] if command[2].strip() else None)


def run_step(step: Step, folder: Path) -> None:
    """Do what a step asks.

    Raises:
        AssertionError: if a command fails or prints something else.
    """
    if step.file is not None:
        path = folder / step.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step.text)
        return
    lines = [line for line in step.text.splitlines() if not SET_UP.match(line)]
    for line in lines:
        if target := re.match(r"make +([\w-]+)", line):
            makefile = (REPOSITORY / "Makefile").read_text()
            assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), f"no such target: {line}"
    script = "\n".join(line for line in lines if not line.startswith("make"))
    if not script.strip():
        return
    code, printed = _run(script, folder)
    assert code == 0, f"line {step.line}: {script}\n{printed}"
    if step.expected is not None:
        assert matches(step.expected, printed), (
            f"line {step.line}: {script}\nexpected:\n{step.expected}\nprinted:\n{printed}"
        )


@cache
def _server() -> CommandServer:
    server = CommandServer()
    atexit.register(server.close)
    return server


def _run(script: str, folder: Path) -> tuple[int, str]:
    """Run a command and return its exit code and what it printed."""
    words = words_of(script)
    if words is not None:
        with NamedTemporaryFile("r", encoding="utf-8") as output:
            code = _server().run(words, folder, Path(output.name), COLUMNS="160")
            return code, output.read()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout


def matches(expected: str, printed: str) -> bool:
    """Whether an output is as shown, spaces at the ends of lines aside."""
    parts = []
    for line in expected.rstrip().splitlines():
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            pieces = [re.escape(piece) for piece in line.rstrip().split("...")]
            parts.append(".*".join(pieces) + r"[ ]*\n")
    return re.fullmatch("".join(parts), printed.rstrip() + "\n") is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_what_a_document_shows_works(document: Path, tmp_path: Path) -> None:
    for entry in REPOSITORY.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    for step in read_steps(document.read_text()):
        run_step(step, tmp_path)


SAMPLE = """
<!-- file: a/b.txt -->
```text
one
```

```console
$ cat a/b.txt \\
    a/b.txt
one
...
$ make bench
$ echo quiet
```

<!-- not run: needs a GPU -->
```bash
exit 1
```

```python
raise SystemExit("not for the shell")
```

```bash
pip install nothing
test -f a/b.txt
```
"""


def test_steps_are_read_in_order(tmp_path) -> None:
    steps = list(read_steps(SAMPLE))
    assert [(s.line, s.file) for s in steps] == [
        (4, "a/b.txt"),
        (8, None),
        (12, None),
        (13, None),
        (26, None),
    ]
    assert steps[1].expected == "one\n...\n"
    assert [s.expected for s in steps[2:]] == [None, None, None]
    for step in steps:
        run_step(step, tmp_path)


@pytest.mark.parametrize(
    "block",
    [
        "```bash\nfalse\n```\n",
        "```bash\nfalse | true\n```\n",
        "```console\n$ echo one\ntwo\n```\n",
        "```console\n$ make no-such-target\n```\n",
        "```console\n$ samullm no-such-command\n```\n",
    ],
)
def test_what_does_not_work_is_noticed(block, tmp_path) -> None:
    (step,) = read_steps(block)
    with pytest.raises(AssertionError):
        run_step(step, tmp_path)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a ... c\n", "a b c\n", True),
        ("a\n...\nd", "a\nb\nc\nd\n", True),
        ("a\n...\nd", "a\nb\nc\n", False),
        ("a", "a\nb", False),
        ("1.5 s", "1x5 s", False),
    ],
)
def test_outputs_are_compared(expected, printed, same) -> None:
    assert matches(expected, printed) is same
