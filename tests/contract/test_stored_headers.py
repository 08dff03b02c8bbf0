"""Headers, metadata and tags of an object stay through writes and patches on every store, whoever wrote it."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import Permanent
from app.object_store.local import ATTRIBUTE, LocalDirectory
from app.object_store.port import CONTENT_HEADERS, MARK, TAG_COUNT, TAGS, ObjectInfo, PutRequest
from app.object_store.s3 import S3Store
from app.object_store.s3_multipart import S3Transfers
from contract.test_keys import moto
from contract.test_transfers import MIB, SIXTEEN, Both, Trickle, opened, target_of
from fault_proxy import FaultProxy, answer
from memory_objects import MemoryObjects
from seaweed import Seaweed

EXPIRES = "Thu, 01 Jan 2032 00:00:00 GMT"
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
TAG = st.text(st.sampled_from("aZ0+-=.:/@_"), min_size=1, max_size=9)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(CONTENT_HEADERS, TEXT),
        "expires": st.just(EXPIRES),
        TAGS: st.builds(
            "{}={}".format, TAG.map(lambda tag: quote(tag, safe="")), TAG.map(lambda tag: quote(tag, safe=""))
        ),
    },
)
METADATA = st.dictionaries(st.sampled_from(["rows", "a-b", "x.y"]), TEXT)


@pytest.fixture(scope="module", params=["memory", "local directory", "seaweed", "moto"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    if request.param == "memory":
        memory = MemoryObjects()
        yield Both(memory, memory)
    elif request.param == "local directory":
        local = LocalDirectory(tmp_path_factory.mktemp("headers") / "objects")
        local.probe()
        yield Both(local, local)
    elif request.param == "seaweed":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        yield from opened(target_of(seaweed, seaweed.new_bucket()))
    else:
        with moto() as target:
            yield from opened(target)


def kept(both: Both, key: str) -> tuple[dict[str, str], dict[str, str]]:
    info = both.transfers.properties(key)
    assert info is not None
    headers = {name: value for name, value in info.headers.items() if name not in (TAG_COUNT, "x-amz-storage-class")}
    return headers, {name: value for name, value in info.metadata.items() if name != MARK}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(headers=HEADERS, metadata=METADATA)
def test_headers_metadata_and_tags_are_kept_through_write_and_patch(
    both: Both, headers: dict[str, str], metadata: dict[str, str]
) -> None:
    both.transfers.write("k", Trickle(b"12345"), PutRequest("text/csv", metadata, None, headers))
    assert kept(both, "k") == (headers, metadata)
    held = both.transfers.properties("k")
    assert held is not None
    both.transfers.patch(held, 1, Trickle(b"x"))
    assert (kept(both, "k"), both.read("k")) == ((headers, metadata), b"1x345")


def test_an_object_of_several_parts_keeps_them_too(both: Both) -> None:
    headers = {"content-encoding": "gzip", "cache-control": "max-age=9", "expires": EXPIRES, TAGS: "a=1&b=2"}
    both.transfers.write("large", Trickle(SIXTEEN[: 9 * MIB]), PutRequest("text/csv", {"rows": "7"}, None, headers))
    held = both.transfers.properties("large")
    assert held is not None
    both.transfers.patch(held, 5, Trickle(b"x"))
    assert kept(both, "large") == (headers, {"rows": "7"})


def test_what_another_program_or_the_last_version_stored_is_kept_by_a_patch(both: Both) -> None:
    if not isinstance(both.store, S3Store):
        return
    client, bucket = both.store.client(), both.store.target.bucket
    said: dict[str, Any] = {
        "ContentEncoding": "gzip",
        "CacheControl": "max-age=9",
        "ContentDisposition": 'inline; filename="x y.csv"',
        "ContentLanguage": "de, en",
        "Expires": EXPIRES,
        "StorageClass": "STANDARD_IA",
        "Metadata": {"o": "me"},
    }
    client.put_object(
        Bucket=bucket, Key="theirs", Body=b"123", ContentType="text/csv", Tagging="k=v&k%202=v%2Bw", **said
    )
    tags = client.get_object_tagging(Bucket=bucket, Key="theirs")["TagSet"]
    for _ in range(2):
        held = both.transfers.properties("theirs")
        assert held is not None
        both.transfers.patch(held, 3, Trickle(b"4"))
        found = client.head_object(Bucket=bucket, Key="theirs")
        found |= {"Expires": found["ExpiresString"]}
        found["Metadata"].pop(MARK)
        assert {name: found[name] for name in said} == said
        assert client.get_object_tagging(Bucket=bucket, Key="theirs")["TagSet"] == tags
    assert both.read("theirs") == b"1234"


def test_what_is_written_is_encrypted_as_the_settings_say(both: Both) -> None:
    if not isinstance(both.store, S3Store):
        return
    target = replace(both.store.target, sse="AES256")
    if "127.0.0.1" in target.endpoint_url and target.access_key_id == "a":  # moto plays KMS too
        target = replace(target, sse="aws:kms", sse_kms_key_id="key-1")
    client, bucket = both.store.client(), target.bucket
    client.put_object(Bucket=bucket, Key="patched", Body=b"1", ServerSideEncryption="AES256")
    for sure in opened(target):
        for key, data in (("small", b"1"), ("large", SIXTEEN[: 9 * MIB])):
            sure.write(key, data)
        sure.store.put("exported", io.BytesIO(b"1"), PutRequest("text/csv"))
        sure.transfers.patch(sure.held("patched"), 0, Trickle(b"2"))
        for key in ("small", "large", "exported", "patched"):
            found = client.head_object(Bucket=bucket, Key=key)
            assert (found["ServerSideEncryption"], found.get("SSEKMSKeyId", "")) == (target.sse, target.sse_kms_key_id)
        assert isinstance(sure.transfers, S3Transfers)
        _, fields = sure.transfers.form("k", "text/csv", range(2), 60)
        assert fields["x-amz-server-side-encryption"] == target.sse
    if target.sse_kms_key_id:  # an object keeps its key where no setting names one
        both.transfers.patch(both.held("small"), 0, Trickle(b"3"))
        assert client.head_object(Bucket=bucket, Key="small")["SSEKMSKeyId"] == "key-1"


def test_a_directory_reads_the_notes_of_the_last_version(tmp_path: Path) -> None:
    local = LocalDirectory(tmp_path)
    etag = local.write("k", Trickle(b"123"), PutRequest("text/plain")).etag
    note = {"etag": etag, "content_type": "text/csv", "metadata": {"rows": "7"}}
    os.setxattr(tmp_path / "k", ATTRIBUTE, json.dumps(note).encode())
    held = local.properties("k")
    assert held is not None
    assert (held.content_type, held.metadata, held.headers) == ("text/csv", {"rows": "7"}, {})
    local.patch(held, 0, Trickle(b"x"))
    held = local.properties("k")
    assert held is not None
    assert (held.content_type, held.metadata) == ("text/csv", {"rows": "7"})


def test_tags_that_may_not_be_read_stop_a_patch_and_not_a_look(seaweed: Seaweed) -> None:
    denied = answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
    with FaultProxy(seaweed.host, seaweed.port) as proxy:
        target = target_of(seaweed, seaweed.new_bucket(), proxy.url)
        with closing(S3Store(target, "probe")) as store, closing(S3Transfers(store)) as transfers:
            transfers.write("k", Trickle(b"1"), PutRequest("text/plain", headers={TAGS: "a=1"}))
            proxy.add(denied, "GET", "*tagging*", times=10)
            assert isinstance(store.head("k"), ObjectInfo)
            with pytest.raises(Permanent) as caught:
                transfers.properties("k")
            assert "s3:GetObjectTagging" in caught.value.hint
