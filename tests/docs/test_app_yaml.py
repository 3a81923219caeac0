"""``docs/app-yaml.md`` names every field, and its examples are those that are loaded by tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from samullm_plugin.app import nodespec, rowspec, sampling, spec
from samullm_plugin.app.fields import Section
from samullm_plugin.app.requestlines import RequestLine

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "app-yaml.md").read_text()
SECTIONS = [
    spec.AppSpec,
    spec.ModelSection,
    spec.ArchitectureSection,
    nodespec.NodeSection,
    nodespec.PythonSection,
    nodespec.MessageSection,
    nodespec.RegexSection,
    nodespec.ChoiceSection,
    rowspec.InputSection,
    rowspec.BranchSection,
    rowspec.KeepSection,
    rowspec.ChainSection,
    sampling.SamplingSection,
    spec.ClusterSection,
    spec.GpuSection,
    spec.PlannerSection,
    spec.Component,
    RequestLine,
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_is_documented(section: type[Section]) -> None:
    missing = [
        field.alias or name
        for name, field in section.model_fields.items()
        if f"`{field.alias or name}`" not in TEXT
    ]
    assert not missing


def test_excerpts_are_those_of_the_examples() -> None:
    parts = re.split(r"`(examples/applications/[\w-]+/app\.yaml)`", TEXT)
    shown = set()
    for path, text in zip(parts[1::2], parts[2::2], strict=True):
        file = (ROOT / path).read_text()
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
            assert block in file, f"{path} differs from its excerpt"
            shown.add(path)
    examples = {str(p.relative_to(ROOT)) for p in ROOT.glob("examples/applications/*/app.yaml")}
    assert shown == examples
