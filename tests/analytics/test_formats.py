"""What stands in an answer for each kind of value."""

import csv
import io
import json
import re
import zipfile
from pathlib import Path

import duckdb
import pytest

from app.analytics.formats import AnswerShape, of_batches
from app.core.errors import Rejected

NUMBERS = """
    SELECT sum(1::BIGINT) AS whole, 1.5 AS part, -7.00::DECIMAL(9, 2) AS places, 1::HUGEINT AS huge,
        (1::HUGEINT << 100) AS large, NULL::DECIMAL(9, 2) AS absent, [1.5] AS list, {'sum': sum(2)} AS nested
"""


def answer(sql: str, how: str, folder: Path, *, formula_safe: bool = False) -> bytes:
    with duckdb.connect() as connection:
        reader = connection.execute(sql).to_arrow_reader(10)
        return b"".join(of_batches(reader, AnswerShape(how, "data", (), formula_safe), folder).pieces())


def test_sums_of_whole_numbers_and_decimals_are_numbers_in_json(tmp_path: Path) -> None:
    (row,) = json.loads(answer(NUMBERS, "json", tmp_path))["data"]
    assert row == {
        "whole": 1, "part": 1.5, "places": -7.0, "huge": 1, "large": 2.0**100, "absent": None, "list": [1.5],
        "nested": {"sum": 2},
    }  # fmt: skip
    assert [type(row[name]) for name in ("whole", "huge", "places", "large")] == [int, int, float, float]


def test_sums_of_whole_numbers_and_decimals_are_numbers_in_a_sheet(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(answer(NUMBERS, "xlsx", tmp_path))) as sheet:
        cells = sheet.read("xl/worksheets/sheet1.xml").decode()
    found = dict(re.findall(r'<c r="([A-H]2)"><v>([^<]*)</v>', cells))
    assert {place: float(value) for place, value in found.items()} == {
        "A2": 1, "B2": 1.5, "C2": -7, "D2": 1, "E2": float(f"{2.0**100:.16G}"),
    }  # fmt: skip


def test_a_sheet_shows_no_value_as_another(tmp_path: Path) -> None:
    sql = """SELECT TIMESTAMP '1800-05-05' AS past, DATE '9999-12-31' AS far, 9007199254740993 AS id,
        999999999999999 AS n, DATE '2026-02-07' AS day, 18446744073709551615::UBIGINT AS most"""
    with zipfile.ZipFile(io.BytesIO(answer(sql, "xlsx", tmp_path))) as sheet:
        cells = sheet.read("xl/worksheets/sheet1.xml").decode()
    texts = dict(re.findall(r'<c r="([A-F]2)"[^>]*><is><t>([^<]*)</t>', cells))
    assert texts == {
        "A2": "1800-05-05T00:00:00Z", "B2": "9999-12-31", "C2": "9007199254740993", "F2": "18446744073709551615",
    }  # fmt: skip
    assert dict(re.findall(r'<c r="([A-F]2)"[^>]*><v>([^<]*)</v>', cells)) == {"D2": "999999999999999", "E2": "46060"}
    with pytest.raises(Rejected, match="40000 characters does not fit into a cell"):
        answer("SELECT repeat('x', 40000) AS text", "xlsx", tmp_path)


def test_a_text_that_looks_like_a_formula_stays_text_in_a_sheet_and_as_it_is_in_csv(tmp_path: Path) -> None:
    sql = "SELECT '=1+1' AS text"
    with zipfile.ZipFile(io.BytesIO(answer(sql, "xlsx", tmp_path))) as sheet:
        cells = sheet.read("xl/worksheets/sheet1.xml").decode()
    assert "<t>=1+1</t>" in cells
    assert "<f>" not in cells
    assert answer(sql, "csv", tmp_path).splitlines()[1] in (b"=1+1", b'"=1+1"')


def test_formula_safe_csv_puts_an_apostrophe_before_texts_that_a_spreadsheet_would_run(tmp_path: Path) -> None:
    cells = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", "\uff1d1", "a=1", ""]
    rows = " UNION ALL ".join(f"SELECT '{cell}' AS text, -1 AS number, ['=1'] AS \"=list\"" for cell in cells)
    found = list(csv.reader(io.StringIO(answer(rows, "csv", tmp_path, formula_safe=True).decode(), newline="")))
    assert found[0] == ["text", "number", "'=list"]
    assert [row[0] for row in found[1:]] == [*(f"'{cell}" for cell in cells[:8]), *cells[8:]]
    assert {tuple(row[1:]) for row in found[1:]} == {("-1", '["=1"]')}


def test_what_no_reader_holds_is_null_and_no_column_hides_another(tmp_path: Path) -> None:
    far = "SELECT DATE 'infinity' AS day, TIMESTAMP '290000-01-01' AS at, DATE '0001-01-01' AS first, 1 AS n, 2 AS n"
    (row,) = json.loads(answer(far, "json", tmp_path))["data"]
    assert row == {"day": None, "at": None, "first": "0001-01-01", "n": 1, "n_1": 2}
    assert answer(far, "csv", tmp_path) == b'"day","at","first","n","n_1"\n,,0001-01-01,1,2\n'


def test_every_format_has_spans_of_time_bytes_and_unions(tmp_path: Path) -> None:
    odd = "SELECT INTERVAL 1 DAY AS span, 'x'::BLOB AS bytes, union_value(n := 1) AS either"
    assert json.loads(answer(odd, "json", tmp_path))["data"] == [{"span": [0, 1, 0], "bytes": "78", "either": 1}]
    assert answer(odd, "csv", tmp_path).splitlines()[1] == b'"[0,1,0]","78","1"'
    assert answer(odd, "parquet", tmp_path)[:4] == b"PAR1"
    with pytest.raises(Rejected, match="cannot be written"):
        answer("SELECT [DATE '290000-01-01'] AS days", "csv", tmp_path)
    assert b"'=1+1" in answer("SELECT union_value(s := '=1+1') AS either", "csv", tmp_path, formula_safe=True)


@pytest.mark.parametrize("how", ["json", "ndjson", "csv", "parquet", "xlsx"])
def test_a_type_of_duckdb_alone_is_refused_and_not_given_as_its_inner_bytes(how: str, tmp_path: Path) -> None:
    for sql in ("SELECT 1::BIGNUM AS n", "SELECT [1::BIGNUM] AS n"):
        with pytest.raises(Rejected, match="type BIGNUM, which no format has"):
            answer(sql, how, tmp_path)
