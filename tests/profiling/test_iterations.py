from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.profiling.iterations import read_iterations

HEADER = (
    "device,model,tp,phase,batch_size,context_tokens,max_seq_len,new_tokens,padded_tokens,shape,"
    "iter_s,comp_s,meta_s,warmup"
)
DECODE = "A100-80GB,a/b,2,decode,3,30,12,3,3,uniform,0.02,0.015,0.001,0"
PREFILL = "A100-80GB,a/b,2,prefill,2,19,10,19,20,uniform,0.05,0.04,0.002,0"


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_rows_become_the_composition_that_was_computed(tmp_path: Path) -> None:
    path = write(tmp_path / "i.csv", DECODE, PREFILL, PREFILL.replace(",0", ",0", 1)[:-1] + "1")
    (rows,) = read_iterations(path)
    assert len(rows) == 2  # the warm-up row is left out
    steps = rows.steps
    np.testing.assert_array_equal(steps.num_tokens, [3, 20])  # padded tokens were computed
    np.testing.assert_array_equal(steps.prefill_seqs, [0, 2])
    np.testing.assert_array_equal(steps.prefill_pairs, [0, 2 * 10 * 11 / 2])
    np.testing.assert_array_equal(steps.context_tokens, [30, 0])
    np.testing.assert_array_equal(steps.longest_tokens, [12, 0])
    np.testing.assert_allclose(rows.seconds, [0.019, 0.048])
    np.testing.assert_allclose(rows.host_s, [0.004, 0.008])
    assert (rows.model, rows.tensor_parallel_size, rows.device) == ("a/b", 2, "A100-80GB")


def test_few_columns_gzip_and_names_from_the_command_line(tmp_path: Path) -> None:
    text = "phase,batch_size,context_tokens,max_seq_len,new_tokens,iter_s\ndecode,1,5,5,1,0.01\n"
    path = tmp_path / "i.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    (rows,) = read_iterations(path, model="x/y", tensor_parallel_size=4)
    assert (rows.model, rows.tensor_parallel_size) == ("x/y", 4)
    assert np.isnan(rows.device_s).all()
    with pytest.raises(InputError, match="no column model, tp"):
        read_iterations(path)


def test_models_and_sizes_are_groups_and_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "i.csv", DECODE, DECODE.replace("a/b,2", "a/b,4"), PREFILL)
    assert {(g.tensor_parallel_size, len(g)) for g in read_iterations(path)} == {(2, 2), (4, 1)}
    (only,) = read_iterations(path, model="a/b", tensor_parallel_size=4)
    assert len(only) == 1
    with pytest.raises(InputError, match="no rows of c/d"):
        read_iterations(path, model="c/d")


def test_mixed_rows_need_their_prefill_columns(tmp_path: Path) -> None:
    header = HEADER + ",prefill_seqs,prefill_tokens,prefill_pairs"
    row = "A,a/b,1,mixed,5,400,120,36,,uniform,0.03,,,0,1,32,528"
    (rows,) = read_iterations(write(tmp_path / "i.csv", row, header=header))
    assert rows.steps.prefill_pairs[0] == 528
    assert rows.steps.num_tokens[0] == 36
    assert rows.steps.context_tokens[0] == 400
    with pytest.raises(InputError, match="row 2: a mixed iteration needs"):
        read_iterations(write(tmp_path / "j.csv", row.replace(",1,32,528", ",,,"), header=header))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (DECODE.replace("0.02,", "-0.02,"), r"row 3: iter_s is '-0\.02'.*at least 0"),
        (DECODE.replace("0.02,", "nan,"), r"row 3: iter_s is 'nan'"),
        (DECODE.replace("0.02,", ","), r"row 3: iter_s is ''"),
        (DECODE.replace("decode", "decoding"), r"row 3: phase is 'decoding'"),
        (DECODE.replace("decode,3", "decode,0"), r"row 3: batch_size is 0"),
        (DECODE.replace("0.001", "0.5"), r"row 3: iter_s less meta_s"),
        (DECODE.replace("0.015", "0.5"), r"row 3: comp_s is larger"),
        (DECODE.replace("a/b,2", "a/b,0"), r"row 3: model 'a/b' and tp 0"),
        (DECODE + ",7", r"row 3: 15 cells, but 14 columns"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, said: str) -> None:
    path = write(tmp_path / "i.csv", DECODE, row)
    with pytest.raises(InputError, match=said) as caught:
        read_iterations(path)
    assert str(path) in str(caught.value)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column iter_s"):
        read_iterations(write(tmp_path / "i.csv", header=HEADER.replace("iter_s,", "")))
    with pytest.raises(InputError, match=r"none\.csv"):
        read_iterations(tmp_path / "none.csv")
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(InputError, match="cannot be read"):
        read_iterations(broken)
    with pytest.raises(InputError, match="no rows"):
        read_iterations(write(tmp_path / "empty.csv"))
