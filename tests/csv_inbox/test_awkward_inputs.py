"""Inputs as people, spreadsheets and dying writers leave them, beside a model with the standard library's reader."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from inbox_model import Rejected, table_of
from inbox_world import model, parsed, world

BOM = b"\xef\xbb\xbf"
MASTER = b"k,a,b\nm1,old,1\nm2,old,\n"
LONG = 16 << 20

PLAIN: Mapping[str, bytes] = {
    # what is a value
    "leading zeros": b"k,a\n007,007\n",
    "numbers stay text": b"k,a\nx,1\ny,1.0\nz,1e5\n",
    "NA and null": b"k,a\nNA,null\nNone,nan\n",
    "blanks around values": b"k,a\n x , y \n",
    "a key of another row with a blank": b"k,a\nm1 ,x\nm1,y\n",
    "a minus and a formula": b"k,a\n-1,=1+1\n@x,+2\n",
    "emoji and combining marks": "k,a\n😀,e\u0301\né,x\n".encode(),
    "right to left": "k,a\n\u202eabc,x\n".encode(),
    "a word joiner in a value": "k,a\nx,a\ufeffb\n".encode(),
    "a byte order mark at the beginning of a value": "k,a\nx,\ufeffb\n".encode(),
    "no-break blanks": "k,a\nx,\u00a0\n\u00a0y,1\n".encode(),
    "line separators": "k,a\nx,a\u2028b\ny,\u0085\n".encode(),
    "control characters": b"k,a\nx,\x01\x1b\x7f\ny,\x0b\x0c\n",
    "a very long value": b"k,a\nx," + b"v" * 300_000 + b"\n",
    "a very long key": b"k,a\n" + b"x" * 200_000 + b",1\n",
    # quotes
    "all quoted": b'"k","a"\n"x","1"\n"y",""\n',
    "doubled quotes": b'k,a\n"x ""y""","""q"""\n',
    "a quote inside a plain value": b'k,a\nx,5" disk\ny,6"\n',
    "text behind a closed quote": b'k,a\n"x"y,"1"2\n',
    "a blank before a quote": b'k,a\nx, "1"\n',
    "delimiters in quotes": b'k,a\n"x,y","1,,2"\n',
    "line feeds in quotes": b'k,a\n"x\ny","1\n\n2"\n',
    "returns in quotes": b'k,a\nx,"1\r2\r\n3"\n',
    "a quoted key like a plain one": b'k,a\n"m1","x"\n',
    "only quotes as value": b'k,a\nx,""""\n',
    "a header with a line feed": b'k,"a\nb"\nx,1\n',
    "a header with a delimiter": b'k,"a,b"\nx,1\n',
    "a header with quotes": b'k,"a ""b"""\nx,1\n',
    # line ends
    "CRLF": b"k,a\r\nx,1\r\ny,2\r\n",
    "mixed line ends": b"k,a\r\nx,1\ny,2\r\n",
    "no last line end": b"k,a\nx,1",
    "CRLF and no last line end": b"k,a\r\nx,1\r\ny,2",
    "a last line of an empty value": b"k,a\nx,",
    "many blank lines": b"\n\nk,a\n\n\nx,1\n\n\n\ny,2\n\n",
    "blank CRLF lines": b"k,a\r\n\r\nx,1\r\n\r\n",
    "blank lines without a last line end": b"k,a\nx,1\n\n  ",
    # columns
    "one column": b"k\nx\ny\n",
    "one column with blank lines": b"k\nx\n\ny\n\n",
    "another order": b"b,a,k\n1,2,x\n",
    "a new column": b"k,c\nx,1\n",
    "a new column in front": b"c,k\n1,x\n",
    "fewer columns": b"k\nm1\n",
    "a column without a name in front": b",k,a\n0,x,1\n",
    "names in another case are others": b"k,A\nx,1\n",
    "a header of non-ASCII": "k,Größe\nx,1\n".encode(),
    "the same key three times": b"k,a\nx,1\nx,2\ny,1\nx,3\n",
    "a key that the master has twice in the file": b"k,a,b\nm1,new,\nm1,newer,\n",
    "the master again": MASTER,
    # blanks in headers
    "a blank before a name": b"k, a\nx,1\n",
    "a blank behind a name": b"k ,a \nx,1\n",
    "a blank before the key": b" k,a\nx,1\n",
    "tabs around names": b"\tk\t,\ta\nx,1\n",
    "no-break blanks around names": "k,\u00a0a\u00a0\nx,1\n".encode(),
    "a quoted name with blanks": b'k," a "\nx,1\n',
    "a blank before a quoted name": b'k, "a"\nx,1\n',
    "a new name with blanks": b"k, c ,d \nx,1,2\n",
    "a blank within a name": b"k,a b\nx,1\n",
    # byte order marks
    "a byte order mark": BOM + b"k,a\nx,1\n",
    "two byte order marks": BOM + BOM + b"k,a\nx,1\n",
    "a byte order mark before a quoted name": BOM + b'"k","a"\n"x","1"\n',
    "two files appended": BOM + b"k,a\nx,1\n" + BOM + b"k,a\ny,2\n",
    "three files appended": b"k,a\nx,1\n" + BOM + b"k,a\ny,2\n" + BOM + b"k,a\nz,3",
    "appended rows without a header": b"k,a\nx,1\n" + BOM + b"y,2\nz,3\n",
    "appended rows that begin with quotes": b"k,a\nx,1\n" + BOM + b'"y,1","2\n3"\nz,4\n',
    "a header file and a rows file": b"k,a\n" + BOM + b"x,1\ny,2\n",
    "an appended file with blanks in its header": b"k,a\r\nx,1\r\n" + BOM + b"k, a\r\ny,2\r\n",
    "a byte order mark alone at the end": b"k,a\nx,1\n" + BOM,
    "a byte order mark before an empty line": b"k,a\nx,1\n" + BOM + b"\ny,2\n",
    # headers that come again
    "two files appended without a mark": b"k,a\nx,1\nk,a\ny,2\nk,a\n",
    "a header again, and rows as long as it": b"k,a\nx,1\nk,a\ny,2\nk,b\nz,a\n",
    "a header again behind a mark, and a value like a name": b"k,a\nx,1\n" + BOM + b"k,a\ny,k\nk,a\nz,a\n",
    "the name of the only column as a value": b"k\nx\nk\ny\n",
    # spreadsheets
    "a row of delimiters": b"k,a,b\nx,1,2\n,,\ny,3,4\n",
    "rows of delimiters at the end": b"k,a,b\nx,1,2\n,,\n,,\n,,",
    "rows of fewer and more delimiters": b"k,a,b\nx,1,2\n,\n,,,,,\n",
    "a row of blanks": b"k,a\nx,1\n   \n , \n\t,\t\n",
    "a row of empty quotes": b'k,a\nx,1\n"",""\n',
    "rows of delimiters before the header": b",,\r\n,,\r\nk,a,b\r\nx,1,2\r\n",
    "a trailing delimiter everywhere": b"k,a,\nx,1,\ny,2,\n",
    "three trailing delimiters everywhere": b"k,a,,,\r\nx,1,,,\r\ny,2,,,\r\n",
    "a trailing delimiter in rows only": b"k,a\nx,1,\ny,2,\n",
    "a trailing delimiter in the header only": b"k,a,\nx,1\ny,2\n",
    "trailing delimiters that end after some rows": b"k,a,,\nx,1,,\ny,2,\nz,3\n",
    "trailing delimiters without a last line end": b"k,a,\nx,1,\ny,2,",
    "trailing delimiters behind quotes": b'k,a,\n"x,1","1\n2",\n',
    "trailing blanks behind the last column": b"k,a, \nx,1,  \n",
    "trailing delimiters and blank rows": b"k,a,\nx,1,\n,,\ny,2,\n,,\n",
    "sep=,": b"sep=,\nk,a\nx,1\n",
    "sep=; with CRLF": b'sep=;\r\nk;a\r\nx;1\r\ny;"2;3"\r\nz;4,5\r\n',
    "sep= quoted and in capitals": b'"SEP=;"\nk;a\nx;1\n',
    "sep= behind a byte order mark": BOM + b"sep=;\nk;a\nx;1\n",
    "sep= a tab": b"sep=\t\nk\ta\nx\t1,2\n",
    "sep= another, with another order and a new column": b'sep=;\nc;k\n"1,5";x\n2;"y"\n',
    "sep= another, with trailing delimiters and blank rows": b"sep=;\nk;a;\nx;1;\n;;\n",
}
BAD: Mapping[str, bytes] = {
    "nothing": b"",
    "a byte order mark and nothing": BOM,
    "a line feed": b"\n",
    "blank rows only": b",,\n , \n",
    "a header only": b"k,a\n",
    "a header without a line end": b"k,a",
    "a header and blank rows": b"k,a\n,\n\n",
    "sep= and nothing": b"sep=,\n",
    "no key column": b"id,a\n1,2\n",
    "another delimiter": b"k;a\nx;1\n",
    "a name twice": b"k,a,a\nx,1,2\n",
    "a name twice but for blanks": b"k,a, a\nx,1,2\n",
    "two columns without a name in front": b",,k\n1,2,x\n",
    "latin-1": "k,a\nx,é\n".encode("latin-1"),
    "latin-1 in the header": "k,é\nx,1\n".encode("latin-1"),
    "UTF-16": "k,a\nx,1\n".encode("utf-16"),
    "UTF-16 with CRLF": "k,a\r\nx,1\r\n".encode("utf-16"),
    "a cut character": "k,a\nx,é".encode()[:-1],
    "a lone surrogate": b"k,a\nx,\xed\xa0\x80\n",
    "NUL in a value": b"k,a\nx,\0\n",
    "NUL in a key": b"k,a\nx\0,1\n",
    "NUL in the header": b"k,a\0\nx,1\n",
    "NUL in the name of the key": b"k\0,a\nx,1\n",
    "NUL behind the rows": b"k,a\nx,1\n\0\0\0\0",
    "a row too short": b"k,a\nx\n",
    "a row too long": b"k,a\nx,1,2\n",
    "a trailing delimiter in one row": b"k,a\nx,1\ny,2,\nz,3\n",
    "a trailing delimiter in all rows but one": b"k,a\nx,1,\ny,2\nz,3,\n",
    "a value below no name": b"k,a,\nx,1,\ny,2,3\n",
    "more trailing delimiters than in the header": b"k,a,\nx,1,\ny,2,,\n",
    "a quote not closed": b'k,a\nx,"1\ny,2\n',
    "a quote not closed in the last row": b'k,a\nx,1\ny,"2',
    "old line ends of a Mac": b"k,a\nx,1\ry,2\r",
    "a return in the middle": b"k,a\nx,1\r2\n",
    "a return at the end": b"k,a\nx,1\r",
    "an empty key": b"k,a\n,1\n",
    "an empty quoted key": b'k,a\n"",1\n',
    "a key with a byte order mark inside": "k\nx\ny\ufeffz\n".encode(),
    "an appended file with another header": b"k,a\nx,1\n" + BOM + b"a,k\n2,y\n",
    "an appended file with more columns": b"k,a\nx,1\n" + BOM + b"k,a,b\ny,2,3\n",
    "a file appended without a line end between": b"k,a\nx,1" + BOM + b"k,a\ny,2\n",
    "a record above the limit": b'k,a\nx,"' + b"v" * LONG + b'"\n',
    "a plain record above the limit": b"k,a\nx," + b"v" * LONG,
    "a header above the limit": b"k," + b"v" * LONG + b"\nx,1\n",
}
SETTINGS: Mapping[str, tuple[Mapping[str, Any], bytes | None, bytes]] = {
    "semicolons": ({"csv_delimiter": ";"}, b"k;a\nm;1\n", b"k;a\nx;1,5\n"),
    "semicolons, and sep= says commas": ({"csv_delimiter": ";"}, b"k;a\nm;1\n", b"sep=,\nk,a\nx,1;5\n"),
    "tabs with blanks": ({"csv_delimiter": "\t"}, None, b"k \ta\nx\t1 \n\t\n \t \ny\t\n"),
    "blanks as delimiters": ({"csv_delimiter": " "}, None, b"k a\nx 1\n"),
    "latin-1 text": ({"csv_encoding": "latin-1"}, "k,ä\nm,ö\n".encode("latin-1"), "k,ä\nx,ü\n".encode("latin-1")),
    "cp1252 text with a hole": ({"csv_encoding": "cp1252"}, None, b"k,a\nx,\x81\n"),
    "latin-1, and UTF-16 with CRLF": ({"csv_encoding": "latin-1"}, None, "k,a\r\nx,1\r\n".encode("utf-16")),
    "latin-1 and a byte order mark": ({"csv_encoding": "latin-1"}, b"a,k\n1,m\n", BOM + b"a,k\n2,x\n"),
    "latin-1, a byte order mark and sep=": ({"csv_encoding": "latin-1"}, b"a,k\n1,m\n", BOM + b"sep=;\na;k\n2;x\n"),
    "cp1252, and UTF-8 behind a mark": ({"csv_encoding": "cp1252"}, b"a,k\n1,m\n", BOM + "a,k\né,x\n".encode()),
    "cp1252, and a header of UTF-8 behind a mark": ({"csv_encoding": "cp1252"}, None, BOM + "é,k\n1,x\n".encode()),
    "required columns with blanks": ({"required_columns": ["a", "c"]}, MASTER, b"k, a ,c\nx,1,2\n"),
    "a required column is missing": ({"required_columns": ["c"]}, MASTER, b"k,a\nx,1\n"),
    "a file above the limit": ({"max_file_size_mb": 0.001}, MASTER, b"k,a\n" + b"x,1\n" * 500),
    "no master yet": ({}, None, b" k , a,\r\nx,1,\r\n"),
    "no master yet and sep=": ({}, None, b'sep=;\nk;a\nx;"1;2"\ny;3,4\n'),
    "a master whose names have blanks": ({}, b"k, a\nm, 1\n", b"k, a\nx,2\n"),
    "a master with both names": ({}, b"k,a, a\nm,1,2\n", b"k, a\nx,2\n"),
    "a master with a column without a name": ({}, b"k,a,\nm,1,9\n", b"k,a,\nx,2,8\n"),
    "a master with CRLF": ({}, b"k,a\r\nm,1\r\n", b"k,a,\nx,2,\n"),
    "a master without a last line end": ({}, b"k,a\nm,1", b"k,a\nx,2"),
}
CASES = [
    *((name, {}, MASTER, content) for name, content in {**PLAIN, **BAD}.items()),
    *((name, keys, master, content) for name, (keys, master, content) in SETTINGS.items()),
]


def test_there_are_as_many_awkward_inputs_as_were_promised() -> None:
    assert len(CASES) >= 104


@pytest.mark.parametrize(("keys", "master", "content"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_an_awkward_file_is_merged_or_rejected_as_the_model_says_and_delays_no_other(
    tmp_path: Path, keys: Mapping[str, Any], master: bytes | None, content: bytes
) -> None:
    here = world(tmp_path, **keys)
    if master is not None:
        here.config.merged_file.write_bytes(master)
    delimiter, required = here.config.csv_delimiter, here.config.required_columns
    reads: dict[str, Any] = {"delimiter": delimiter, "encoding": here.config.csv_encoding}
    rules = {**reads, "required": required, "max_bytes": int(here.config.max_file_size_mb * (1 << 20))}
    good = "\n".join([delimiter.join(["k", "a", "c"]), delimiter.join(["good", "1", "2"])]).encode()
    expected = parsed(master, **reads) if master is not None else None
    kind, rows = "", 1
    try:
        incoming = table_of(content, expected, **rules)
        expected, rows = model(expected, incoming, "k", required), 1 + len(incoming[1])
    except Rejected as rejected:
        kind = rejected.args[0]
    expected = model(expected, table_of(good, expected, **rules), "k", required)

    os.utime(here.drop("awkward.csv", content), (1, 1))
    os.utime(here.drop("good.csv", good), (2, 2))
    report = here.run()
    assert parsed(here.master, **reads) == expected
    assert here.metadata["row_count"] == len(expected[1])
    assert report.ledger.closes
    assert here.waiting == []
    assert [failure.partition for failure in report.failures] == (["awkward.csv"] if kind else [])
    assert [one.reason for one in report.ledger.set_aside] == ([kind] if kind else [])
    if kind:
        assert report.ledger.set_aside[0].new == report.ledger.total.set_aside > 0
        assert (here.config.rejected_dir / "awkward.csv").read_bytes() == content
        assert here.reason("awkward.csv")["hint"]
    else:
        assert report.ledger.total.counted == report.ledger.total.read == rows
    assert here.run() == type(report)()
