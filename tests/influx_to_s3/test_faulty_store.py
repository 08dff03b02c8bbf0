"""The export into S3 through a faulty network, beside other writers: each row once, or a clear line and made up for."""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import pytest

from app.core.runs import Outcome
from app.influx_to_s3.job import NAME, RECONCILE
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from effort import EFFORT
from exporter import HOUR, MINUTE, NOON, Exporter, exporter_on, ns
from exports import FORMATS, exported, stored
from fault_proxy import (
    Fault,
    FaultProxy,
    answer,
    answer_afterwards,
    black_hole,
    cut_request,
    lose_answer,
    reset,
    truncate,
)
from seaweed import Seaweed, target


@pytest.fixture(scope="module")
def shared_remote(seaweed: Seaweed, shared_proxy: FaultProxy, bucket: str) -> Iterator[S3Store]:
    with closing(S3Store(replace(target(seaweed, bucket), endpoint_url=shared_proxy.url), "probe")) as store:
        store.probe()
        yield store


@pytest.fixture
def remote(shared_remote: S3Store, proxy: FaultProxy, tmp_path: Path) -> Iterator[Exporter]:
    """The export to the S3 server, through the proxy, below a prefix of its own."""
    assert proxy.port
    for made in exporter_on(shared_remote, tmp_path, f"x{tmp_path.name}"):
        made.write_each(NOON, NOON + 20 * MINUTE)
        made.at(minutes=20)
        yield made


OBJECT = "*export_*"


@pytest.mark.parametrize(
    "fault",
    [answer(500), answer(503), reset(), cut_request(2000), lose_answer(), answer_afterwards(500)],
    ids=lambda f: f.name,
)
@pytest.mark.parametrize("settled", [False, True])
def test_a_put_that_goes_wrong_once_ends_as_one_object_without_a_double(
    remote: Exporter,
    proxy: FaultProxy,
    fault: Fault,
    settled: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if settled:
        remote.well()
        remote.write_each(NOON + 20 * MINUTE, NOON + 25 * MINUTE)
        remote.at(minutes=25)
    proxy.add(fault, "PUT", OBJECT)
    remote.well()
    assert [seen.fault for seen in proxy.seen].count(fault.name) == 1
    assert len(remote.keys) == 1
    remote.check()
    remote.store.puts.clear()
    remote.well()
    assert remote.store.puts == []


@pytest.mark.parametrize(
    "fault",
    [
        lose_answer(),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (black_hole(), answer(503), answer_afterwards(500))),
    ],
    ids=lambda f: f.name,
)
def test_a_store_that_stays_broken_fails_the_device_and_is_made_up_for(
    remote: Exporter, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.add(fault, "PUT", OBJECT, times=1000)
    run = remote.run()
    assert run.outcome in (Outcome.PARTIAL, Outcome.OK)  # OK: all was stored, and found to be
    proxy.clear()
    remote.write_each(NOON + 20 * MINUTE, NOON + 25 * MINUTE)
    remote.at(minutes=25)
    remote.well()
    assert len(remote.keys) == 1
    remote.check()


def test_a_broken_download_of_what_has_to_be_kept_is_resumed(remote: Exporter, proxy: FaultProxy) -> None:
    remote.well()
    before = exported(remote.store, remote.prefix)
    remote.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    remote.write(NOON + 21 * MINUTE)
    remote.at(minutes=22)
    proxy.add(truncate(1000), "GET", OBJECT, times=2)
    remote.well()
    assert len(exported(remote.store, remote.prefix)) == len(before) + 1


def test_an_object_that_another_writer_replaced_is_read_about_again(remote: Exporter) -> None:
    remote.well()
    [key] = remote.keys
    remote.store.inner.put(key, BytesIO(b"what a person put there"), PutRequest("text/plain"))
    remote.write(NOON + 21 * MINUTE)
    remote.at(minutes=22)
    remote.well()
    remote.check()


@pytest.mark.parametrize(
    "fault", [answer_afterwards(200, headers={"ETag": '"any"'}), answer(501)], ids=["ignored", "not implemented"]
)
def test_a_store_without_conditions_is_right_for_one_process(
    remote: Exporter, seaweed: Seaweed, proxy: FaultProxy, bucket: str, fault: Fault
) -> None:
    proxy.add(
        fault, "PUT", times=10_000, fits=lambda request: {"if-match", "if-none-match"} & request.headers.keys() != set()
    )
    with closing(S3Store(replace(target(seaweed, bucket), endpoint_url=proxy.url), f"p{remote.prefix}")) as store:
        for one in exporter_on(store, remote.folder / "one", remote.prefix):
            one.write_each(NOON, NOON + HOUR)
            for minutes in (20, 40, 59):
                one.at(minutes=minutes)
                one.well()
            assert not store.conditional
            one.write(NOON + timedelta(seconds=1))
            one.at(hours=2, minutes=1)
            one.well()
            one.write(NOON + timedelta(seconds=2))
            assert one.reconcile().report.late_rows == 1
            assert len(one.keys) == 1
            one.check()


def test_a_missing_bucket_and_a_wrong_key_are_one_clear_line(seaweed: Seaweed, bucket: str, tmp_path: Path) -> None:
    good = target(seaweed, bucket)
    for wrong, words in (
        (replace(good, bucket="no-such"), "S3_BUCKET"),
        (replace(good, secret_access_key="x"), "S3_SECRET"),
    ):
        with closing(S3Store(wrong, "probe")) as store:
            for one in exporter_on(store, tmp_path / words, "x"):
                one.write(NOON)
                one.at(minutes=1)
                run = one.run()
                assert run.outcome is Outcome.FAILED
                assert "\n" not in run.error
                assert words in run.hint


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 1 + 3 * EFFORT))])
def test_two_processes_that_know_nothing_of_each_other_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - an order of events is no secret
    store = LocalDirectory(tmp_path / "objects")
    for first in exporter_on(store, tmp_path / "a"):
        for second in exporter_on(store, tmp_path / "b"):
            second.url, second.influx = first.url, first.influx
            both = (first, second)
            meanwhile = interruption(both, draw)
            first.store.before_put = meanwhile
            for step in range(16):
                now = NOON + step * 10 * MINUTE
                for _ in range(3):
                    late = timedelta(seconds=draw.randrange(0, 5400) if draw.random() < 0.3 else draw.randrange(0, 600))
                    first.write(now - late, fields=f"voltage={draw.randrange(100)}")
                first.now = second.now = now
                draw.choice(both).run()
            first.store.before_put = lambda _key: None
            for one in both:
                one.now = NOON + 24 * HOUR
                one.well()
            for one in both:  # which may be told that the other one replaced what it took for closed
                one.run(RECONCILE)
            since = ns(NOON - HOUR)  # where the first start went back to
            assert exported(store) == {
                slot: row for slot, row in stored(first.influx.points).items() if slot[1] >= since
            }


def interruption(both: tuple[Exporter, Exporter], draw: random.Random) -> Callable[[str], None]:
    """Now and then, before the first process writes, the second one does a whole run."""

    def run(_key: str) -> None:
        if draw.random() < 0.4:
            both[1].run()

    return run


@pytest.mark.parametrize("kind", FORMATS)
def test_the_record_names_the_object_that_is_there(remote: Exporter, kind: str) -> None:
    remote.well(EXPORT_FORMAT=kind)
    [record] = remote.state.checkpoints.records(NAME, "D1", NOON, NOON + HOUR)
    info = remote.store.head(record.key)
    assert info is not None
    assert (info.etag, info.size_bytes, info.metadata["rows"]) == (record.version, record.size_bytes, str(record.rows))
