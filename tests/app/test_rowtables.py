"""Tables of requests in every format: the same rows give the same application."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import build_application, load_application
from samullm_plugin.app.spec import AppSpec
from samullm_plugin.errors import InputError

ROWS = [
    {"pid": "007", "instruction": "Say hello", "lang": "en", "level": 3, "score": 0.5},
    {
        "pid": "008",
        "instruction": 'Quote "this",\nthen go on',
        "lang": "de",
        "level": 4,
        "score": 1.0,
    },
    {"pid": "009", "instruction": "Grüße", "lang": "en", "level": 5, "score": None},
]
NAMES = {"id": "pid", "rename": {"instruction": "prompt"}}


def spec(requests: object) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "t",
        "models": {"a": {"model": "THUDM/chatglm3-6b"}},
        "nodes": {"n": {"model": "a", "requests": requests, "sampling_params": {"max_tokens": 8}}},
    }


def loaded(folder: Path, requests: object, **options: Any) -> LoadedApplication:
    path = folder / "app.yaml"
    if "tables" in options:
        return build_application(AppSpec.model_validate(spec(requests)), path, **options)
    path.write_text(json.dumps(spec(requests)))
    return load_application(path, **options)


def fields(app: LoadedApplication) -> list[dict[str, Any]]:
    assert app.sources is not None
    return [dict(f) for f in app.sources[0].fields]


def write(folder: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.feather
    import pyarrow.parquet

    path, table = folder / name, pa.Table.from_pylist(ROWS)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()
    if name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".jsonl.zst"):
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines)
    elif name.endswith(".csv.gz"):
        pyarrow.csv.write_csv(table, folder / "plain")
        path.write_bytes(gzip.compress((folder / "plain").read_bytes()))
    elif name.endswith(".csv"):
        pyarrow.csv.write_csv(table, path)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif name.endswith(".feather"):
        pyarrow.feather.write_feather(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif name == "shards":
        path.mkdir()
        (path / "_SUCCESS").touch()
        for k in range(3):
            (path / "sub").mkdir(exist_ok=True)
            pyarrow.parquet.write_table(table.slice(k, 1), path / "sub" / f"{k}.parquet")
    elif name == "saved":  # as datasets' save_to_disk writes it
        (path / "train").mkdir(parents=True)
        (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
        (path / "train" / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
        with pa.ipc.new_stream(path / "train" / "data-00000-of-00001.arrow", table.schema) as s:
            s.write_table(table)


@pytest.mark.parametrize(
    "name",
    [
        "r.jsonl",
        "r.jsonl.gz",
        "r.jsonl.zst",
        "r.csv",
        "r.csv.gz",
        "r.parquet",
        "r.feather",
        "r.arrow",
        "shards",
        "saved",
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    key = "dataset" if name == "saved" else "file"
    app = loaded(tmp_path, {key: name, **NAMES})
    expected = [
        {**{("prompt" if n == "instruction" else n): v for n, v in r.items()}, "id": r["pid"]}
        for r in ROWS
    ]
    found = fields(app)
    assert found == expected
    assert app.sources is not None
    assert app.sources[0].ids == ("007", "008", "009")


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow", "rows", "columns"])
def test_tables_in_memory(tmp_path: Path, kind: str) -> None:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    columns = {n: [r[n] for r in ROWS] for n in ROWS[0]}
    table = {
        "pandas": lambda: pd.DataFrame(ROWS)[lambda d: d.level > 0],
        "polars": lambda: pl.DataFrame(ROWS),
        "arrow": lambda: pa.table(columns),
        "rows": lambda: ROWS,
        "columns": lambda: columns,
    }[kind]()
    app = loaded(tmp_path, {"file": "n.parquet", **NAMES}, tables={"n.parquet": table})
    assert [f["prompt"] for f in fields(app)] == [r["instruction"] for r in ROWS]
    assert [f["level"] for f in fields(app)] == [3, 4, 5]
    assert "__index_level_0__" not in fields(app)[0]


def test_where_and_limit(tmp_path: Path) -> None:
    write(tmp_path, "r.parquet")
    table = {"file": "r.parquet", **NAMES, "where": {"lang": "en"}}
    assert [f["id"] for f in fields(loaded(tmp_path, table))] == ["007", "009"]
    assert [f["id"] for f in fields(loaded(tmp_path, {**table, "limit": 1}))] == ["007"]
    assert [f["id"] for f in fields(loaded(tmp_path, table, limit=1))] == ["007"]


def test_cells_keep_what_was_written(tmp_path: Path) -> None:
    """Numbers that would come back otherwise stay texts; columns are of one type throughout."""
    (tmp_path / "r.csv").write_text(
        "id,prompt,zip,year,share,flag,mixed\n"
        "1,a,01234,1999,0.5,true,1\n2,b,98765,2001,3,false,x\n3,,00001,,1e3,true,\n"
    )
    found = fields(loaded(tmp_path, {"file": "r.csv", "where": {"id": ["1", "2"]}}))
    assert found[0] == {
        "id": "1", "prompt": "a", "zip": "01234", "year": 1999, "share": 0.5, "flag": True,
        "mixed": "1",
    }  # fmt: skip
    assert found[1]["mixed"] == "x"


def test_values_that_json_lacks(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa

    rows = pa.table(
        {
            "prompt": ["a"],
            "when": pa.array([datetime.datetime(2024, 5, 1, 12)]),
            "pic": pa.array([{"bytes": b"\x89PNG...", "path": "x.png"}]),
            "tags": pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64())),
            "pairs": pa.array([[(1, "x")]], pa.map_(pa.int64(), pa.string())),
            "bytes": pa.array(["Grüße\n".encode()]),
        }
    )
    found = fields(loaded(tmp_path, {"file": "m.parquet"}, tables={"m.parquet": rows}))[0]
    assert found["when"] == "2024-05-01T12:00:00"
    assert found["pic"].startswith("data:image/png;base64,")
    assert found["tags"] == {"a": 1, "b": None}
    assert found["pairs"] == [[1, "x"]]
    assert found["bytes"] == "Grüße\n"
    rows = rows.append_column("raw", pa.array([b"\x00\x01"]))
    with pytest.raises(InputError, match="data of node m, row 1: the column 'raw' holds bytes"):
        loaded(tmp_path, {"file": "m.parquet"}, tables={"m.parquet": rows})


def test_columns_with_dictionaries(tmp_path: Path) -> None:
    """As pandas' categories are in Arrow, also in lists."""
    import pyarrow as pa

    words = pa.array(["a", "b", "a"]).dictionary_encode()
    lists = pa.ListArray.from_arrays([0, 1, 3, 3], words)
    table = pa.table({"prompt": words, "tags": lists})
    found = fields(loaded(tmp_path, {"file": "m.parquet"}, tables={"m.parquet": table}))
    assert [(f["prompt"], f["tags"]) for f in found] == [("a", ["a"]), ("b", ["b", "a"]), ("a", [])]


RAGGED = b'id,prompt,n\n1,"a\nb",1\n2\n\n3,c,3\n4,\xe9,4,5\n5,\xe9,5\n6,\xc3\xa9,6\n7,h,7\n8,"i\n'


@pytest.mark.parametrize("block", [4 << 20, 24])
def test_one_bad_row_of_a_csv_file_costs_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Too few and too many cells, a text that is not UTF-8; a quote that is never closed."""
    monkeypatch.setattr("samullm_plugin.app.csvtables.CSV_BLOCK_BYTES", block)
    (tmp_path / "r.csv").write_bytes(RAGGED.rpartition(b"8,")[0])
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, "r.csv")
    said = str(caught.value).replace(f"{tmp_path / 'r.csv'} ", "")
    assert said.startswith("3 bad rows: row 2: has 1 cells, and the file 3 columns; row 4: has 4")
    assert "row 5: its column 'prompt' is not UTF-8" in said
    asked = spec("r.csv") | {"on_bad_row": "skip"}
    app = build_application(AppSpec.model_validate(asked), tmp_path / "app.yaml")
    assert app.sources is not None
    assert app.sources[0].ids == ("1", "line-2", "3", "line-4", "line-5", "6", "7")
    assert [f.get("n") for f in fields(app)] == [1, None, 3, None, None, 6, 7]
    assert fields(app)[5]["prompt"] == "é"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"file": "none.csv"}, r"none\.csv: there is no such requests file"),
        ({"file": "r.parquet", "format": "csv"}, r"r\.parquet: cannot be read as csv: .*`format`"),
        ({"file": "broken.parquet"}, r"broken\.parquet: cannot be read as parquet: .*`format`"),
        ({"file": "r.csv", "id": "pdi"}, r"rows 1-3: requests\.id: it has no column 'pdi' .*'pid'"),
        (
            {"file": "r.csv", "rename": {"prompt": "x"}},
            r"rename: .*no column 'prompt'; columns: pid",
        ),
        ({"file": "r.csv", "rename": {"lang": "level"}}, r"has a column 'level' already"),
        ({"file": "r.csv", "where": {"langs": "en"}}, r"where: .*no field 'langs' .*'lang'"),
        ({"file": "r.csv", **NAMES, "where": {"lang": "fr"}}, r"r\.csv: it holds no requests with"),
        ({"file": "r.csv", "dataset": "x"}, "give file or dataset, one of them"),
        ({"file": "r.csv", "limits": 3}, r"limits: unknown field \(did you mean 'limit'"),
        ({"dataset": "saved", "split": "trian"}, r"split: no 'trian' \(did you mean 'train'"),
        ({"dataset": "shards"}, r"shards: is no dataset as save_to_disk writes it .*`file`"),
        ({"dataset": "someone/data"}, r"'someone/data' is no folder; a dataset of the hub needs"),
        ({"file": "mixed"}, r"mixed: the folder holds files of several formats \(csv, parquet\)"),
        ({"file": "saved"}, "saved: is a dataset as save_to_disk writes it; say `dataset`"),
        ({"file": "empty"}, r"empty: the folder holds no table"),
        ({"file": "twice.csv"}, r"twice\.csv: the column 'a' is there twice"),
        ({"file": "double.csv"}, r"double\.csv row 2: the id '1' is already that of"),
        ({"file": "r.csv", "id": "lang", "rename": {"instruction": "prompt"}}, "the id 'en' is"),
    ],
)
def test_wrong_tables(
    tmp_path: Path, table: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    for name in ("r.csv", "r.parquet", "saved", "shards"):
        write(tmp_path, name)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "double.csv").write_text("id,prompt\n1,x\n1,y\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed", "r.csv")
    write(tmp_path / "mixed", "r.parquet")
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, table)


def test_folders_that_name_a_field(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.dataset

    columns = {"prompt": ["a", "b", "c"], "lang": ["d e", "en", None], "year": [1, 2, 2]}
    pa.dataset.write_dataset(
        pa.table(columns),
        tmp_path / "parts",
        format="parquet",
        partitioning=["lang", "year"],
        partitioning_flavor="hive",
    )
    found = fields(loaded(tmp_path, "parts"))
    assert sorted((f["prompt"], str(f["lang"]), f["year"]) for f in found) == [
        ("a", "d e", 1), ("b", "en", 2), ("c", "None", 2)
    ]  # fmt: skip
    some = loaded(tmp_path, {"file": "parts", "where": {"year": 2, "lang": "en"}})
    assert [f["prompt"] for f in fields(some)] == ["b"]


def test_folders_of_json_lines_name_a_field(tmp_path: Path) -> None:
    """As those of all other formats; a field of a line comes first."""
    for folder, text in {
        "lang=de/year=1": '{"prompt": "a"}\n\n{"prompt": "b", "lang": "own"}\n',
        "lang=en%20gb/year=2": '{"prompt": "c"}\n{"prompt": "d"}\n',
    }.items():
        (tmp_path / "parts" / folder).mkdir(parents=True)
        (tmp_path / "parts" / folder / "0.jsonl").write_text(text)
    found = fields(loaded(tmp_path, {"file": "parts", "id": "prompt"}))
    assert [(f["prompt"], f["lang"], f["year"]) for f in found] == [
        ("a", "de", 1), ("b", "own", 1), ("c", "en gb", 2), ("d", "en gb", 2)
    ]  # fmt: skip
    some = loaded(tmp_path, {"file": "parts/lang=de", "where": {"year": 1}, "limit": 1})
    assert [(f["prompt"], "lang" in f) for f in fields(some)] == [("a", False)]
    (tmp_path / "parts/lang=en%20gb/year=2/0.jsonl").write_text('{"prompt": "c"}\n')
    some = loaded(tmp_path, {"file": "parts", "where": {"lang": "de"}, "rename": {"year": "y"}})
    assert [(f["prompt"], f["y"]) for f in fields(some)] == [("a", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "prompt\na\n".encode("utf-16"), r"t\.csv: is UTF-16; write it as UTF-8"),
        ("t.xlsx", b"PK", r"t\.xlsx: \.xlsx files are not read; save it as CSV, Parquet"),
        ("t.csv.bz2", b"BZh", r"\.bz2 files are not read; .* \(packed: \.gz or \.zst\)"),
        ("t.json", b'[{"prompt": "a"}]', "must be a JSON object, not list; write one object a"),
    ],
)
def test_files_that_are_not_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, name)
