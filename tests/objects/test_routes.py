"""/s3 over HTTP, with the real daemon on a directory and on a bucket. Each test uses keys of its own."""

import hashlib
import itertools
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from daemon import Daemons
from objects_served import MIB, bucket_environ
from seaweed import Seaweed

numbers = itertools.count(1)
WORDS = ("a b+c%25/ü😀&x=1#?.txt", "quote'\"<x>/~tilde!*().txt")


def fresh() -> str:
    return f"t{next(numbers)}/path/to/file"


def upload(objects: httpx.Client, key: str, data: bytes, **how: Any) -> httpx.Response:
    return objects.post("/upload", params={"key": key}, files={"file": ("name.bin", data)}, **how)


def download(objects: httpx.Client, key: str, **headers: str) -> httpx.Response:
    return objects.get("/download", params={"key": key}, headers={n.replace("_", "-"): v for n, v in headers.items()})


def test_documented_requests_have_the_documented_answers(objects: httpx.Client) -> None:
    key = fresh()
    answer = upload(objects, key, b"x" * 1024)
    assert (answer.status_code, list(answer.json())) == (200, ["key", "etag", "version_id", "size"])
    etag = answer.json()["etag"]
    assert answer.json() == {"key": key, "etag": etag, "version_id": None, "size": 1024}
    assert re.fullmatch(r'"[^"]+"', etag)
    folder = key.removesuffix("file")
    listed = objects.get("/objects", params={"prefix": folder}).json()
    modified = listed["objects"][0].pop("LastModified")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", modified)
    assert listed == {"prefix": folder, "objects": [{"Key": key, "Size": 1024, "ETag": etag}], "count": 1}
    info = objects.get("/object-info", params={"key": key}).json()
    assert (info["key"], info["exists"], info["size"], info["etag"]) == (key, True, 1024, etag)
    assert info["metadata"] == {}
    missing = objects.get("/object-info", params={"key": folder + "none"})
    assert (missing.status_code, missing.json()) == (200, {"key": folder + "none", "exists": False, "size": None})
    got = download(objects, key)
    assert (got.content, got.headers["etag"], got.headers["content-length"]) == (b"x" * 1024, etag, "1024")
    assert got.headers["content-disposition"] == 'attachment; filename="file"'
    put = objects.put("/update", params={"key": key}, files={"file": b"second"})
    assert (put.status_code, put.json()["size"]) == (200, 6)
    patched = objects.patch("/patch", params={"key": key, "offset": 0}, files={"file": b"S"})
    assert (patched.status_code, patched.json()["size"], patched.json()["guarded"]) == (200, 6, True)
    assert download(objects, key).content == b"Second"
    deleted = objects.delete("/delete", params={"key": key})
    assert (deleted.status_code, deleted.json()) == (200, {"key": key, "deleted": True})
    for method, path in (
        ("GET", "download"),
        ("PUT", "update"),
        ("PATCH", "patch"),
        ("DELETE", "delete"),
        ("GET", "link"),
    ):
        gone = objects.request(method, f"/{path}", params={"key": key})
        assert (gone.status_code, gone.json()["error"]["field"]) == (404, "key"), path


@pytest.mark.parametrize("size", [0, 1, 70_000, 9 * MIB + 1])
def test_bytes_come_back_however_they_are_sent(objects: httpx.Client, size: int) -> None:
    data = os.urandom(size)
    key = fresh()
    sent = [
        upload(objects, key, data),
        objects.post("/upload", params={"key": key}, content=data),
        objects.post("/upload", params={"key": key}, content=iter([data[: size // 3], data[size // 3 :]])),
    ]
    for answer in sent:
        assert (answer.status_code, answer.json()["size"]) == (200, size)
        assert download(objects, key).content == data


def test_ranges_conditions_and_head(objects: httpx.Client) -> None:
    key = fresh() + ".csv"
    data = os.urandom(300_000)
    etag = upload(objects, key, data).json()["etag"]
    part = download(objects, key, range="bytes=100000-200000")
    assert (part.status_code, part.content) == (206, data[100_000:200_001])
    assert part.headers["content-range"] == "bytes 100000-200000/300000"
    assert download(objects, key, range="bytes=-5").content == data[-5:]
    behind = download(objects, key, range="bytes=300000-")
    assert (behind.status_code, behind.headers["content-range"]) == (416, "bytes */300000")
    same = download(objects, key, if_none_match=etag)
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert download(objects, key, if_none_match='"other"').status_code == 200
    assert download(objects, key, if_match='"other"').status_code == 412
    head = objects.head("/download", params={"key": key}, headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"], head.content) == (206, "10", b"")
    assert objects.head("/download", params={"key": key}).headers["content-length"] == "300000"


def test_a_patch_overwrites_grows_and_appends(objects: httpx.Client) -> None:
    key = fresh() + ".parquet"
    upload(objects, key, b"0123456789", headers={"X": "y"})
    for offset, new, wanted in ((3, b"abc", b"012abc6789"), (8, b"XYZ", b"012abc67XYZ"), (11, b"!", b"012abc67XYZ!")):
        answer = objects.patch("/patch", params={"key": key, "offset": offset}, content=new)
        assert (answer.status_code, answer.json()["size"], answer.json()["offset"]) == (200, len(wanted), offset)
        assert "Parquet" in answer.json()["warning"]
        assert download(objects, key).content == wanted
    behind = objects.patch("/patch", params={"key": key, "offset": 13}, content=b"?")
    assert (behind.status_code, behind.json()["error"]["field"]) == (416, "offset")
    assert objects.patch("/patch", params={"key": key, "offset": -1}, content=b"?").status_code == 422
    assert download(objects, key).content == b"012abc67XYZ!"


def test_races_are_told_apart_from_conditions_of_the_caller(objects: httpx.Client) -> None:
    key = fresh()
    etag = upload(objects, key, bytes(1000)).json()["etag"]

    def patch(letter: bytes) -> httpx.Response:
        return objects.patch("/patch", params={"key": key, "offset": 10}, content=letter * 50)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(patch, [letter.to_bytes() for letter in b"abcdefgh"]))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert any(answer.status_code == 200 for answer in answers)
    assert all("send it again" in answer.json()["error"]["hint"] for answer in answers if answer.status_code == 409)
    content = download(objects, key).content
    assert content == bytes(10) + content[10:11] * 50 + bytes(940)
    stale = {"If-Match": etag}
    assert objects.patch("/patch", params={"key": key}, content=b"x", headers=stale).status_code == 412
    assert objects.put("/update", params={"key": key}, content=b"x", headers=stale).status_code == 412
    assert upload(objects, key, b"x", headers=stale).status_code == 412
    assert upload(objects, key, b"x", headers={"If-None-Match": "*"}).status_code == 412
    assert upload(objects, fresh(), b"x", headers={"If-None-Match": "*"}).status_code == 200
    assert objects.delete("/delete", params={"key": key}, headers=stale).status_code == 412
    assert download(objects, key).content == content


def test_conditions_hold_for_every_change_and_a_misspelt_parameter_changes_nothing(objects: httpx.Client) -> None:
    key = fresh()
    etag = upload(objects, key, b"old").json()["etag"]
    long_ago = "Sun, 06 Nov 1994 08:49:37 GMT"
    for unmet in ({"If-Match": f"W/{etag}"}, {"If-None-Match": f'"x", W/{etag}'}, {"If-Unmodified-Since": long_ago}):
        for method, path in (("POST", "upload"), ("PUT", "update"), ("PATCH", "patch"), ("DELETE", "delete")):
            answer = objects.request(method, f"/{path}", params={"key": key}, headers=unmet)
            assert (answer.status_code, download(objects, key).content) == (412, b"old"), (unmet, path)
    twice = [("If-None-Match", '"x"'), ("If-None-Match", etag)]
    assert objects.get("/download", params={"key": key}, headers=twice).status_code == 304
    misspelt = objects.patch("/patch", params={"key": key, "ofset": 2}, content=b"X")
    assert (misspelt.status_code, misspelt.json()["error"]["field"]) == (422, "ofset")
    assert upload(objects, key, b"x", headers={"x-amz-acl": "public-read"}).status_code == 422
    assert download(objects, key, Range=f"bytes=1-{'9' * 30}").content == b"ld"
    assert download(objects, key, Range=f"bytes={'9' * 30}-").status_code == 416
    assert upload(objects, key, b"new", headers={"If-Match": f'"x", {etag}'}).status_code == 200
    assert upload(objects, key, b"newer", headers={"If-Match": "*"}).status_code == 200
    assert upload(objects, fresh(), b"x", headers={"If-Match": "*"}).status_code == 412


def test_strange_keys_are_kept_to_the_letter_and_bad_ones_refused(objects: httpx.Client) -> None:
    for word in WORDS:
        key = f"{fresh()}/{word}"
        assert upload(objects, key, word.encode()).json()["key"] == key
        assert download(objects, key).content == word.encode()
        assert [each["Key"] for each in objects.get("/objects", params={"prefix": key}).json()["objects"]] == [key]
        assert objects.delete("/delete", params={"key": key}).status_code == 200
    for key in ("", "/a", "a/", "a//b", "a/../b", "..", "a\nb", "a\0b", "k" * 1025, "ü" * 513, ".headwater/x"):
        for method, path in (("POST", "upload"), ("GET", "download"), ("GET", "object-info"), ("DELETE", "delete")):
            refused = objects.request(method, f"/{path}", params={"key": key})
            assert (refused.status_code, refused.json()["error"]["field"]) == (422, "key"), (path, key)
    assert objects.get("/download?key=%ff").status_code == 422
    assert objects.get("/download").status_code == 422


@pytest.mark.parametrize("name", ["x", "_headwater/layout.json", "_set_aside/D1/export_120000.no-device-tag.txt"])
def test_exports_and_what_lies_beside_them_are_read_only(objects: httpx.Client, name: str) -> None:
    key = f"telemetry/{name}"
    for refused in (
        upload(objects, key, b"1"),
        objects.put("/update", params={"key": key}, content=b"1"),
        objects.patch("/patch", params={"key": key, "offset": 0}, content=b"1"),
        objects.delete("/delete", params={"key": key}),
    ):
        assert refused.status_code == 403
        assert "S3_ROUTES_WRITE_EXPORTS" in refused.json()["error"]["hint"]


def test_listings_have_folders_and_pages(objects: httpx.Client) -> None:
    folder = fresh() + "/"
    for name in ("1", "2", "b/3", "b/4", "c/5"):
        upload(objects, folder + name, b"x")
    level = objects.get("/objects", params={"prefix": folder, "delimiter": "/"}).json()
    assert sorted(each["Key"] for each in level["objects"]) == [folder + "1", folder + "2"]
    assert level["common_prefixes"] == [folder + "b/", folder + "c/"]
    names: list[str] = []
    continuation = ""
    while True:
        params: dict[str, str] = {"prefix": folder, "limit": "2", "continuation": continuation}
        page = objects.get("/objects", params=params).json()
        names += [each["Key"] for each in page["objects"]]
        continuation = page.get("continuation", "")
        if not continuation:
            break
    assert sorted(names) == [folder + name for name in ("1", "2", "b/3", "b/4", "c/5")]
    for wrong in ({"limit": 0}, {"limit": 1001}, {"prefix": "a\nb"}):
        assert objects.get("/objects", params=wrong).status_code == 422


UNCHOSEN = b'--B\r\nContent-Disposition: form-data; name="file"; filename=""\r\n\r\n\r\n--B--\r\n'


def test_a_form_without_a_chosen_file_and_a_parameter_given_twice_change_nothing(objects: httpx.Client) -> None:
    key = fresh()
    upload(objects, key, b"precious")
    form = {"content": UNCHOSEN, "headers": {"Content-Type": "multipart/form-data; boundary=B"}}
    for params, body in (({"key": key}, form), ({"key": [key, key]}, {"content": b"1"})):
        for method, path in (("POST", "upload"), ("PUT", "update"), ("PATCH", "patch")):
            refused = objects.request(method, f"/{path}", params=params, **body)
            assert (refused.status_code, refused.json()["error"]["field"]) == (422, "key" if body != form else "file")
    assert objects.delete("/delete", params={"key": [key, key]}).status_code == 422
    got = download(objects, key)
    assert got.content == b"precious"
    assert download(objects, key, If_Modified_Since=got.headers["last-modified"]).status_code == 304
    assert download(objects, key, Range="BYTES=0-3").content == b"prec"


def test_a_link_reads_one_object_without_a_key_for_a_while(objects: httpx.Client) -> None:
    key = f"{fresh()}/{WORDS[0]}"
    upload(objects, key, b"linked bytes")
    link = objects.get("/link", params={"key": key, "expires": 60}).json()
    assert list(link) == ["key", "url", "expires_at"]
    got = httpx.get(link["url"])
    assert (got.status_code, got.content) == (200, b"linked bytes")
    assert got.headers["content-disposition"].startswith("attachment")
    assert httpx.get(link["url"], headers={"Range": "bytes=0-5"}).content == b"linked"
    changed = re.sub(r"ignature=.", "ignature=0", link["url"])
    other = changed if changed != link["url"] else re.sub(r"ignature=.", "ignature=1", link["url"])
    assert httpx.get(other).status_code == 403
    for seconds in (0, 604_801):
        assert objects.get("/link", params={"key": key, "expires": seconds}).status_code == 422


def test_an_upload_link_stores_one_object_of_exactly_its_key_and_type_in_its_sizes(objects: httpx.Client) -> None:
    key = f"{fresh()}/{WORDS[0]}"
    sizes = {"min_bytes": 2, "max_bytes": 5}
    link = objects.get("/upload-link", params={"key": key, "expires": 60, "content_type": "text/x-own", **sizes}).json()
    assert (link["key"], link["content_type"], link["min_bytes"], link["max_bytes"]) == (key, "text/x-own", 2, 5)

    def send(data: bytes, **changed: str) -> httpx.Response:
        return httpx.post(link["url"], data={**link["fields"], **changed}, files={"file": ("n", data)})

    refused = [send(b"1"), send(b"123456"), send(b"123", key=key + "x"), send(b"123", **{"Content-Type": "text/html"})]
    refused += [send(b"123", **{"x-amz-meta-a": "b"}), send(b"123", policy=link["fields"]["policy"][:-8] + "AAAAAA==")]
    assert [answer.status_code for answer in refused] == [400, 400, 403, 403, 403, 403]
    for each in (key, key + "x"):
        assert not objects.get("/object-info", params={"key": each}).json()["exists"]
    done = send(b"12345")
    assert (done.status_code, done.content) == (204, b"")
    info = objects.get("/object-info", params={"key": key}).json()
    assert (info["etag"], info["size"], info["content_type"]) == (done.headers["etag"], 5, "text/x-own")
    default = objects.get("/upload-link", params={"key": "a.csv"}).json()
    assert (default["content_type"], default["min_bytes"], default["max_bytes"]) == ("text/csv", 0, 40 * MIB)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"key": "telemetry/x"}, 403),
        ({"key": "a//b"}, 422),
        ({"key": "a\\b"}, 422),
        ({"key": ".headwater/x"}, 422),
        ({"key": "a/${filename}"}, 422),
        ({"key": "a", "min_bytes": 3, "max_bytes": 2}, 422),
        ({"key": "a", "max_bytes": 40 * MIB + 1}, 422),
        ({"key": "a", "expires": 604_801}, 422),
    ],
)
def test_an_upload_link_for_what_the_caller_may_not_write_is_refused(
    objects: httpx.Client, asked: dict[str, Any], status: int
) -> None:
    assert objects.get("/upload-link", params=asked).status_code == status


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ({"files": {"a": b"1", "b": b"2"}}, 422),
        ({"data": {"a": "1"}, "files": {}, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"1", "headers": {"Content-Type": "multipart/form-data"}}, 415),
        ({"content": bytes(40 * MIB + 1)}, 413),
        ({"content": [bytes(40 * MIB), b"1"]}, 413),
        ({"content": b"1", "headers": {"If-Match": "*"}}, 412),
    ],
)
def test_bodies_that_cannot_be_stored_are_refused_and_store_nothing(
    objects: httpx.Client, how: dict[str, Any], status: int
) -> None:
    key = fresh()
    try:
        content = iter(how["content"]) if isinstance(how.get("content"), list) else how.get("content")
        refused = objects.post("/upload", params={"key": key}, **{**how, "content": content})
    except httpx.WriteError:
        assert status == 413  # the connection is closed on a body that is far too large
    else:
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["hint"]
    assert not objects.get("/object-info", params={"key": key}).json()["exists"]


def test_an_upload_that_breaks_off_stores_nothing(objects: httpx.Client) -> None:
    key = fresh()
    url = objects.base_url
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(
            f"POST /s3/upload?key={key} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: 99\r\n\r\nx".encode()
        )
    assert not objects.get("/object-info", params={"key": key}).json()["exists"]


@pytest.mark.slow
def test_a_keys_own_prefix_and_the_allowed_prefixes_confine_it(daemons: Daemons, seaweed: Seaweed) -> None:
    secrets = {name: f"hw_{name}_{(name * 43)[:43]}" for name in ("own", "all", "reader")}
    digest = {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in secrets.items()}
    keys = f"own:s3:read+s3:write:a/own/:{digest['own']},all:write:{digest['all']},reader:s3:read:{digest['reader']}"
    environ = {"API_KEYS": keys, "S3_ALLOWED_PREFIXES": "a/,b/", **bucket_environ(seaweed, seaweed.new_bucket())}
    daemon = daemons.start("", wait=True, key="", **environ)

    def status(name: str, method: str, path: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {secrets[name]}"} if name else {}
        return httpx.request(method, f"{daemon.url}/s3/{path}", params={"key": key}, headers=headers).status_code

    assert status("own", "POST", "upload", "a/own/x") == 200
    assert [status("own", "POST", "upload", key) for key in ("a/x", "b/x", "a/ownx")] == [403] * 3
    assert [status("all", "POST", "upload", key) for key in ("a/y", "b/y", "c/y")] == [200, 200, 403]
    assert [status("own", "GET", "download", key) for key in ("a/own/x", "a/y", "a/none")] == [200, 403, 403]
    assert [status("own", "GET", "object-info", key) for key in ("a/own/x", "a/none")] == [200, 403]
    assert status("own", "DELETE", "delete", "a/own/x") == 403
    assert [status("reader", "POST", "upload", "a/z"), status("reader", "GET", "link", "a/y")] == [403, 200]
    assert [status("own", "GET", "upload-link", key) for key in ("a/own/new", "a/new", "c/new")] == [200, 403, 403]
    assert status("reader", "GET", "upload-link", "a/new") == 403
    headers = {"Authorization": f"Bearer {secrets['own']}"}
    listings = [httpx.get(f"{daemon.url}/s3/objects", params={"prefix": p}, headers=headers) for p in ("a/own/", "a/")]
    assert [listing.status_code for listing in listings] == [200, 403]
    assert status("", "GET", "download", "a/y") == 401
    assert status("", "GET", "shared", "a/y") == 422
