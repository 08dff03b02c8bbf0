"""One rule for keys on every store: what is written comes back under exactly its key, and no key touches another."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.core.errors import Rejected
from app.object_store.local import LocalDirectory, LocalNames
from app.object_store.port import BadKey, ListingRequest, ObjectStore, check_key, is_new_form, normalized_key
from app.object_store.s3 import S3Store
from app.object_store.s3_client import S3Target
from app.object_store.s3_multipart import S3Transfers
from memory_objects import MemoryObjects
from object_stores import get, keys, put, s3_store, target_of

if TYPE_CHECKING:
    from seaweed import Seaweed

PARTS = (
    "a",
    "b",
    "A",
    "é",
    "e\u0301",
    "😀",
    " ",
    ".",
    "..",
    "\\",
    "/",
    "//",
    "%2f",
    "%5c",
    "+",
    "\n",
    "\x7f",
    "\ud800",
    "&<",
)
KEYS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)
FORMS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@dataclass
class Place:
    """A store, and how another program puts an object there; None where none can under any key it likes."""

    store: ObjectStore
    plant: Callable[[str, bytes], None] | None
    clear: Callable[[], None]


@pytest.fixture(scope="module", params=["memory", "local directory", "seaweed", "moto"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "memory":
        memory = MemoryObjects()
        yield Place(memory, None, memory.clear)
    elif request.param == "local directory":
        root = tmp_path_factory.mktemp("keys") / "objects"
        local = LocalDirectory(root)
        local.probe()

        def plant(key: str, data: bytes) -> None:
            path = root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        yield Place(local, plant, lambda: cleared(local))
    elif request.param == "seaweed":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        with s3_store(target_of(seaweed, seaweed.new_bucket())) as store:
            yield Place(store, None, lambda: cleared(store))
    else:
        with moto() as target, s3_store(target) as store:
            client = store.client()

            def put_object(key: str, data: bytes) -> None:
                client.put_object(Bucket=target.bucket, Key=key, Body=data)

            yield Place(store, put_object, lambda: cleared(store))


class moto:  # noqa: N801 - a context manager
    """A store that keeps every key as it is, as Amazon's does."""

    def __enter__(self) -> S3Target:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = S3Target(
            bucket=f"keys-{uuid4().hex[:8]}",
            endpoint_url=f"http://127.0.0.1:{port}",
            addressing_style="path",
            access_key_id="a",
            secret_access_key="b",
            page_keys=7,
        )
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)
            else:
                break
        with closing(S3Store(target, "probe")) as store:
            store.client().create_bucket(Bucket=target.bucket)
        return target

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)


def cleared(store: ObjectStore) -> None:
    for key in keys(store):
        store.delete(key)


def in_the_way(key: str, held: Mapping[str, bytes]) -> bool:
    """Whether a directory cannot hold `key` beside the others."""
    return any(f"{other}/".startswith(f"{key}/") or f"{key}/".startswith(f"{other}/") for other in held if other != key)


@FORMS
@given(wanted=st.lists(st.tuples(st.sampled_from(["put", "put", "delete"]), KEYS), min_size=1, max_size=8))
@example(wanted=[("put", "a/b"), ("put", "a\\b"), ("delete", "a\\b"), ("delete", "a//b"), ("delete", "a/./b")])
@example(wanted=[("put", "a"), ("put", "A"), ("put", "é"), ("put", "e\u0301"), ("delete", "A"), ("delete", "é")])
def test_no_key_touches_the_object_of_another(place: Place, wanted: list[tuple[str, str]]) -> None:
    place.clear()
    held: dict[str, bytes] = {}
    for number, (do, key) in enumerate(wanted):
        data = f"{number}".encode()
        try:
            if do == "put":
                put(place.store, key, data)
                held[key] = data
            else:
                place.store.delete(key)
                held.pop(key, None)
        except BadKey:
            assert not is_new_form(key)
        except Rejected:
            assert in_the_way(key, held)
        else:
            assert is_new_form(key)
        assert sorted(keys(place.store)) == sorted(held)
        assert {each: get(place.store, each) for each in held} == held


@FORMS
@given(key=KEYS)
def test_what_another_program_put_is_found_by_exactly_its_key(place: Place, key: str) -> None:
    if place.plant is None or key.strip("./\\") == "" or "\ud800" in key or not key.isprintable():
        return
    if isinstance(place.store, LocalDirectory) and (
        is_new_form(key) or normalized_key(key).count("/") != key.count("/")
    ):
        key = "a\\" + key.replace("/", "").replace("..", "")  # what a file can be called
    place.clear()
    place.plant(key, b"theirs")
    if key not in keys(place.store):
        return  # a store that keeps it under another name
    info = place.store.head(key)
    assert info is not None
    assert (info.key, info.size_bytes, get(place.store, key), get(place.store, key, info.etag)) == (
        key,
        6,
        b"theirs",
        b"theirs",
    )
    if not is_new_form(key):
        with pytest.raises(BadKey):
            put(place.store, key, b"mine")
    place.store.delete(key)
    assert keys(place.store) == []


def test_a_folder_marker_that_a_listing_shows_is_read_and_deleted_and_what_is_below_stays(place: Place) -> None:
    if not isinstance(place.store, S3Store):
        return  # no other program can put such a key there
    place.clear()
    client, bucket = place.store.client(), place.store.target.bucket
    for key, data in (("fm/", b""), ("fm/below", b"1"), ("full/", b"12")):
        client.put_object(Bucket=bucket, Key=key, Body=data)
    transfers = S3Transfers(place.store)
    shown = [info.key for info in transfers.page(ListingRequest("f")).objects]
    assert {"fm/", "fm/below"} <= set(shown)
    for key in shown:
        info = transfers.properties(key)
        assert info is not None
        theirs = client.get_object(Bucket=bucket, Key=key)["Body"].read()  # SeaweedFS drops the bytes of a marker
        assert (get(place.store, key, info.etag), info.size_bytes) == (theirs, len(theirs))
    with pytest.raises(BadKey):
        put(place.store, "fm/", b"mine")
    place.store.delete("fm/")
    assert "fm/" not in keys(place.store)
    assert get(place.store, "fm/below") == b"1"


def test_of_two_equal_objects_the_one_with_the_odd_key_is_not_deleted(place: Place) -> None:
    if not isinstance(place.store, S3Store) or place.plant is None:
        return
    place.clear()
    put(place.store, "a/b", b"same")
    place.plant("a//b", b"same")
    with pytest.raises(BadKey, match="equal"):
        place.store.delete("a//b")
    assert keys(place.store) == ["a//b", "a/b"]
    put(place.store, "a/b", b"other")
    place.store.delete("a//b")
    assert keys(place.store) == ["a/b"]


@given(key=KEYS)
def test_a_key_that_may_be_written_is_taken_for_itself(key: str) -> None:
    if is_new_form(key):
        assert normalized_key(check_key(key)) == key
    elif "\ud800" not in key and key.isprintable() and not key.endswith("/"):
        assert normalized_key(key) != key
    assert normalized_key(normalized_key(key)) == normalized_key(key)


@pytest.mark.parametrize(
    ("key", "same"),
    [("Dev/x", True), ("dev/x", False), ("Dev/X", False), ("Dev/new", True), ("new/Dev", True), ("DEV", False)],
)
def test_a_key_is_refused_where_the_disk_has_its_name_in_another_spelling(key: str, same: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """The disk here does not ignore case, so that it is shown every spelling that one which does would find."""
    for spelling in ("Dev/x", "dev/x", "Dev/X", "DEV"):
        (tmp_path / spelling).parent.mkdir(exist_ok=True)
        (tmp_path / spelling).touch()

    def names_in(folder: Path) -> list[str]:
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        return ["Dev"] if folder == tmp_path else ["x"]

    (tmp_path / "scratch").mkdir()
    assert LocalNames(tmp_path, tmp_path / "scratch", names_in).same(key) is same
    assert list((tmp_path / "scratch").iterdir()) == []


def test_names_of_a_disk_that_keeps_them_are_not_compared(tmp_path: Path) -> None:
    looked: list[Path] = []

    def names_in(folder: Path) -> list[str]:
        looked.append(folder)
        return [path.name for path in folder.iterdir()]

    names = LocalNames(tmp_path, tmp_path, names_in)
    assert all(names.same(key) for key in ("a", "A", "é/x"))
    assert looked == [tmp_path]
