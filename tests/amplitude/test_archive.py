"""Exports that are no zip as it should be: each is one of our errors, and says whether fetching it again can help."""

import gzip
import io
import struct
import zipfile
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from app.amplitude.archives import ExportArchive, joined, joined_lines, read_errors
from app.core.errors import AppError, Permanent, Transient
from app.core.windows import Window

HOUR_AT = datetime(2026, 2, 7, 9, tzinfo=UTC)
SPAN = Window(HOUR_AT, HOUR_AT + timedelta(hours=1))
NAME = "100/100_2026-02-07_9#0.json.gz"
TEXT = b"not compressed, so that each byte of it can be found" * 20
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def export(name: str = NAME) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(name, TEXT)
    return held.getvalue()


def with_field(body: bytes, at: int, value: int) -> bytes:
    """The field that stands `at` bytes into the local header, and two further in the central one."""
    changed = bytearray(body)
    struct.pack_into("<H", changed, body.index(LOCAL) + at, value)
    struct.pack_into("<H", changed, body.index(CENTRAL) + at + 2, value)
    return bytes(changed)


def read(body: bytes) -> bytes:
    with closing(ExportArchive(SPAN, io.BytesIO(body))) as archive, read_errors():
        if archive.fault:
            raise archive.fault
        members = [member for found in archive.hours.values() for member in found]
        (text,) = (stream.read() for stream in archive.streams(members))
        return text


def test_a_whole_export_is_read() -> None:
    assert read(export()) == TEXT


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"<html>sign in</html>", Transient, "not a complete zip"),
        (export()[:-30], Transient, "not a complete zip"),
        (export().replace(TEXT, TEXT[:-1] + b"!"), Transient, "not a complete zip: Bad CRC-32"),
        (with_field(export(), 6, 1), Permanent, "a format that cannot be read: .* encrypted"),
        (with_field(export(), 8, 99), Permanent, "a format that cannot be read: .* compression method"),
        (with_field(export(), 4, 99), Permanent, "a format that cannot be read: zip file version 9.9"),
        (export("100/somewhere/else.txt"), Permanent, "which names no hour"),
        (export(NAME.replace("-07_9", "-08_9")), Permanent, "which is from another time"),
    ],
    ids=["no zip", "cut", "changed byte", "encrypted", "unknown method", "newer version", "odd name", "another day"],
)
def test_what_is_wrong_with_an_export_is_one_of_our_errors(body: bytes, kind: type[AppError], said: str) -> None:
    with pytest.raises(kind, match=said):
        read(body)


def test_an_error_of_whoever_reads_is_not_taken_for_one_of_the_zip() -> None:
    def reading() -> None:
        with closing(ExportArchive(SPAN, io.BytesIO(export()))) as archive:
            for _ in archive.streams(archive.hours[HOUR_AT]):
                raise RuntimeError("of the reader")

    with pytest.raises(RuntimeError, match="of the reader"):
        reading()


def test_two_members_of_one_name_are_both_read() -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(NAME, b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(NAME, b"second")
    with closing(ExportArchive(SPAN, held)) as found:
        assert [stream.read() for stream in found.streams(found.hours[HOUR_AT])] == [b"first", b"second"]


def test_members_of_no_hour_go_to_whoever_asks_for_them_unless_there_are_no_others() -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in (NAME, "README.txt", NAME.replace("-07_9", "-08_9")):
            archive.writestr(name, TEXT)
    with closing(ExportArchive(SPAN, held)) as found:
        (hour,) = found.hours.values()
        odd = {member.filename: error.message for error, member in found.odd}
    assert found.fault is None
    assert [member.filename for member in hour] == [NAME]
    assert odd.keys() == {"README.txt", NAME.replace("-07_9", "-08_9")}
    assert odd["README.txt"].endswith("which names no hour")


def test_a_checksum_of_the_zip_is_compared_also_where_members_are_joined() -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(NAME, gzip.compress(b"{}"))
    damaged = with_field(held.getvalue(), 14, 0)
    with closing(ExportArchive(SPAN, io.BytesIO(damaged))) as found, pytest.raises(Transient, match="Bad CRC-32"):
        list(joined_lines(joined(), found.streams(found.hours[HOUR_AT])))
