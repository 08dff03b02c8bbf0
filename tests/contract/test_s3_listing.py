"""Listings of a bucket say what the SDK says of the same answer, or fail; never fewer objects than there are."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.parse import quote_plus

import pytest

from app.core.errors import Transient
from app.object_store.port import ObjectInfo
from app.object_store.s3 import S3Store
from app.object_store.s3_client import TAKEN, S3Target, info_of, make_client
from fault_proxy import FaultProxy, answer
from object_stores import keys, put, s3_store

SPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
WHEN = "2026-02-07T10:00:00.123Z"
ODD_KEYS = (
    "t/a&b<c>d+e%f g.x",
    "t/%2B%26&amp;",
    "t/ü/日本語/😀",
    "t/\x01\x1f\x7f.x",
    "t/]]>'\"",
    "t/IsTruncated",
    "t//",
)


def entry(key: str, etag: str = "&quot;0123&quot;", when: str = WHEN, more: str = "") -> str:
    """One entry in the form of S3."""
    body = f"<Key>{key}</Key><LastModified>{when}</LastModified><ETag>{etag}</ETag><Size>12</Size>{more}"
    return f"<Contents>{body}<StorageClass>STANDARD</StorageClass></Contents>"


def page(entries: str, *, space: str = SPACE, encoded: bool = True, more: str = "") -> bytes:
    """One answer. Without `more` it is the last."""
    encoding = "<EncodingType>url</EncodingType>" if encoded else ""
    truncated = more or "<IsTruncated>false</IsTruncated>"
    head = f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult{space}><Name>b</Name>{truncated}'
    return f"{head}{entries}{encoding}</ListBucketResult>".encode()


URLS = "".join(entry(quote_plus(key, safe="/")) for key in ODD_KEYS)
PLAIN = [key for key in ODD_KEYS if "\x01" not in key]
XML = "".join(entry(key.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")) for key in PLAIN)
CHECKSUMS = "<ChecksumAlgorithm>CRC32</ChecksumAlgorithm><ChecksumType>FULL</ChecksumType>"
FOLDER = "<CommonPrefixes><Prefix>t/x/</Prefix></CommonPrefixes>"
TURNED = f"<Contents><Size>5</Size><ETag>e</ETag><LastModified>{WHEN}</LastModified><Key>t/1</Key></Contents>"
OWNER = "<Owner><ID>1</ID><DisplayName>d</DisplayName></Owner>"
SAME = {
    "keys as in a URL": page(URLS),
    "keys as in XML": page(XML, encoded=False),
    "keys that are in no need of it": page(entry("t/a%20b+c"), encoded=False),
    "nothing": page(""),
    "ETags": page(entry("t/1", '"a"') + entry("t/2", "&#34;b&#x22;") + entry("t/3", "c") + entry("t/4", "")),
    "instants": page(
        entry("t/1", when="2026-02-07T12:00:00+02:00")
        + entry("t/2", when="Sat, 07 Feb 2026 10:00:00 GMT")
        + entry("t/3", when="2026-02-07T10:00:00Z")
    ),
    "owners": page(entry("t/1", more=OWNER) + entry("t/2")),
    "checksums": page(entry("t/1", more=CHECKSUMS)),
    "line ends between": page(entry("t/1") + "\n  " + entry("t/2") + "\n"),
    "no namespace": page(entry("t/1"), space=""),
    "another order": page(TURNED),
    "a comment": page("<!-- <Contents> -->" + entry("t/1") + "<!-- </Contents> -->"),
    "CDATA": page(entry("<![CDATA[t/<Contents>&]]>"), encoded=False),
    "a prefix": page(
        entry("t/1").replace("<", "<s:").replace("<s:/", "</s:"), space=SPACE + SPACE.replace("xmlns", "xmlns:s")
    ),
    "an entry with an attribute": page(
        entry("t/1") + entry("t/2").replace("<Contents>", '<Contents a="b">') + entry("t/3")
    ),
    "folders among entries": page(entry("t/1") + FOLDER + entry("t/2")),
}
WRONG = {
    "no key": page(entry("t/1") + entry("t/2").replace("Key>", "Kex>")),
    "no ETag": page(entry("t/1").replace("ETag>", "Etag>")),
    "no size": page(entry("t/1").replace("<Size>12", "<Size>")),
    "no time": page(entry("t/1", when="yesterday")),
    "an element never ends": page(entry("t/1").replace("</Size>", "")),
    "not UTF-8": page(entry("t/1")).replace(b"t/1", b"t/\xff"),
    "a control character": page(entry("t/\x01")),
    "an unknown entity": page(entry("t/&nbsp;")),
    "something else between": page(entry("t/1") + "<Object/>" + entry("t/2")),
    "more without a way": page(entry("t/1"), more="<IsTruncated>true</IsTruncated>"),
    "no word of more": page(entry("t/1"), more="<MaxKeys>7</MaxKeys>"),
}


@pytest.fixture(scope="module")
def once(shared_target: S3Target) -> Iterator[S3Store]:
    with s3_store(replace(shared_target, attempts=1)) as store:
        yield store


@pytest.fixture(scope="module")
def plain(shared_target: S3Target) -> Iterator[Any]:
    """The SDK alone."""
    with closing(make_client(replace(shared_target, attempts=1))) as client:
        yield client


def said(plain: Any, target: S3Target) -> Sequence[ObjectInfo]:
    found = plain.list_objects_v2(Bucket=target.bucket, Prefix="t/")
    return [info_of(one["Key"], one["Size"], one) for one in found.get("Contents", ())]


@pytest.mark.parametrize("form", SAME)
def test_a_page_of_any_form_is_what_the_sdk_makes_of_it(
    once: S3Store, plain: Any, proxy: FaultProxy, form: str
) -> None:
    proxy.add(answer(200, SAME[form]), times=3)
    expected = said(plain, once.target)
    assert list(once.list("t/")) == expected
    assert [info for batch in once.batches("t/", 0) for info in batch.infos()] == expected
    if form == "keys as in a URL":
        assert [info.key for info in expected] == list(ODD_KEYS)


def test_a_usual_page_is_not_read_by_the_sdk(once: S3Store, proxy: FaultProxy) -> None:
    proxy.add(answer(200, SAME["checksums"]))
    found = once.page({"Prefix": "t/"})
    assert "Contents" not in found
    assert found[TAKEN].entries


@pytest.mark.parametrize("form", WRONG)
def test_a_page_that_is_wrong_is_an_error_and_never_fewer_objects(once: S3Store, proxy: FaultProxy, form: str) -> None:
    proxy.add(answer(200, WRONG[form]), times=3)
    with pytest.raises(Transient):
        keys(once, "t/")
    with pytest.raises(Transient):
        _ = [batch.infos() for batch in once.batches("t/", 0)]


def test_a_page_that_is_cut_anywhere_is_an_error(once: S3Store, proxy: FaultProxy) -> None:
    whole = page(URLS + "".join(entry(f"t/{number}") for number in range(3)))
    for end in {
        *range(0, len(whole), 29),
        whole.rfind(b"</Contents>"),
        whole.rfind(b"</Contents>") + 11,
        len(whole) - 1,
    }:
        proxy.clear()
        proxy.add(answer(200, whole[:end]))
        with pytest.raises(Transient):
            keys(once, "t/")


def test_folders_are_listed_side_by_side_and_together_are_the_whole_listing(remote: S3Store, proxy: FaultProxy) -> None:
    made = sorted(f"t/{folder}/{name}" for folder in ("a b", "a+b", "ü&<", "%2F", "d=1") for name in "123456789")
    for key in (*made, "t/top", "tt/other", "u/1"):
        put(remote, key, b"1")
    proxy.seen.clear()
    found = [info.key for batch in remote.batches("t/", 60) for info in batch.infos()]
    assert sorted(found) == sorted([*made, "t/top"])
    assert len(found) == len(made) + 1
    assert sum("delimiter" in request.path for request in proxy.seen) == 1
    assert sorted(info.key for batch in remote.batches("", 0) for info in batch.infos()) == sorted(keys(remote))


def test_batches_of_the_same_objects_have_the_same_digest_and_others_another(remote: S3Store) -> None:
    for number in range(30):
        put(remote, f"t/{number % 3}/{number:02}", b"1")

    def digests() -> dict[bytes, list[ObjectInfo]]:
        return {batch.digest: list(batch.infos()) for batch in remote.batches("t/", 70)}

    first = digests()
    assert first == digests()
    put(remote, "t/1/16", b"2")
    second = digests()
    changed = [info.key for digest in second.keys() - first.keys() for info in second[digest]]
    assert "t/1/16" in changed
    assert len(changed) <= remote.target.page_keys
    assert len(first) == len(second)


def test_a_folder_that_fails_fails_the_listing(remote: S3Store, proxy: FaultProxy) -> None:
    for number in range(30):
        put(remote, f"f/{number % 3}/{number:02}", b"1")
    assert sum(len(batch.infos()) for batch in remote.batches("f/", 70)) == 30
    proxy.add(answer(503), "GET", "*prefix=f%2F1*continuation-token=*", times=100)
    with pytest.raises(Transient):
        _ = [batch.infos() for batch in remote.batches("f/", 70)]
