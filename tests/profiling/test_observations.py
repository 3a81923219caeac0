"""Observations of output lengths: what is read, and what is said of wrong lines."""

from __future__ import annotations

import json

import pytest

from samullm_plugin import InputError
from samullm_plugin.profiling.observations import read_observations


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return [path]


def line(**changes):
    return {"model": "org/a", "prompt_tokens": 5, "output_tokens": 9} | changes


def test_lines_are_grouped_by_model_and_task(tmp_path):
    files = write(
        tmp_path / "o.jsonl",
        line(prompt="hello", time="kept by the user"),
        "",
        line(task="summary", max_tokens=9),
        line(task="summary", max_tokens=10, prompt="x"),
        line(task="summary", censored=True),
        line(prompt="again", output_tokens=20),
    )
    first, second = read_observations(files)
    assert (first.observations.model, first.observations.task) == ("org/a", "")
    assert first.observations.prompts == ("hello", "again")
    assert first.observations.output_tokens.tolist() == [9, 20]
    assert second.observations.prompts is None  # one of the three has no text
    assert second.observations.censored.tolist() == [True, False, True]
    assert second.max_tokens.tolist() == [9, 10, 0]


def test_several_files_are_one(tmp_path):
    files = write(tmp_path / "a", line()) + write(tmp_path / "b", line(), line(model="b"))
    assert [len(g) for g in read_observations(files)] == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: must be a JSON object, not list"),
        (line(output_tokens=0), "line 2: output_tokens"),
        (line(output_tokens=1.5), "line 2: output_tokens"),
        (line(output_tokens="7"), "line 2: output_tokens"),
        (line(prompt_tokens=-1), "line 2: prompt_tokens"),
        ({"model": "a", "prompt_tokens": 4}, "line 2: output_tokens: missing"),
        (line(max_tokens=8), "line 2: output_tokens is 9, above max_tokens 8"),
        (line(promt="x"), "line 2: unknown field 'promt' (did you mean 'prompt'?)"),
        (line(censored="perhaps"), "line 2: censored"),
        (line(model=""), "line 2: model"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, message):
    files = write(tmp_path / "o.jsonl", line(), text)
    with pytest.raises(InputError) as error:
        read_observations(files)
    assert f"{files[0]} {message}" in str(error.value)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such observations file"):
        read_observations([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match="it holds no observations"):
        read_observations(write(tmp_path / "empty.jsonl", ""))
