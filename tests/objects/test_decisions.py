"""What a request asks for, without any server: ranges, conditions, keys, forms, names, types."""

import asyncio
import io
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import Transient
from app.object_store.port import ObjectInfo, ReadableBody
from app.objects.requests import (
    SECRET_BYTES,
    SECRET_NAME,
    KeyPolicy,
    SignedLinks,
    check_conditions,
    disposition,
    span_of,
)
from app.objects.streams import FormReader, boundary_of, media_type
from app.web.errors import Refused
from app.web.request_bodies import run_with_body
from disk_effects import Disk

AT = datetime(2026, 2, 7, 12, tzinfo=UTC)
HELD = ObjectInfo("k", 10, '"e"', AT)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 10)),
        ("bytes=3-5", (3, 3)),
        ("bytes=9-99", (9, 1)),
        (f"bytes=8-{'9' * 40}", (8, 2)),
        ("bytes=-3", (7, 3)),
        ("bytes=-99", (0, 10)),
        ("Bytes=3-5", (3, 3)),
        ("BYTES=-3", (7, 3)),
    ],
)
def test_ranges_are_cut_to_the_object(given: str, wanted: tuple[int, int]) -> None:
    span = span_of({"range": given}, HELD)
    assert (span.first, span.count, span.part) == (*wanted, True)


@pytest.mark.parametrize(
    "given",
    ["", "bytes=", "bytes=-", "bytes=5-3", "bytes=0-1,3-4", "items=0-1", "bytes=a-b"],
)
def test_what_is_no_range_means_the_whole_object(given: str) -> None:
    assert not span_of({"range": given}, HELD).part


@pytest.mark.parametrize("given", ["bytes=10-", "bytes=10-20", "bytes=-0", f"bytes={'9' * 40}-"])
def test_a_range_behind_the_end_is_416_with_the_size(given: str) -> None:
    with pytest.raises(Refused) as caught:
        span_of({"range": given}, HELD)
    assert (caught.value.refusal.status, caught.value.refusal.headers) == (416, {"Content-Range": "bytes */10"})
    with pytest.raises(Refused):
        span_of({"range": "bytes=-5"}, ObjectInfo("k", 0, '"e"', AT))


def test_a_range_of_another_version_means_the_whole_object() -> None:
    assert span_of({"range": "bytes=0-1", "if-range": '"e"'}, HELD).part
    assert not span_of({"range": "bytes=0-1", "if-range": '"x"'}, HELD).part
    assert not span_of({"range": "bytes=0-1", "if-range": "Sat, 07 Feb 2026 12:00:00 GMT"}, HELD).part


def test_conditions_name_versions() -> None:
    assert [
        check_conditions({"if-none-match": given}, HELD, reads=True) for given in ('"e"', 'W/"e"', '"a", "e"', "*")
    ] == [True] * 4
    assert [
        check_conditions(fields, HELD, reads=True) for fields in ({}, {"if-none-match": '"x"'}, {"if-none-match": "e"})
    ] == [False] * 3
    check_conditions({"if-match": '"a", "e"'}, HELD)
    for other in ('"x"', 'W/"e"', "e"):
        with pytest.raises(Refused) as caught:
            check_conditions({"if-match": other}, HELD)
        assert caught.value.refusal.status == 412


def test_an_upload_with_conditions_replaces_the_version_that_meets_them() -> None:
    for met in ({"if-match": "*"}, {"if-match": '"a", "e"'}, {"if-none-match": '"x"'}, {"if-unmodified-since": AFTER}):
        check_conditions(met, HELD)
    for met in ({"if-none-match": "*"}, {"if-unmodified-since": BEFORE}):
        check_conditions(met, None)
    for fields, held in (
        ({"if-match": 'W/"e"'}, HELD),
        ({"if-match": '"a", "b"'}, HELD),
        ({"if-none-match": 'W/"e"'}, HELD),
        ({"if-none-match": '"x", "e"'}, HELD),
        ({"if-unmodified-since": BEFORE}, HELD),
        ({"if-match": "*"}, None),
        ({"if-match": '"e"', "if-none-match": "*"}, None),
    ):
        with pytest.raises(Refused) as caught:
            check_conditions(fields, held)
        assert caught.value.refusal.status == 412


BEFORE, THEN, AFTER = (f"Sat, 07 Feb 2026 {at} GMT" for at in ("11:59:59", "12:00:00", "12:00:01"))


def test_dates_are_conditions_in_whole_seconds_where_no_etag_is_named() -> None:
    held = ObjectInfo("k", 10, '"e"', AT.replace(microsecond=999_999))
    assert [check_conditions({"if-modified-since": given}, held, reads=True) for given in (BEFORE, THEN, AFTER)] == [
        False,
        True,
        True,
    ]
    assert not check_conditions({"if-modified-since": AFTER, "if-none-match": '"x"'}, held, reads=True)
    for invalid in ("", "yesterday", "Sat, 99 Feb 2026 12:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -1400"):
        assert not check_conditions({"if-modified-since": invalid}, held, reads=True)
        check_conditions({"if-unmodified-since": invalid}, held)
    for later in (THEN, AFTER):
        check_conditions({"if-unmodified-since": later}, held)
    check_conditions({"if-unmodified-since": BEFORE, "if-match": '"e"'}, held)
    with pytest.raises(Refused) as caught:
        check_conditions({"if-unmodified-since": BEFORE}, held)
    assert (caught.value.refusal.status, caught.value.refusal.fault) == (412, "If-Unmodified-Since")


def test_reach_is_allowed_prefixes_and_the_callers_own_and_exports_are_read_only() -> None:
    reach = KeyPolicy(("a/", "telemetry/"), "telemetry/", "a/b/")
    assert reach.writes("a/b/c") == "a/b/c"
    for key in ("a/c", "b/x", "a", "a/b"):
        with pytest.raises(Refused) as caught:
            reach.reads(key)
        assert caught.value.refusal.status == 403
    exports = KeyPolicy((), "telemetry/")
    assert exports.reads("telemetry/x") == "telemetry/x"
    assert exports.writes("telemetry") == "telemetry"
    with pytest.raises(Refused, match="read-only"):
        exports.writes("telemetry/x")
    assert KeyPolicy((), None).writes("telemetry/x")
    table = KeyPolicy((), None, table="lake/")
    assert table.reads("lake/telemetry/data/a.parquet")
    for change in (table.writes, table.deletes):
        with pytest.raises(Refused, match="read-only"):
            change("lake/telemetry/data/a.parquet")
    with pytest.raises(Refused):
        KeyPolicy((), "").writes("any")
    with pytest.raises(Refused):
        reach.lists("a/")
    assert reach.lists("a/b/") == "a/b/"
    assert [KeyPolicy(("a/",), "a/x/").sweeps(key) for key in ("a/1", "a/x/1", "b")] == [True, False, False]
    assert [KeyPolicy(("a/",)).sweeps(key) for key in ("a/1", "b")] == [True, False]


ODD_KEYS = ["", "/a", "a/", "a//b", "a/../b", "./a", "..", "a\\b", "\\", "a\nb", "a\x7f", "k" * 1025, "a\ud800"]


@pytest.mark.parametrize("key", [*ODD_KEYS, ".headwater/x"])
def test_keys_that_no_new_object_may_have_are_422(key: str) -> None:
    with pytest.raises(Refused) as caught:
        KeyPolicy().writes(key)
    assert (caught.value.refusal.status, caught.value.refusal.fault) == (422, "key")


@pytest.mark.parametrize("key", ODD_KEYS)
def test_what_is_there_under_an_odd_key_is_for_the_store_to_find(key: str) -> None:
    assert KeyPolicy().reads(key) == KeyPolicy().deletes(key) == key


@pytest.mark.parametrize(
    "key", [".headwater/x", ".headwater\\x", "/.headwater/x", "a/../.headwater/x", "a\\..\\.headwater\\x"]
)
def test_no_form_of_a_key_leads_to_the_services_own(key: str) -> None:
    for use in (KeyPolicy().reads, KeyPolicy().deletes):
        with pytest.raises(Refused) as caught:
            use(key)
        assert caught.value.refusal.status == 422


@pytest.mark.parametrize(
    "key",
    [
        "telemetry\\d\\x",
        "telemetry/d\\x",
        "telemetry//x",
        "/telemetry/x",
        "a/../telemetry/x",
        "telemetry\\",
        "b/..\\telemetry/",
    ],
)
def test_no_form_of_a_key_leads_into_the_exports(key: str) -> None:
    for reach in (KeyPolicy((), "telemetry/", "", "telemetry/"), KeyPolicy((), None, "", "telemetry/")):
        assert reach.reads(key) == key
        with pytest.raises(Refused) as caught:
            reach.deletes(key)
        assert caught.value.refusal.status == 403
    assert KeyPolicy((), None, "", "telemetry/").deletes("telemetry/x") == "telemetry/x"


@pytest.mark.parametrize("key", ["team/../other/x", "team/..\\other", "team\\x", "/team/x"])
def test_no_form_of_a_key_leads_out_of_a_prefix(key: str) -> None:
    for reach in (KeyPolicy(("team/",)), KeyPolicy(own="team/")):
        with pytest.raises(Refused) as caught:
            reach.reads(key)
        assert caught.value.refusal.status == 403


def form_of(*parts: tuple[str, str | None, bytes], boundary: str = "b0und") -> bytes:
    body = b""
    for name, filename, data in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n'
        body += head.encode() + (b"Content-Type: text/x\r\n\r\n" if file else b"\r\n") + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


class Pieces:
    """A body that comes in pieces of random sizes."""

    def __init__(self, data: bytes, seed: int) -> None:
        self._stream, self._draw = io.BytesIO(data), random.Random(seed)  # noqa: S311

    def read(self, count: int, /) -> bytes:
        return self._stream.read(self._draw.randint(1, min(count, 50)))


def whole(form: FormReader) -> bytes:
    return b"".join(iter(lambda: form.read(7), b""))


@given(data=st.binary(max_size=300), seed=st.integers(0, 1000), noise=st.sampled_from([b"", b"\r\n--b0un", b"--b0und"]))
def test_the_file_of_a_form_comes_out_as_it_went_in(data: bytes, seed: int, noise: bytes) -> None:
    data = (data + noise).replace(b"\r\n--b0und", b"")
    body = form_of(("comment", None, b"hello"), ("file", "n.bin", data), ("more", None, b"x"))
    form = FormReader(Pieces(body, seed), "b0und")
    assert form.content_type == "text/x"
    assert whole(form) == data
    assert form.read(1) == b""


@given(cut=st.integers(0, 200), seed=st.integers(0, 100))
def test_a_form_that_breaks_off_is_never_whole(cut: int, seed: int) -> None:
    body = form_of(("file", "n", b"0123456789" * 5))
    end = body.rindex(b"--b0und--") + len(b"--b0und--")
    with pytest.raises(Refused) as caught:
        whole(FormReader(Pieces(body[: min(cut, end - 3)], seed), "b0und"))
    assert caught.value.refusal.status in (400, 422)


UNCHOSEN = ("file", "", b"")


@pytest.mark.parametrize(
    "body",
    [
        form_of(("comment", None, b"x")),
        form_of(("file", "a", b"1"), ("other", "b", b"2")),
        form_of(("file", "a", b"1"), ("other", "", b"2")),
        form_of(UNCHOSEN),
        form_of(UNCHOSEN, ("other", "", b"")),
        form_of(("file", None, b"")),
        b"",
        b"nonsense",
    ],
)
def test_a_form_without_exactly_one_file_is_refused(body: bytes) -> None:
    for size in (1, 7, 1000):
        with pytest.raises(Refused) as caught:
            whole(FormReader(Pieces(body, size), "b0und"))
        assert caught.value.refusal.status == (400 if body in (b"", b"nonsense") else 422)


@pytest.mark.parametrize("chosen", [("file", "empty.csv", b""), ("file", "", b"12"), ("file", None, b"12")])
def test_fields_in_which_no_file_was_chosen_are_not_a_file(chosen: tuple[str, str | None, bytes]) -> None:
    for parts in ((chosen,), (UNCHOSEN, chosen), (chosen, UNCHOSEN), (UNCHOSEN, chosen, UNCHOSEN)):
        assert whole(FormReader(Pieces(form_of(*parts), 3), "b0und")) == chosen[2]


def test_a_content_type_says_whether_it_is_a_form() -> None:
    assert boundary_of({}) is None
    assert boundary_of({"content-type": "text/csv"}) is None
    assert boundary_of({"content-type": 'Multipart/Form-Data; boundary="a b"'}) == "a b"
    for given_type in ("multipart/form-data", "multipart/mixed; boundary=x"):
        with pytest.raises(Refused):
            boundary_of({"content-type": given_type})


@pytest.mark.parametrize(
    ("said", "key", "wanted"),
    [
        ("text/x-mine", "a.csv", "text/x-mine"),
        ("", "a.csv", "text/csv"),
        ("application/x-www-form-urlencoded", "a/b.parquet", "application/vnd.apache.parquet"),
        ("application/octet-stream", "noending", "application/octet-stream"),
        ("tëxt", "a.json", "application/json"),
        ("", "a.csv.gz", "application/octet-stream"),
    ],
)
def test_the_type_is_what_was_said_or_what_the_ending_says(said: str, key: str, wanted: str) -> None:
    assert media_type(said, key) == wanted


def test_a_download_is_named_as_its_key_ends_and_nothing_breaks_out_of_the_header() -> None:
    assert disposition("a/b.csv") == 'attachment; filename="b.csv"'
    assert disposition('a/ü".csv') == "attachment; filename=\"__.csv\"; filename*=UTF-8''%C3%BC%22.csv"


def test_a_signed_link_holds_for_its_key_until_its_end_and_for_nothing_else(tmp_path: Path) -> None:
    now = AT
    links = SignedLinks(tmp_path / "data", lambda: now)
    path = links.link("a b/ü+%.csv", 60)
    signature = path.rpartition("=")[2]
    expires = int((AT + timedelta(seconds=60)).timestamp())
    SignedLinks(tmp_path / "data", lambda: now).check("a b/ü+%.csv", expires, signature)
    now = AT + timedelta(seconds=59)
    links.check("a b/ü+%.csv", expires, signature)
    wrong = [
        ("a b/ü+%.csv", AT + timedelta(seconds=60), expires, signature),
        ("a b/ü+%.csv", AT, expires + 1, signature),
        ("other", AT, expires, signature),
        ("a b/ü+%.csv", AT, expires, ""),
        ("a b/ü+%.csv", AT, expires, "\ud800ü"),
    ]
    for key, now, until, signed in wrong:  # noqa: B007 - the clock of the links
        with pytest.raises(Refused):
            links.check(key, until, signed)
    secret = tmp_path / "data" / "link.key"
    assert secret.stat().st_mode & 0o077 == 0
    assert len(list(secret.parent.iterdir())) == 1
    secret.unlink()
    with pytest.raises(Refused):
        links.check("a b/ü+%.csv", expires, signature)


def test_the_secret_of_links_is_on_the_disk_before_its_name_and_that_before_a_link_is_given(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.recorded():
        SignedLinks(tmp_path, lambda: AT).link(HELD.key, 60)
    assert [each.what for each in disk.effects] == ["flush", "link", "flush", "remove"]
    assert (disk.effects[0].size_bytes, disk.effects[1].target, disk.effects[2].path) == (
        SECRET_BYTES,
        tmp_path / SECRET_NAME,
        tmp_path,
    )


def test_a_form_holds_for_its_fields_until_its_end_and_for_nothing_else(tmp_path: Path) -> None:
    now, end = AT, AT + timedelta(seconds=60)
    links = SignedLinks(tmp_path, lambda: now)
    url, fields = links.form("a b/ü.csv", "text/csv", range(1, 6), 60)
    assert url == "/s3/shared"
    given = list(fields.items())
    right = ("a b/ü.csv", "text/csv", range(1, 6))
    assert links.check_form([(name.upper(), value) for name, value in given]) == right
    other = dict(links.form("other", "text/csv", range(1, 6), 60)[1])
    for wrong in (
        [],
        [*given, ("x-amz-meta-a", "b")],
        [*given, ("key", "a b/ü.csv")],
        [(name, value) for name, value in given if name != "key"],
        *(
            [(name, changed if name == field else value) for name, value in given]
            for field, changed in other.items()
            if fields[field] != changed
        ),
        *([(name, "\ud800ü" if name == field else value) for name, value in given] for field in fields),
    ):
        with pytest.raises(Refused) as caught:
            links.check_form(wrong)
        assert caught.value.refusal.status == 403
    with pytest.raises(Refused):  # what is signed of a form never opens a link
        links.check("a b/ü.csv", int(end.timestamp()), fields["signature"])
    now = end - timedelta(seconds=1)
    assert links.check_form(given) == right
    now = end
    with pytest.raises(Refused, match="expired"):
        links.check_form(given)


def test_the_texts_before_the_file_of_a_form_are_its_fields() -> None:
    form = FormReader(
        Pieces(
            form_of(("key", None, "ü".encode()), UNCHOSEN, ("b", None, b""), ("file", "n", b"1"), ("c", None, b"x")), 3
        ),
        "b0und",
    )
    assert form.fields == [("key", "ü"), ("b", "")]
    assert whole(form) == b"1"
    with pytest.raises(Refused, match="longer"):
        FormReader(io.BytesIO(form_of(("key", None, bytes(70_000)), ("file", "n", b"1"))), "b0und")


async def blocks(data: bytes, size: int, *, breaks: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        await asyncio.sleep(0)
        yield data[start : start + size]
    if breaks:
        raise ConnectionError("gone")


def test_a_body_reaches_the_thread_whole_or_not_at_all() -> None:
    data = random.Random(1).randbytes(3_000_000)  # noqa: S311
    seen: list[BaseException] = []

    def take(feed: ReadableBody) -> bytes:
        try:
            return b"".join(iter(lambda: feed.read(100_000), b""))
        except Transient as error:
            seen.append(error)
            raise

    def refuse(feed: ReadableBody) -> bytes:
        feed.read(10)
        raise Refused(422, "no", "no")

    with ThreadPoolExecutor(1) as threads:
        for size in (1, 65_536, 1_000_000):
            sent = data[: size * 5000]
            assert asyncio.run(run_with_body(blocks(sent, size), threads, take)) == sent
        with pytest.raises(ConnectionError):
            asyncio.run(run_with_body(blocks(data, 65_536, breaks=True), threads, take))
        with pytest.raises(Refused):
            asyncio.run(run_with_body(blocks(data, 65_536), threads, refuse))
    assert len(seen) == 1
