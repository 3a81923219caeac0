"""Applications by what users write: a file, or the name of a bundled one with its options."""

from __future__ import annotations

from pathlib import Path

import yaml

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application, looks_like_file
from samullm_plugin.app.requestlines import TokenCounter
from samullm_plugin.checkpoints.tokenizing import OwnTokenizers
from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.user_functions import check_functions, resolve_schema


def find_application(
    host: PluginHost,
    name: str,
    *,
    count_tokens: TokenCounter | None = None,
    limit: int | None = None,
) -> LoadedApplication:
    """Return an application.

    Args:
        host: knows the bundled applications and those of other plugins.
        name: path of an ``app.yaml``, or a name, with options as in
            ``ensembling:requests=10000,max_tokens=512``.
        count_tokens: counts tokens; None: by the models' own tokenizers, where they are here.
        limit: take no more rows than this of each table of requests.

    Raises:
        InputError: for an unknown name or option, a faulty file, or a limit on an application
            that has no table.
    """

    def bundled(text: str) -> LoadedApplication:
        return build_named(host, text)

    if looks_like_file(name) or Path(name).is_file():
        counter = OwnTokenizers() if count_tokens is None else count_tokens
        loaded = load_application(
            Path(name),
            bundled=bundled,
            count_tokens=counter,
            limit=limit,
            resolve_schema=resolve_schema,
        )
        check_functions(loaded)
        return loaded
    if limit is not None:
        raise InputError(
            f"--limit: {name} is a bundled application and has no table; give it fewer requests by "
            f"its options, as in {name.partition(':')[0]}:requests={limit}"
        )
    return bundled(name)


def build_named(host: PluginHost, text: str) -> LoadedApplication:
    """Return a bundled application.

    Raises:
        InputError: for an unknown name or a wrong option.
    """
    name, options = parse_named(text)
    source = host.create("application", name, options)
    return LoadedApplication(source.build(), source.cluster(), output_tokens=source.output_tokens())


def parse_named(text: str) -> tuple[str, dict[str, object]]:
    """Return name and options of ``name:option=value,option=value``.

    The name may itself be ``distribution:name``.

    Raises:
        InputError: for an option without a value.
    """
    name, separator, rest = text.rpartition(":")
    if not separator or "=" not in rest:
        return text, {}
    options: dict[str, object] = {}
    for part in rest.split(","):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not (key and equals and value):
            raise InputError(
                f"application {text!r}: {part!r} is not option=value; write for example "
                "ensembling:requests=10000,max_tokens=512"
            )
        if key in options:
            raise InputError(f"application {text!r}: the option {key!r} is given twice")
        options[key] = yaml.safe_load(value)
    return name, options
