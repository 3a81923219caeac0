"""Tables that Python code hands over: nothing of them is lost, whatever types they hold."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import pytest

import samullm_plugin as sl
from samullm_plugin.app.rowtables import json_value

Q = ["a", "b", "c"]


def application(data: object, prompt: str = "{{ q }}", **options: Any) -> sl.App:
    app = sl.App("t", models={"m": "THUDM/chatglm3-6b"}, cluster={"gpus": 1, "gpu": "A100-80GB"})
    app.llm("n", model="m", data=data, prompt=prompt, max_tokens=4, **options)
    return app


def fields(app: sl.App, limit: int | None = None) -> list[dict[str, Any]]:
    sources = app.load(limit).sources
    assert sources is not None
    return [dict(f) for f in sources[0].fields]


def test_rows_need_not_have_the_same_fields() -> None:
    data = [{"q": "a"}, {"q": "b", "more": 1}, {"q": "c", "more": "text", 4: (1, None)}]
    assert fields(application(data)) == [
        {"q": "a"},
        {"q": "b", "more": 1},
        {"q": "c", "more": "text", "4": [1, None]},
    ]


def test_what_is_handed_over_may_be_changed_afterwards() -> None:
    data = [{"q": "a"}]
    loaded = application(data).load()
    data[0]["q"] = "b"
    assert loaded.sources is not None
    assert loaded.sources[0].fields[0] == {"q": "a"}


def pandas_mixed() -> Any:
    import pandas as pd

    return pd.DataFrame({"q": Q, "m": [1, "x", None], "f": [0.5, np.nan, 2]})


def test_a_column_of_several_types_keeps_them() -> None:
    expected = [
        {"q": "a", "m": 1, "f": 0.5},
        {"q": "b", "m": "x", "f": None},
        {"q": "c", "m": None, "f": 2.0},
    ]
    assert fields(application(pandas_mixed())) == expected
    columns = {"q": Q, "m": [1, "x", None], "f": [0.5, None, 2.0]}
    assert fields(application(columns)) == expected


def test_rows_are_written_down_as_lines(tmp_path: Path) -> None:
    for name, data in (("frame", pandas_mixed()), ("rows", [{"q": "a"}, {"q": "b", "x": 1}])):
        app = application(data)
        path = app.to_yaml(tmp_path / name / "app.yaml")
        assert sorted(p.name for p in path.parent.iterdir()) == ["app.yaml", "n.jsonl"]
        assert fields(sl.App.from_yaml(path)) == fields(app)


def test_an_index_with_a_name_is_a_column() -> None:
    import pandas as pd

    frame = pd.DataFrame({"id": ["x", "y", "z"], "q": Q}).set_index("id")
    loaded = application(frame).load()
    assert loaded.sources is not None
    assert loaded.sources[0].ids == ("x", "y", "z")
    loaded = application(frame.assign(m=[1, "x", None])).load()
    assert loaded.sources is not None
    assert loaded.sources[0].ids == ("x", "y", "z")
    unnamed = pd.DataFrame({"q": Q}, index=["x", "y", "z"])
    assert fields(application(unnamed))[0] == {"q": "a"}


def test_ids_that_are_numbers() -> None:
    import pandas as pd

    frame = pd.DataFrame({"id": [3, None, 12], "q": Q})  # which makes floats of them
    loaded = application(frame).load()
    assert loaded.sources is not None
    assert loaded.sources[0].ids == ("3", "line-2", "12")
    with pytest.raises(sl.InputError, match=r"data of node n, row 1: id: .*not 0\.5"):
        application([{"id": 0.5, "q": "a"}]).load()


def test_types_of_pandas() -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "q": pd.Categorical(Q),
            "period": pd.period_range("2020-01", periods=3, freq="M"),
            "when": pd.to_datetime(["2020-01-01", None, "2021-02-03T04:05"], format="mixed"),
            "count": pd.array([1, None, 3], dtype="Int64"),
            "price": [decimal.Decimal("1.10")] * 3,
            "nested": [{"x": [1, 2]}, {"x": []}, None],
        }
    )
    assert fields(application(frame)) == [
        {"q": "a", "period": "2020-01", "when": "2020-01-01T00:00:00", "count": 1,
         "price": "1.10", "nested": {"x": [1, 2]}},
        {"q": "b", "period": "2020-02", "when": None, "count": None, "price": "1.10",
         "nested": {"x": []}},
        {"q": "c", "period": "2020-03", "when": "2021-02-03T04:05:00", "count": 3,
         "price": "1.10", "nested": None},
    ]  # fmt: skip


def test_types_of_polars() -> None:
    import polars as pl

    frame = pl.DataFrame(
        {"q": Q, "kind": pl.Series(["x", "y", "x"], dtype=pl.Enum(["x", "y"])), "l": [["a"]] * 3}
    )
    expected = [{"q": q, "kind": k, "l": ["a"]} for q, k in zip(Q, ("x", "y", "x"), strict=True)]
    for table in (frame, frame.lazy()):
        assert fields(application(table)) == expected
        assert fields(application(table), limit=2) == expected[:2]
    some = fields(application(frame, where={"kind": "x"}))
    assert some == [expected[0], expected[2]]


def test_columns_that_arrow_takes_no_rows_of(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.feather

    table = pa.table(
        {
            "q": pa.array(Q, pa.string_view()),
            "run": pc.run_end_encode(pa.array(["x", "x", "y"])),
        }
    )
    if hasattr(pa, "uuid"):  # pyarrow 18 and newer
        numbers = pa.array([uuid.UUID(int=k).bytes for k in range(3)], pa.uuid())
        table = table.append_column("number", numbers)
        assert fields(application(table))[2]["number"] == str(uuid.UUID(int=2))
    assert [f["run"] for f in fields(application(table), limit=2)] == ["x", "x"]
    with (
        pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):  # as polars writes its texts
        writer.write_table(table)
    assert [f["q"] for f in fields(application(tmp_path / "t.arrow"), limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.array([[1.5], [2.5]]), [[1.5], [2.5]]),
        (np.datetime64("2020-01-02"), "2020-01-02"),
        (datetime.timedelta(hours=1), 3600.0),
        ({1: np.bool_(True)}, {"1": True}),
    ],
)
def test_values_that_are_not_quite_json(value: object, expected: object) -> None:
    assert json_value(value) == expected


def series() -> Any:
    import pandas as pd

    return pd.Series(Q)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "data of node n: it holds no requests"),
        (lambda: ["a"], r"data of node n, row 1: is a str; a row is a mapping of fields"),
        (lambda: iter([{"q": "a"}, "b"]), r"data of node n, row 2: is a str; a row is a mapping"),
        (lambda: 5, "a int cannot be read as a table"),
        (series, "a Series cannot be read as a table"),
        (lambda: [{"q": "a\ud800"}], "row 1: cannot be written as JSON: holds half of a UTF-16"),
        (lambda: [{"q": object()}], "row 1: the field 'q' holds object, which no prompt can take"),
        (lambda: {"q": Q, "m": [1, "x"]}, "its columns are of several lengths"),
        (lambda: [{"id": 1, "q": "a"}, {"id": 1.0, "q": "b"}], "row 2: the id '1' is already that"),
    ],
)
def test_what_is_no_table(make: Callable[[], object], message: str) -> None:
    with pytest.raises(sl.InputError, match=message):
        application(make()).load()


def test_a_bad_row_costs_one_row(tmp_path: Path) -> None:
    data = [{"q": "a"}, {"q": "b", "x": "\ud800"}, {"q": "c", "x": object()}, {"q": "d"}]
    app = sl.App(
        "t",
        models={"m": "THUDM/chatglm3-6b"},
        cluster={"gpus": 1, "gpu": "A100-80GB"},
        on_bad_row="skip",
    )
    app.llm("n", model="m", data=data, prompt="{{ q }}", max_tokens=4)
    loaded = app.load()
    assert loaded.app.nodes[0].requests.probability.tolist() == [1, 0, 0, 1]
    with pytest.raises(sl.InputError, match="data of node n, row 2: cannot be written as JSON"):
        app.to_yaml(tmp_path / "app.yaml")


class Model(pydantic.BaseModel):
    q: str
    day: datetime.date = datetime.date(2026, 1, 2)


@dataclasses.dataclass
class Data:
    q: str
    more: list[Model]


class Named(NamedTuple):
    q: str
    n: int


def test_rows_that_are_objects() -> None:
    data = [Model(q="a"), Data("b", [Model(q="x")]), Named("c", 3), {"q": "d", "m": Model(q="y")}]
    day = "2026-01-02"
    assert fields(application(data)) == [
        {"q": "a", "day": day},
        {"q": "b", "more": [{"q": "x", "day": day}]},
        {"q": "c", "n": 3},
        {"q": "d", "m": {"q": "y", "day": day}},
    ]


def arrow_dataset(folder: Path) -> Any:
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet

    for k, q in enumerate(Q):
        pa.parquet.write_table(pa.table({"q": [q]}), folder / f"{k}.parquet")
    return pa.dataset.dataset(folder)


def reader(folder: Path) -> Any:
    import pyarrow as pa

    return pa.table({"q": Q}).to_reader()


@pytest.mark.parametrize(
    "made",
    [
        lambda _: ({"q": q} for q in Q),
        lambda _: {q: {"q": q} for q in Q}.values(),
        lambda _: map(dict, ([("q", q)] for q in Q)),
        lambda _: np.array([(q,) for q in Q], dtype=[("q", "U3")]),
        arrow_dataset,
        lambda folder: arrow_dataset(folder).scanner(),
        reader,
    ],
    ids=["generator", "values", "map", "records", "dataset", "scanner", "reader"],
)
def test_what_can_be_read_once_is_there_for_plan_and_run(tmp_path: Path, made: Any) -> None:
    app, data = application(made(tmp_path)), made(tmp_path)
    app.llm("again", model="m", data=data, prompt="{{ q }}", max_tokens=4)
    app.llm("same", model="m", data=data, prompt="{{ q }}", max_tokens=4)  # one table, read once
    for _ in range(2):
        assert [f["q"] for f in fields(app)] == Q
        sources = app.load().sources
        assert sources is not None
        assert [[f["q"] for f in s.fields] for s in sources] == [Q, Q, Q]


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_single_column_is_told_how_to_be_a_table(package: str) -> None:
    column = pytest.importorskip(package).Series(Q)
    with pytest.raises(sl.InputError, match=r"data of node n, .*one column: give its to_frame\(\)"):
        application(column).load()
