"""What a request says and promises of its bytes: kept, told again, checked. Over HTTP, on each store."""

import base64
import hashlib
import itertools
import zlib
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

numbers = itertools.count(1)
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
VALUES = st.builds(" ".join, st.lists(TEXT, min_size=1, max_size=3))
TAG = st.text(st.sampled_from("aZ09 +-=.:/@_"), min_size=1, max_size=20).filter(lambda text: text == text.strip())
SENT = st.fixed_dictionaries(
    {},
    optional={
        "content-encoding": st.sampled_from(["gzip", "br", "x-own, gzip"]),
        "cache-control": VALUES,
        "content-disposition": st.builds("{}; filename={}".format, st.sampled_from(["inline", "attachment"]), TEXT),
        "content-language": VALUES,
        "expires": st.sampled_from(["Thu, 01 Jan 2032 00:00:00 GMT", "Sat, 29 Feb 2020 23:59:59 GMT"]),
        "x-amz-tagging": st.dictionaries(TAG, TAG, min_size=1, max_size=3).map(urlencode),
        "x-amz-meta-owner": VALUES,
        "x-amz-meta-a-b.c_d": VALUES,
    },
)
KEPT = ("content-encoding", "cache-control", "content-disposition", "content-language", "expires")


def raw(objects: httpx.Client, key: str) -> tuple[bytes, httpx.Headers]:
    with objects.stream("GET", "/download", params={"key": key}) as answer:
        return b"".join(answer.iter_raw()), answer.headers


def check(objects: httpx.Client, key: str, sent: dict[str, str], data: bytes) -> None:
    """`sent` is what the object keeps, and all that it keeps."""
    info = objects.get("/object-info", params={"key": key}).json()
    assert {name: info.get(name.replace("-", "_")) for name in KEPT} == {name: sent.get(name) for name in KEPT}
    metadata = {name[11:]: value for name, value in sent.items() if name.startswith("x-amz-meta-")}
    assert info["metadata"] == metadata
    tags = info.get("tags", {})
    assert tags == dict(httpx.QueryParams(sent.get("x-amz-tagging", "")))
    body, headers = raw(objects, key)
    assert body == data
    assert {name[11:]: value for name, value in headers.items() if name.startswith("x-amz-meta-")} == metadata
    assert headers.get("x-amz-tagging-count", "0") == str(len(tags))
    for name in ("content-encoding", "content-language", "expires"):
        assert headers.get(name) == sent.get(name)
    assert headers["cache-control"] == sent.get("cache-control", "private, no-cache")
    kind, _, name = headers["content-disposition"].partition("; ")
    assert kind == "attachment"
    if "content-disposition" in sent:
        assert name == sent["content-disposition"].partition("; ")[2]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(first=SENT, second=SENT)
@example(first={"content-encoding": "gzip", "x-amz-meta-owner": "me"}, second={})
def test_headers_metadata_and_tags_survive_upload_update_patch_and_download(
    objects: httpx.Client, first: dict[str, str], second: dict[str, str]
) -> None:
    key = f"headers{next(numbers)}/file"
    assert objects.post("/upload", params={"key": key}, content=b"first", headers=first).status_code == 200
    check(objects, key, first, b"first")
    assert objects.patch("/patch", params={"key": key, "offset": 2}, content=b"XY!!").status_code == 200
    check(objects, key, first, b"fiXY!!")
    assert objects.put("/update", params={"key": key}, files={"file": b"second"}, headers=second).status_code == 200
    kept = {name: value for name, value in first.items() if name != "content-encoding"}
    if any(name.startswith("x-amz-meta-") for name in second):
        kept = {name: value for name, value in kept.items() if not name.startswith("x-amz-meta-")}
    check(objects, key, {**kept, **second}, b"second")
    assert objects.post("/upload", params={"key": key}, content=b"bare").status_code == 200
    check(objects, key, {}, b"bare")


def test_an_update_keeps_gzip_only_where_its_bytes_are_gzip_and_an_empty_header_removes(objects: httpx.Client) -> None:
    key = f"headers{next(numbers)}/file.csv"
    sent = {"content-encoding": "gzip", "cache-control": "max-age=9", "content-type": "text/x-own"}
    params = {"key": key}
    objects.post("/upload", params=params, content=b"\x1f\x8b1", headers=sent)
    objects.put("/update", params=params, content=b"\x1f\x8b2")
    check(objects, key, {"content-encoding": "gzip", "cache-control": "max-age=9"}, b"\x1f\x8b2")
    assert objects.get("/object-info", params=params).json()["content_type"] == "text/x-own"
    objects.put("/update", params=params, content=b"\x1f\x8b3", headers={"content-encoding": "identity"})
    check(objects, key, {"cache-control": "max-age=9"}, b"\x1f\x8b3")
    objects.put("/update", params=params, content=b"\x1f", headers={"cache-control": ""})
    check(objects, key, {}, b"\x1f")


@pytest.mark.parametrize(
    "sent",
    [
        {"expires": "tomorrow"},
        {"content-encoding": "aws-chunked"},
        {"content-encoding": "gzip,aws-chunked"},
        {"cache-control": "x" * 1025},
        {"content-disposition": "attachment; filename=ü.csv".encode()},
        {"x-amz-meta-a": "ü".encode()},
        {"x-amz-meta-a": ""},
        {"x-amz-meta-a": "x" * 2000},
        {"x-amz-meta-headwater-write": "mine"},
        {"x-amz-tagging": "a=1&a=2"},
        {"x-amz-tagging": "=1"},
        {"x-amz-tagging": urlencode({str(number): "v" for number in range(11)})},
        {"x-amz-tagging": "a=" + "x" * 257},
        {"x-amz-tagging": "a=%ff"},
        {"x-amz-tagging": "a=" + quote("<b>")},
        {"x-amz-server-side-encryption": "AES256"},
        {"x-amz-storage-class": "GLACIER"},
        {"x-amz-checksum-crc32c": "AAAAAA=="},
        {"x-amz-checksum-crc64nvme": "AAAAAAAAAAA="},
        {"x-amz-trailer": "x-amz-checksum-crc32"},
        {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"},
    ],
    ids=str,
)
def test_what_some_store_would_refuse_or_change_is_refused_by_all_and_stores_nothing(
    objects: httpx.Client, sent: dict[str, Any]
) -> None:
    key = f"headers{next(numbers)}/file"
    refused = objects.post("/upload", params={"key": key}, content=b"1", headers=sent)
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["field"].startswith(next(iter(sent))[:11])
    assert not objects.get("/object-info", params={"key": key}).json()["exists"]


@pytest.mark.parametrize(("method", "path"), [("POST", "upload"), ("PUT", "update"), ("PATCH", "patch")])
def test_a_part_of_a_file_as_curl_continues_uploads_never_replaces_the_whole(
    objects: httpx.Client, method: str, path: str
) -> None:
    key = f"headers{next(numbers)}/file"
    objects.post("/upload", params={"key": key}, content=b"0123456789")
    rest = {"content-range": "bytes 5-9/10"}
    refused = objects.request(method, f"/{path}", params={"key": key}, content=b"56789", headers=rest)
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "Content-Range")
    assert raw(objects, key)[0] == b"0123456789"


def promises(data: bytes) -> dict[str, str]:
    digests = {
        "content-md5": hashlib.md5(data, usedforsecurity=False).digest(),
        "x-amz-checksum-crc32": zlib.crc32(data).to_bytes(4),
        "x-amz-checksum-sha1": hashlib.sha1(data, usedforsecurity=False).digest(),
        "x-amz-checksum-sha256": hashlib.sha256(data).digest(),
    }
    standard = f"md5=:AAAA:, SHA-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"
    return {
        **{name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        "content-digest": standard,
        "repr-digest": standard,
    }


def test_a_checksum_that_does_not_match_is_400_and_changes_nothing(objects: httpx.Client) -> None:
    key = f"headers{next(numbers)}/file"
    data, small = bytes(range(256)) * 4 * 9 * 1024, b"12345"  # 9 MiB: more than a part
    objects.post("/upload", params={"key": key}, content=b"old", headers={"x-amz-meta-a": "b"})
    etag = objects.get("/object-info", params={"key": key}).json()["etag"]
    for name, promised in promises(b"other").items():
        for body in ({"content": small}, {"files": {"file": ("n", small)}}):
            for method, path in (("POST", "upload"), ("PUT", "update"), ("PATCH", "patch")):
                answer = objects.request(method, f"/{path}", params={"key": key}, headers={name: promised}, **body)
                assert (answer.status_code, answer.json()["error"]["field"]) == (400, name)
    for method, path in (("POST", "upload"), ("PATCH", "patch")):
        headers = {"x-amz-checksum-crc32": promises(small)["x-amz-checksum-crc32"]}
        answer = objects.request(method, f"/{path}", params={"key": key}, headers=headers, content=data)
        assert answer.status_code == 400
    for invalid in ("", "AA==", "no base64", promises(small)["x-amz-checksum-sha1"]):
        answer = objects.post("/upload", params={"key": key}, headers={"content-md5": invalid}, content=small)
        assert answer.status_code == 400
    info = objects.get("/object-info", params={"key": key}).json()
    assert (info["etag"], info["size"], info["metadata"]) == (etag, 3, {"a": "b"})


def test_the_hash_of_a_signed_request_holds_for_bare_bytes_and_covers_more_than_the_file_of_a_form(
    objects: httpx.Client,
) -> None:
    params = {"key": f"headers{next(numbers)}/file"}
    right, wrong = (hashlib.sha256(data).hexdigest() for data in (b"12345", b"other"))
    for hashed, status in ((right, 200), ("UNSIGNED-PAYLOAD", 200), (wrong, 400), ("no hash", 400)):
        headers = {"x-amz-content-sha256": hashed}
        assert objects.post("/upload", params=params, content=b"12345", headers=headers).status_code == status
        form = {"file": ("n", b"12345")}
        assert objects.post("/upload", params=params, files=form, headers=headers).status_code == 200


def test_bytes_with_the_promised_checksums_are_stored(objects: httpx.Client) -> None:
    key = f"headers{next(numbers)}/file"
    for data in (b"", b"12345", bytes(9 << 20)):
        headers = {**promises(data), "x-amz-checksum-algorithm": "CRC32"}
        assert objects.post("/upload", params={"key": key}, content=data, headers=headers).status_code == 200
        assert (
            objects.put("/update", params={"key": key}, files={"file": ("n", data)}, headers=headers).status_code == 200
        )
        assert raw(objects, key)[0] == data
    patched = objects.patch("/patch", params={"key": key, "offset": 1}, content=b"12", headers=promises(b"12"))
    assert patched.status_code == 200
