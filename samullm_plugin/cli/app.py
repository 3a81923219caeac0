"""The command ``samullm``: a group whose commands are imported when they are chosen.

``samullm --help`` must answer at once, so no other command is imported, and plugins are asked for
commands only if no built-in one has the name; ``samullm plugins`` lists theirs. Errors become exit
codes: 1 the run failed, 2 the input is wrong.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from samullm_plugin.cli.streams import configure_logging, discard, standard_streams
from samullm_plugin.errors import InputError, SamullmError, UnknownNameError, suggest


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is and what it does.

    Attributes:
        target: ``module:name`` of a function with typer annotations, or of a ``typer.Typer`` with
            sub-commands.
        help: one line for ``samullm --help``.
    """

    target: str
    help: str


COMMANDS = {
    "bench": Command("samullm_plugin.cli.bench:app", "Compare schedulers and other plugins."),
    "plan": Command("samullm_plugin.cli.plan:plan", "Plan an application."),
    "compare": Command("samullm_plugin.cli.compare:compare", "Plan by several schedulers."),
    "run": Command("samullm_plugin.cli.run:run", "Run an application on engines."),
    "report": Command("samullm_plugin.cli.report:report", "Show a run on one HTML page."),
    "export": Command(
        "samullm_plugin.cli.export:export", "Write inputs and outputs of a run as one table."
    ),
    "simulate": Command(
        "samullm_plugin.cli.simulate:simulate", "Simulate one engine, step for step as vLLM."
    ),
    "validate": Command(
        "samullm_plugin.cli.validate:validate", "Check an application before it is planned."
    ),
    "model": Command(
        "samullm_plugin.cli.model:model", "Show what a model is, and on which GPUs it fits."
    ),
    "profile": Command(
        "samullm_plugin.cli.profile:app", "Learn models from measurements, and check them."
    ),
    "init": Command("samullm_plugin.cli.init:init", "Write an application to start from."),
    "preview": Command("samullm_plugin.cli.preview:preview", "Show what the models will be asked."),
    "cache": Command("samullm_plugin.cli.cache:app", "Outputs that are kept for later runs."),
    "schema": Command("samullm_plugin.cli.schema:schema", "Print the JSON Schema of app.yaml."),
    "plugins": Command("samullm_plugin.cli.plugins:app", "List plugins and whether they work."),
    "collect-env": Command(
        "samullm_plugin.cli.collect_env:collect_env", "Print versions and hardware for a report."
    ),
}
"""Every built-in command, in the order of ``--help``."""

SHIPPED_COMMANDS = {
    "doctor": ("samullm_vllm", "Examine this machine, and run a tiny model."),
    "cluster": ("samullm_ray", "Print a Ray cluster as a section of app.yaml."),
}
"""Commands of shipped plugins: package and help. Asking all plugins takes too long for ``--help``;
the commands themselves come from the plugins like any other's."""

GLOBAL_FLAGS = {
    "-v": "verbose",
    "-vv": "very_verbose",
    "--verbose": "verbose",
    "-q": "quiet",
    "--quiet": "quiet",
    "--traceback": "traceback",
}
"""Options accepted before and after the command's name."""

_EPILOG = "Options of every command: -v/--verbose (-vv for more), -q/--quiet, --traceback."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 it failed, 2 the input is wrong.

    Args:
        arguments: without the program's name; those of this process by default.
    """
    # Arrow's own allocator keeps twice as much memory of a table that is read once
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    with standard_streams():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    """Run a command line on streams that can be used."""
    flags, words = _split_flags(arguments)
    configure_logging(
        verbosity=2 if "very_verbose" in flags else int("verbose" in flags),
        quiet="quiet" in flags,
    )
    try:
        code = _run(words or ["--help"])
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)  # whoever read the output has left
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("samullm: interrupted\n")
        return 130
    except Exception as error:
        if "traceback" in flags:
            traceback.print_exc()
        message, code = _explain(error)
        sys.stderr.write(f"samullm: {message}\n")
        if isinstance(error, OSError) and error.filename is None:
            discard(sys.stdout)
    return code if isinstance(code, int) else 0


def _run(words: list[str]) -> object:
    """Run the command that the words name; return what it returns, or the code it ends with."""
    commands = typer.main.get_command(app)
    try:
        with commands.make_context("samullm", words) as context:
            return commands.invoke(context)
    except typer.Exit as end:
        return end.exit_code


def _split_flags(arguments: Sequence[str]) -> tuple[set[str], list[str]]:
    """Take the global flags out, wherever they stand before a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = {GLOBAL_FLAGS[word] for word in arguments[:end] if word in GLOBAL_FLAGS}
    words = [word for word in arguments[:end] if word not in GLOBAL_FLAGS]
    return flags, [*words, *arguments[end:]]


class _LazyCommand(TyperCommand):
    """A command known by name and help, found when it is chosen."""

    def __init__(self, name: str, find: Callable[[str], Any], *, help: str) -> None:
        """Keep what finds the command by its name."""
        super().__init__(name, help=help)
        self._find = find

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Find the command, and let it read its options.

        Raises:
            InputError: if an option that has one value is given several.
        """
        found = self._find(str(self.name))
        _check_given_once(found, str(self.name), args)
        return found.make_context(info_name, args, parent, **extra)


def _check_given_once(command: Any, name: str, words: Sequence[str]) -> None:
    """Refuse an option of one value that is given several: all but the last would be dropped."""
    once: dict[str, str] = {}
    often: set[str] = set()
    commands = [command]
    while commands:
        one = commands.pop()
        commands += getattr(one, "commands", {}).values()
        for option in one.params:
            if option.param_type_name != "option":
                continue
            if option.multiple or option.is_flag or option.count:
                often.update(option.opts)
            else:
                once.update(dict.fromkeys(option.opts, max(option.opts, key=len)))
    end = words.index("--") if "--" in words else len(words)
    given = Counter(
        once[word]
        for word in (w.partition("=")[0] for w in words[:end])
        if word in once and word not in often
    )
    for option_name, count in given.items():
        if count > 1:
            raise InputError(
                f"{option_name} is given {count} times and has one value: only the last would "
                f"count; give it once (see `samullm {name} --help`)"
            )


def _built_in(name: str) -> Any:
    """Import a built-in command and return it."""
    module, _, attribute = COMMANDS[name].target.partition(":")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(epilog=_EPILOG)(found)
        found = app
    return typer.main.get_command(found)


def _of_plugin(name: str) -> Any:
    """Return the command of a plugin.

    Raises:
        InputError: if there is none, or more than one plugin has it.
    """
    from samullm_plugin.host.manager import PluginHost

    host = PluginHost.from_settings()
    try:
        return host.resolve("command", name).value
    except UnknownNameError as error:
        close = suggest(name, [*COMMANDS, *host.names("command")])
        raise InputError(f"unknown command {name!r}{close}; see `samullm --help`") from error


class _Commands(TyperGroup):
    """The built-in commands, and behind them those of plugins."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the built-in commands and those of shipped plugins that are installed."""
        shipped = [n for n, (package, _) in SHIPPED_COMMANDS.items() if find_spec(package)]
        return [*COMMANDS, *shipped]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name: a built-in one, else a plugin's.

        Raises:
            InputError: if there is none, or more than one plugin has it.
        """
        if cmd_name in COMMANDS:
            return _LazyCommand(cmd_name, _built_in, help=COMMANDS[cmd_name].help)
        if cmd_name in SHIPPED_COMMANDS:
            return _LazyCommand(cmd_name, _of_plugin, help=SHIPPED_COMMANDS[cmd_name][1])
        return _of_plugin(cmd_name)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,  # importing rich takes longer than everything else here
    pretty_exceptions_enable=False,
    help="Plan, simulate and run offline inference of multi-LLM applications.",
    epilog="`samullm plugins` also lists commands that other plugins add.",
)


def _print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from importlib.metadata import version

        typer.echo(version("samullm-plugin"))
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more; -vv: all.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    """Describe the options of every command; all but ``--version`` were taken out before."""


_FULL = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)
"""What a stream answers that takes no more; files name themselves in their errors."""


def _explain(error: Exception) -> tuple[str, int]:
    """Return message and exit code of an error."""
    if isinstance(error, SamullmError):
        return str(error), error.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer: wrong usage
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "samullm"
        return f"{error.format_message().rstrip('.')} (see `{path} --help`)", error.exit_code
    if isinstance(error, typer.Abort):
        return "aborted", 1
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        from samullm_plugin.errors import describe_validation

        return describe_validation(error), 2
    if isinstance(
        error, FileNotFoundError | IsADirectoryError | PermissionError | NotADirectoryError
    ):
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 1
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"standard output: {error.strerror}", 1
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"internal error: {text}; run it again with --traceback to see where", 1
