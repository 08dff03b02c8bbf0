"""Reports of closed days over Spark Connect: the SQL of `sql/analytics/spark`, over the Iceberg table.

Invariants: the client is imported when the first such report runs; a report reads exactly one chosen snapshot; rows
arrive in batches, so memory stays bounded; the client's exceptions are translated here.
"""

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.analytics.engine import DOCUMENTED, INSTANT, MESSAGE_CHARACTERS, NANOS, NUMBERS, TEXTS, ReportTooSlow
from app.analytics.formats import AnswerShape, ReportAnswer, of_batches
from app.analytics.reports import ReportDefinition
from app.core.closed_days import ReportSpan, TableState
from app.core.errors import Permanent, Transient
from app.ops.process import show_pandas

FOLDER = "spark"
PORT = 15002
CONNECT_SECONDS = 5.0
RETRIES = 2


@dataclass(frozen=True, slots=True)
class SparkRemote:
    """`url`: sc://host:port, with a token if the server requires one; `table`: the table's name in one of Spark's
    catalogs, "" to read it by its location.
    """

    url: str
    table: str

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url.partition(";")[0])
        return parts.hostname or "", parts.port or PORT


def spark_texts(folders: Sequence[Path]) -> Mapping[str, str]:
    """Report name -> its Spark statement, from a folder below that of the report itself."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in folder.glob("*.sql"):  # a report here overrides one in an earlier folder
            found.pop(file.stem, None)
        found.update({file.stem: file.read_text(encoding="utf-8") for file in (folder / FOLDER).glob("*.sql")})
    return found


class SparkReports:
    """Runs the reports that have a Spark statement."""

    def __init__(self, remote: SparkRemote, texts: Mapping[str, str], seconds: float, folder: Path) -> None:
        self._remote = remote
        self._texts = texts
        self._seconds = seconds
        self._folder = folder

    def knows(self, report: ReportDefinition) -> bool:
        """Whether the report has a Spark statement."""
        return report.name in self._texts

    def run(
        self,
        report: ReportDefinition,
        values: Mapping[str, Any],
        shape: AnswerShape,
        state: TableState,
        span: ReportSpan,
    ) -> ReportAnswer:
        """The answer. Raises Transient if Spark is unreachable, ReportTooSlow, and Permanent if Spark cannot run the
        report.
        """
        others = {name: value for name, value in values.items() if name not in report.reads}
        with self._session() as session:
            reader, name = session.read.option("snapshot-id", str(state.snapshot_id)), self._remote.table
            table = reader.table(name) if name else reader.format("iceberg").load(state.location)
            frame = session.sql(self._texts[report.name], args=others, telemetry=_rows(table, span))
            answer = of_batches(_reader(session, frame), shape, self._folder)
        answer.state, answer.engine = state, "spark"
        return answer

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """A session for this report only, interrupted after the time limit."""
        host, port = self._remote.address
        away = f"start it, or set ANALYTICS_ENGINE=duckdb; SPARK_REMOTE names {host}:{port}"
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError as error:
            raise Transient(f"Spark cannot be reached: {error}", away) from error
        show_pandas()
        from grpc import RpcError
        from pyspark.errors import PySparkException
        from pyspark.sql.connect.client.retries import DefaultPolicy
        from pyspark.sql.connect.session import SparkSession

        is_late = threading.Event()
        try:
            session = SparkSession.builder.remote(self._remote.url).create()
            session.client.set_retry_policies([DefaultPolicy(max_retries=RETRIES)])

            def interrupt() -> None:
                is_late.set()
                session.interruptAll()

            timer = threading.Timer(self._seconds, interrupt)
            timer.daemon = True
            timer.start()
            try:
                session.conf.set("spark.sql.session.timeZone", "UTC")
                yield session
            finally:
                timer.cancel()
                session.stop()
        except (PySparkException, RpcError) as error:
            text = str(error).split("\n", 1)[0][:MESSAGE_CHARACTERS]
            if is_late.is_set():
                hint = "narrow its parameters, or raise ANALYTICS_TIMEOUT_SECONDS"
                raise ReportTooSlow(f"the report took longer than {self._seconds:g} s", hint) from error
            if isinstance(error, RpcError) or "UNAVAILABLE" in text:
                raise Transient(f"Spark cannot be reached: {text}", away) from error
            raise Permanent(f"Spark cannot run the report: {text}", "see docs/lake.md for what Spark needs") from error


def _rows(table: Any, span: ReportSpan) -> Any:
    """The rows of a span, with every documented column in its type, as in the DuckDB reports."""
    from pyspark.sql.connect import functions as f

    def given(name: str, kind: str) -> Any:
        """The column, including values kept in columns of other types; see `app.lake.columns`."""
        own = [each for each in table.columns if each == name or each.startswith(f"{name}_as_")]
        return f.coalesce(*(f.col(each).cast(kind) for each in own)) if own else f.lit(None).cast(kind)

    limits = [
        *([f.col("device_id") == f.lit(span.device)] if span.device is not None else []),
        *([f.col(INSTANT) >= _instant(f"{span.since}")] if span.since is not None else []),
        *([f.col(INSTANT) < _instant(f"{span.until}")] if span.until is not None else []),
    ]
    for limit in limits:
        table = table.where(limit)
    finite = {name: given(name, "double") for name in NUMBERS}
    columns = {
        **{name: f.when(given(name, "string") != "", given(name, "string")) for name in TEXTS},
        **{name: f.when(f.abs(value) < f.lit(float("inf")), value) for name, value in finite.items()},
        NANOS: given(NANOS, "smallint"),
        INSTANT: f.col(INSTANT),
    }
    ordered = [name for name in DOCUMENTED if name != INSTANT]
    further = [name for name in table.columns if name not in ordered]
    return table.select(
        *(columns[name].alias(name) for name in ordered),
        *(columns.get(name, f.col(name)).alias(name) for name in further),
    )


def _instant(text: str) -> Any:
    from pyspark.sql.connect import functions as f

    return f.expr(f"TIMESTAMP '{text}Z'")


def _reader(session: Any, frame: Any) -> Any:
    """The answer as a pyarrow RecordBatchReader."""
    import pyarrow as pa
    from pyspark.sql.pandas.types import to_arrow_schema

    # The internals of `toLocalIterator`, which itself yields Python rows; `toArrow` would hold the whole answer in
    # memory.
    plan = frame._plan.to_proto(session.client)  # noqa: SLF001 - see above
    schema = to_arrow_schema(frame.schema, timezone="UTC")
    parts = session.client.to_table_as_iterator(plan, {})
    batches = (part.cast(schema).to_batches() for part in parts if isinstance(part, pa.Table))
    return pa.RecordBatchReader.from_batches(schema, chain.from_iterable(batches))
