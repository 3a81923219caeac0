"""``samullm plugins new``: a complete package for a plugin of one's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from samullm_plugin.errors import InputError, suggest
from samullm_plugin.host.hookspecs import INTERFACE_VERSION

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What differs between the kinds.

    Attributes:
        summary: what the generated plugin does.
        contract_module: where the kind's contract suite is.
        contract_class: its name.
        contract_field: what a subclass names the class under test.
        try_it: a command to see the plugin at work.
    """

    summary: str
    contract_module: str
    contract_class: str
    contract_field: str
    try_it: str


SKELETONS = {
    "scheduler": Skeleton(
        "One model at a time, each at the size that finishes it soonest.",
        "scheduler_contract",
        "SchedulerContract",
        "scheduler_class",
        "samullm bench --suite small --schedulers {name},greedy,max-heuristic",
    ),
    "length-estimator": Skeleton(
        "Geometric output lengths, fitted by their mean.",
        "length_contract",
        "LengthEstimatorContract",
        "estimator_class",
        "samullm plugins",
    ),
    "latency-model": Skeleton(
        "Iteration times from a device's nominal figures.",
        "latency_contract",
        "LatencyModelContract",
        "latency_class",
        "samullm plugins",
    ),
    "request-policy": Skeleton(
        "Longest prompts first, on the replica with the least work.",
        "policy_contract",
        "RequestPolicyContract",
        "policy_class",
        "samullm plugins",
    ),
    "executor": Skeleton(
        "Engines on a virtual clock that serve one request at a time.",
        "executor_contract",
        "ExecutorContract",
        "executor_class",
        "samullm plugins",
    ),
}
"""By kind, as in ``samullm plugins``."""


def write_plugin(name: str, kind: str, output: Path) -> list[Path]:
    """Write a package that installs, passes its tests and can be changed from there.

    Args:
        name: of the plugin; the distribution is ``samullm-<name>``.
        kind: of the plugin.
        output: folder that is made for it; must not hold anything yet.

    Returns:
        The files written.

    Raises:
        InputError: for a bad name, an unknown kind, or a folder that is in use.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"plugin name {name!r}: write lower-case letters, digits and single hyphens, a letter "
            "first"
        )
    if kind not in SKELETONS:
        known = ", ".join(SKELETONS)
        raise InputError(f"--kind: unknown kind {kind!r}{suggest(kind, SKELETONS)}; known: {known}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: it exists and is not an empty folder; name another")
    skeleton = SKELETONS[kind]
    package = "samullm_" + name.replace("-", "_")
    values = {
        "name": name,
        "kind": kind,
        "distribution": f"samullm-{name}",
        "package": package,
        "class_name": "".join(part.capitalize() for part in name.split("-")),
        "interface_version": INTERFACE_VERSION,
        "summary": skeleton.summary,
        "contract_module": skeleton.contract_module,
        "contract_class": skeleton.contract_class,
        "contract_field": skeleton.contract_field,
        "try_it": skeleton.try_it.format(name=name),
    }
    targets = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{package}/__init__.py": f"{kind}.py.j2",
        "tests/test_contract.py": "test_contract.py.j2",
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    templates = files("samullm_plugin") / "data" / "templates"
    written = []
    for target, template in targets.items():
        path = output / target
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            source = (templates / template).read_text()
            path.write_text(environment.from_string(source).render(values))
        except OSError as error:
            raise InputError(f"--output {path}: {error.strerror}") from error
        written.append(path)
    return written
