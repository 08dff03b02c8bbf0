"""Windows larger than a step: an open one is read again from its tail only, a closing one whole; one result always."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import pyarrow as pa
import pytest

from app.core.pipeline import Count
from app.core.runs import Outcome
from app.core.windows import Window
from app.influx_to_s3.flux import FluxReader
from app.influx_to_s3.job import NAME
from app.influx_to_s3.reader import InfluxConnection
from app.influx_to_s3.source import InfluxSource
from exporter import NOON, Exporter, ns
from influx_points import source_of
from simulators.influx import Cut, ErrorTable, Refuse

pytestmark = pytest.mark.slow

KEY = ("device_telemetry", (("device_id", "D1"), ("device_type", "pump"), ("location", "A")))
FIRST, STEP_NS = 17_000, 10**8  # half an hour at ten points a second, which is more than a block of the spool
MINUTE = timedelta(minutes=1)
HOUR = Window(NOON, NOON + timedelta(hours=1))
SMALL_STEPS = {"EXPORT_BATCH_SIZE": "1500"}


def extend(exporter: Exporter, first: int, last: int) -> None:
    """The points number `first` to `last` of the hour."""
    times = [ns(NOON) + n * STEP_NS for n in range(first, last)]
    fields = {"voltage": [200 + n % 50 / 4 for n in range(first, last)]}
    exporter.influx.points.extend(KEY, times, fields)


@contextmanager
def one_process(exporter: Exporter, **environ: str) -> Iterator[None]:
    """One process with small steps; at the end the window is closed, so that what it kept is freed."""
    exporter.keep(**SMALL_STEPS, **environ)
    extend(exporter, 0, FIRST)
    exporter.at(minutes=30)
    exporter.well()
    exporter.influx.forget_queries()
    yield
    exporter.at(hours=2, minutes=1)
    exporter.influx.forget_queries()
    exporter.well()
    assert exporter.influx.rows_sent >= FIRST  # closing reads whole
    exporter.check()


def source_for(exporter: Exporter, batch_rows: int) -> InfluxSource:
    influx = exporter.influx
    reader = FluxReader(
        InfluxConnection(influx.url, influx.token), org=influx.org, bucket=influx.bucket, measurement=KEY[0]
    )
    return source_of(reader, exporter.folder / "spool", batch_rows=batch_rows)


def read_again(exporter: Exporter) -> int:
    """Rows that were sent since the last look, without those of counts."""
    sent = sum(query.rows for query in exporter.influx.queries if "pivot" in query.text)
    exporter.influx.forget_queries()
    return sent


def test_an_open_window_is_read_again_only_from_its_tail(exporter: Exporter) -> None:
    with one_process(exporter):
        for step in range(2):
            extend(exporter, FIRST + step * 600, FIRST + (step + 1) * 600)
            exporter.at(minutes=31 + step)
            exporter.well()
            # the bucket of two minutes that changed, and one of overlap
            assert 600 <= read_again(exporter) <= 3 * 1200
        exporter.check()
    assert len(exporter.keys) == 1


def test_several_rows_of_one_instant_are_read_again_from_the_tail_too(exporter: Exporter) -> None:
    with one_process(exporter):
        for location in ("B", "C"):
            tags = (*KEY[1][:2], ("location", location))
            times = [ns(NOON) + n * STEP_NS for n in range(FIRST)]
            exporter.influx.points.extend((KEY[0], tags), times, {"voltage": [200.0] * FIRST})
        exporter.well()
        extend(exporter, FIRST, FIRST + 600)
        exporter.at(minutes=31)
        exporter.influx.forget_queries()
        exporter.well()
        assert read_again(exporter) <= 3 * 3 * 1200
        exporter.check()
        [record] = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + timedelta(hours=1))
        assert record.rows == 3 * FIRST + 600


def test_an_unchanged_large_window_costs_counts_only(exporter: Exporter) -> None:
    with one_process(exporter):
        exporter.store.puts.clear()
        exporter.well()
        assert (read_again(exporter), exporter.store.puts) == (0, [])


def test_a_late_row_far_behind_the_tail_is_found_by_the_counts(exporter: Exporter) -> None:
    with one_process(exporter):
        exporter.write(NOON + timedelta(minutes=10, milliseconds=5), location="A")
        extend(exporter, FIRST, FIRST + 100)
        exporter.well()
        assert read_again(exporter) >= FIRST - 12 * 600
        exporter.check()
        exporter.write(NOON + timedelta(milliseconds=5), location="A")
        exporter.well()
        exporter.check()


def test_a_row_that_was_overwritten_far_behind_the_tail_is_there_when_the_window_closes(exporter: Exporter) -> None:
    with one_process(exporter):
        exporter.write(NOON + MINUTE, fields="voltage=1", location="A")
        extend(exporter, FIRST, FIRST + 100)
        exporter.well()


def test_a_large_window_that_shrinks_while_it_is_read_is_counted_again_before_it_closes(exporter: Exporter) -> None:
    exporter.keep(**SMALL_STEPS, LOOKBACK_HOURS="4")
    extend(exporter, 0, FIRST)
    exporter.at(hours=3)
    kept = dict(exporter.influx.points._series)  # noqa: SLF001 - the simulator deletes nothing

    read: list[str] = []

    def lose(text: str) -> bool:
        """When the second slice is asked for, nothing is there any more."""
        read.extend([text] * ("pivot" in text))
        if len(read) == 2:
            exporter.influx.points._series.clear()  # noqa: SLF001 - as above
        return False

    exporter.influx.faults.add(Refuse(500), when=lose)
    run = exporter.run()
    assert (run.outcome, run.report.ledger.closes) == (Outcome.PARTIAL, True)
    assert "had counted" in run.error
    assert exporter.cursor <= NOON
    exporter.influx.points._series.update(kept)  # noqa: SLF001 - as above
    exporter.well()
    exporter.check()


def test_no_step_asks_for_more_than_it_may_hold(exporter: Exporter) -> None:
    exporter.keep(**SMALL_STEPS)
    extend(exporter, 0, FIRST)
    exporter.at(minutes=30)
    exporter.well()
    assert max(query.rows for query in exporter.influx.queries) <= 1500
    exporter.at(hours=3)
    exporter.well()
    exporter.check()


def test_small_and_large_steps_give_the_same_rows_and_digest(exporter: Exporter) -> None:
    extend(exporter, 0, FIRST)
    digests = set()
    for batch_rows in (1500, 7000, 100_000):
        with closing(source_for(exporter, batch_rows).read("D1", HOUR, Count(FIRST, FIRST), None)) as batch:
            digests.add((batch.rows, batch.digest))
    assert len(digests) == 1


def test_what_another_process_wrote_meanwhile_is_read_whole(exporter: Exporter) -> None:
    with one_process(exporter):
        extend(exporter, FIRST, FIRST + 100)
        mine, exporter.built = exporter.built, None
        exporter.well(EXPORT_BATCH_SIZE="100000")
        exporter.built = mine
        extend(exporter, FIRST + 100, FIRST + 200)
        exporter.influx.forget_queries()
        exporter.well()
        assert read_again(exporter) == FIRST + 200
        exporter.check()


def test_rows_that_vanish_from_the_middle_stay_in_the_object(exporter: Exporter) -> None:
    exporter.keep(**SMALL_STEPS)
    extend(exporter, 0, FIRST)
    exporter.at(minutes=30)
    exporter.well()
    exporter.influx.points._series.clear()  # noqa: SLF001 - the simulator knows no retention
    extend(exporter, 9000, FIRST + 500)
    exporter.well()
    [record] = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + timedelta(hours=1))
    assert record.rows == FIRST + 500
    exporter.at(hours=2, minutes=1)
    exporter.well()
    extend(exporter, FIRST + 500, FIRST + 501)
    [record] = exporter.state.checkpoints.records(NAME, "D1", NOON, NOON + timedelta(hours=1))
    assert (record.rows, record.closed) == (FIRST + 500, True)


@pytest.mark.parametrize(
    "fault", [ErrorTable(700), *(pytest.param(n, marks=pytest.mark.slow) for n in (Cut(700), Cut(700, hidden=True)))]
)
def test_a_step_that_fails_leaves_the_object_and_is_made_up_for(exporter: Exporter, fault: ErrorTable | Cut) -> None:
    with one_process(exporter):
        extend(exporter, FIRST, FIRST + 1300)
        exporter.at(minutes=33)
        exporter.store.puts.clear()
        exporter.influx.faults.add(fault, times=4, when=lambda text: "pivot" in text)
        run = exporter.run()
        assert run.outcome is Outcome.PARTIAL
        assert (exporter.store.puts, len(exporter.influx.faults)) == ([], 0)
        exporter.at(minutes=34)  # a device that failed waits for a minute
        exporter.well()
        exporter.check()


def test_the_spool_of_a_large_window_is_bounded_in_memory_and_freed(exporter: Exporter) -> None:
    number = 72_000
    times = [ns(NOON) + n * 5 * 10**7 for n in range(number)]
    exporter.influx.points.extend(KEY, times, {f"f{n}": [float(n)] * number for n in range(8)})
    source = source_for(exporter, 1500)
    before = pa.total_allocated_bytes()
    batch = source.read("D1", HOUR, Count(8 * number, number), None)
    assert batch.rows == number
    assert pa.total_allocated_bytes() - before < 2 << 20
    assert sum(table.num_rows for table in batch.output()) == number
    batch.close()
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert list((exporter.folder / "spool").iterdir()) == []
