"""What `/analytics` sums of an object is committed with its window, and is what reading the object gives."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import pytest

from app.analytics.engine import Engine, EngineLimits
from app.analytics.object_facts import aggregated
from app.analytics.summaries import Summaries
from app.db.object_summaries import ObjectFacts, version_of
from exporter import HOUR, MINUTE, NOON, Exporter

SECOND = timedelta(seconds=1)


def committed(exporter: Exporter) -> Mapping[str, ObjectFacts]:
    """By key, of the objects as they are listed now."""
    facts = exporter.state.summaries
    infos = list(exporter.store.list("telemetry/device_id="))
    known = facts.known([version_of(info.key, info.etag) for info in infos])
    parts = facts.parts(facts.pairs(list(known)))
    found = {}
    for info in infos:
        version = version_of(info.key, info.etag)
        if version in known:
            mine = [part for each, part in parts if each == version]
            found[info.key] = ObjectFacts(
                info.key, info.etag, known[version].size_bytes, known[version].rows, parts=mine
            )
    return found


def read(exporter: Exporter) -> Mapping[str, ObjectFacts]:
    """The same from the objects themselves."""
    folder = exporter.folder / "work"
    folder.mkdir(exist_ok=True)
    infos = list(exporter.store.list("telemetry/device_id="))
    with closing(Engine(folder, EngineLimits(128, 2, 60))) as engine:
        groups = list(aggregated(exporter.store, engine, infos))
    return {facts.key: facts for group in groups for facts in group.read}


def write_everything(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    for second in range(50):
        temperature, soc = 0.1 + second * 1.7, f"{second}i"
        fields = (
            f'voltage={0.1 * second},current=0,power={second},temperature={temperature},soc={soc},on=true,note="a,b"'
        )
        exporter.write(NOON + HOUR + second * SECOND, "D-2", fields, further="x", device_type="" if second % 2 else "p")
    for phase in ("b", "a", "c"):  # three rows at the last instant
        exporter.write(
            NOON + HOUR + MINUTE, "D-2", f"voltage={ord(phase)}" if phase != "c" else "current=1", phase=phase
        )


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_what_is_committed_is_what_reading_the_objects_gives(exporter: Exporter, form: str) -> None:
    exporter.environ = {"EXPORT_FORMAT": form}
    exporter.state.summaries.note_asked()
    write_everything(exporter)
    if form == "parquet":
        exporter.write(NOON + MINUTE + timedelta(microseconds=7), "D1", "voltage=1,temperature=-4")
        exporter.influx.write(
            f"device_telemetry,device_id=D3 voltage=2 {int((NOON + MINUTE).timestamp()) * 10**9 + 123}"
        )
    exporter.at(hours=1, minutes=30)
    exporter.well()
    found, wanted = committed(exporter), read(exporter)
    assert found.keys() == wanted.keys()
    assert len(found) == (3 if form == "parquet" else 2)
    for key, facts in wanted.items():
        assert replace(found[key], columns=facts.columns) == facts, key
    known = exporter.state.summaries.known([facts.version for facts in wanted.values()])
    columns = {one.key: one.columns for one in known.values()}
    with exporter.state.database.transaction() as session:
        session.run("DELETE FROM analytics_objects")
    exporter.state.summaries.save(list(wanted.values()))
    again = exporter.state.summaries.known([facts.version for facts in wanted.values()])
    assert columns == {one.key: one.columns for one in again.values()}


def test_late_rows_deltas_rewriting_and_healing_commit_theirs_too(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.write_each(NOON + HOUR, NOON + 2 * HOUR)
    exporter.at(hours=1)
    exporter.well()
    assert committed(exporter) == {}, "nobody ever asked for reports, so open objects are not summed"
    exporter.at(hours=3, minutes=1)
    exporter.well()
    assert len(committed(exporter)) == 2
    exporter.write(NOON + SECOND)
    exporter.reconcile()
    assert sum(facts.rows for facts in committed(exporter).values()) == 121
    exporter.write(NOON + HOUR + SECOND)
    exporter.rewrite(NOON, NOON + 3 * HOUR, EXPORT_TIMESTAMP_UNIT="us")
    exporter.replace(NOON, NOON + 3 * HOUR)
    found, wanted = committed(exporter), read(exporter)
    assert {key: facts.parts for key, facts in found.items()} == {key: facts.parts for key, facts in wanted.items()}


def test_a_first_answer_reads_no_object_that_the_export_wrote(exporter: Exporter) -> None:
    write_everything(exporter)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=3, minutes=1)
    exporter.well()
    opened: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            if name == "open":
                opened.append(name)
            return getattr(exporter.store, name)

    with closing(Engine(exporter.folder / "none", EngineLimits(128, 2, 60))) as engine:
        summaries = Summaries(Watched(), exporter.state.summaries, engine, "telemetry", exporter.clock)  # type: ignore[arg-type]
        assert (summaries.refresh().rows, opened) == (113, [])


def test_sums_that_nobody_asks_for_go_with_the_records_of_their_windows(exporter: Exporter) -> None:
    exporter.write_each(NOON, NOON + HOUR)
    exporter.at(hours=1)
    exporter.well()
    exporter.at(hours=3)
    exporter.well()
    assert len(list(exporter.state.summaries.versions())) == 1
    exporter.at(hours=24 * 20)
    exporter.reconcile()
    assert len(list(exporter.state.summaries.versions())) == 0
    exporter.reconcile(RECONCILE_DAYS="30")
    exporter.state.summaries.note_asked()
    exporter.reconcile()
    assert len(list(exporter.state.summaries.versions())) == 1
