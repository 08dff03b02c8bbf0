"""An answer between the thread that reads it from the database and the one that sends it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest

from app.core.errors import AppError, Transient
from app.dwh.query import KeysetPosition, selection
from app.dwh.responses import HEAD_BYTES, MEMORY_BYTES, AnswerPage, ByteSpool, ClientDisconnected
from app.dwh.tables import LOCATIONS
from warehouse import Desk, uuid_of


def test_the_reader_begins_before_the_writer_has_ended_and_gets_every_byte() -> None:
    piece = bytes(range(256)) * (MEMORY_BYTES // 100)
    begun = threading.Event()

    def write(spool: ByteSpool) -> None:
        with spool.written():
            spool.write(piece)
            spool.show()
            assert begun.wait(30)
            for _ in range(3):
                spool.write(piece)

    with ThreadPoolExecutor(1) as pool, closing(ByteSpool()) as spool:
        writing = pool.submit(write, spool)
        assert spool.wait(whole=False) is None
        read = spool.read(1000)
        begun.set()
        while more := spool.read(100_000):
            read += more
        writing.result(30)
        assert spool.wait(whole=True) == len(read)
    assert read == piece * 4


def test_what_was_written_is_read_before_the_error_that_ended_it() -> None:
    with closing(ByteSpool()) as spool:
        with suppress(Transient), spool.written():
            spool.write(b"some")
            spool.show()
            raise Transient("lost", "again")
        assert spool.read(100) == b"some"
        with pytest.raises(Transient, match="lost"):
            spool.read(100)


def test_a_writer_that_breaks_never_leaves_its_reader_waiting() -> None:
    with closing(ByteSpool()) as spool:
        with pytest.raises(KeyError), spool.written():
            raise KeyError
        with pytest.raises(AppError, match="could not be completed"):
            spool.wait(whole=False)


def test_a_writer_whose_reader_has_left_is_told() -> None:
    spool = ByteSpool()
    spool.close()
    with pytest.raises(ClientDisconnected), spool.written():
        spool.write(b"x")
    assert spool.read(1) == b""


def test_a_page_that_is_left_frees_its_connection(desk: Desk) -> None:
    desk.post(LOCATIONS, [{"uuid": uuid_of(n)} for n in range(20_000)])
    for _ in range(20):  # more than there are connections
        page = AnswerPage(desk.warehouse, selection(LOCATIONS, [("format", "ndjson"), ("limit", "20000")]))
        page.close()
        page.produce()
    assert desk.read(LOCATIONS, format="ndjson", limit=20_000).body.count(b"\n") == 20_000


@pytest.mark.parametrize(("limit", "last_id"), [(2_999, 2), (3_000, None), (3_001, None), (3, 2_998)])
def test_the_link_of_a_long_answer_is_known_before_its_end(desk: Desk, limit: int, last_id: int | None) -> None:
    desk.post(LOCATIONS, [{"uuid": uuid_of(n)} for n in range(3_000)])
    got = desk.read(LOCATIONS, format="ndjson", limit=limit)
    last = KeysetPosition(last_id) if last_id else None
    assert (got.last, got.body.count(b"\n"), len(got.body) > HEAD_BYTES) == (last, min(limit, 3_000), limit > 3)
