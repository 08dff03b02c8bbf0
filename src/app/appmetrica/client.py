"""Client of AppMetrica's Logs API: each request gets one of the four answers of `/logs/v1/export` (see contracts).

Invariants: a call is counted before it is made, and the daily limit is never exceeded; a status message is never taken
for a file, and a truncated file never for a complete one. Callers do not wait for one another: the service allows 30
requests a second, and a file may take minutes to arrive.
"""

import gzip
import json
import logging
import re
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.appmetrica.rows import NEEDED
from app.config.settings import AppMetricaSettings
from app.core.errors import AppError, Permanent, Transient
from app.core.retry import Pauses, RetryPolicy, retry
from app.core.runs import Stop
from app.core.windows import Window
from app.db.state import PendingExport, SqlPulls
from app.product_events.http_client import READ_SECONDS, ServiceAnswer, Upstream, spooled

SERVICE = "appmetrica"
PROGRESS = re.compile(r"Progress is (\d+)%")
QUEUED = re.compile(r"enqueued", re.IGNORECASE)
MORE_PARTS = re.compile(r"more parts", re.IGNORECASE)
BUSY = (420, HTTPStatus.TOO_MANY_REQUESTS)  # the English quota page documents the one, the Russian page the other
QUEUE_SECONDS, RATE_SECONDS = 60.0, 5.0
MAX_LIST_BYTES, LIST_SECONDS = 1 << 20, 20.0  # the list is not built on request, and a person waits for it
APPLICATIONS = "/management/v1/applications"
ACCESS_HINT = "check APPMETRICA_API_KEY: an OAuth token with appmetrica:read, and APPMETRICA_APPLICATION_ID"


@dataclass(frozen=True, slots=True)
class NotReady:
    """The file is not ready. `percent` None = not reported; `at_least_seconds`: minimum wait before asking again.

    `heard`: the service has accepted the request.
    """

    text: str
    percent: int | None = None
    at_least_seconds: float = 0.0
    heard: bool = True


class RequestRefused(Permanent):
    """The request itself is invalid; `text` is the service's message."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(
            f"AppMetrica answered {status}: {text}", "correct the request: it names an unknown column or date"
        )
        self.text = text


log = logging.getLogger(__name__)


class MoreParts(Exception):
    """The file is too large for this number of parts."""


def _said(answer: ServiceAnswer) -> NotReady:
    """Interpret an answer without a file."""
    text = answer.text()
    match answer.status:
        case HTTPStatus.ACCEPTED:
            found = PROGRESS.search(text)
            return NotReady(text, int(found[1]) if found else None)
        case HTTPStatus.BAD_REQUEST if MORE_PARTS.search(text):
            raise MoreParts
        case HTTPStatus.BAD_REQUEST | HTTPStatus.NOT_FOUND | HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise RequestRefused(text, answer.status)
        case status if status in BUSY:
            seconds = QUEUE_SECONDS if QUEUED.search(text) else RATE_SECONDS
            return NotReady(text, None, answer.retry_after_seconds or seconds, heard=False)
    raise _error(answer, text)


def _error(answer: ServiceAnswer, text: str) -> Exception:
    said = f"AppMetrica answered {answer.status}: {text or 'nothing'}"
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Permanent(said, ACCESS_HINT)
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR or answer.status in BUSY:
        return Transient(said, "no action needed if this is temporary; the file that is being prepared is kept")
    return Permanent(said, "check APPMETRICA_BASE_URL")


def _check_whole(file: BinaryIO, *, may_be_empty: bool) -> None:
    """Raise Transient unless the file is whole gzip: that is how a cut transfer without a length shows."""
    is_empty = not file.tell()
    file.seek(0)
    try:
        with gzip.open(file) as whole:
            while whole.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        said = f"the file of AppMetrica is not whole: {error}"
        raise Transient(said, "no action needed: it is fetched again") from error
    if is_empty and not may_be_empty:
        raise Transient("AppMetrica's file is truncated", "no action needed: it is fetched again")


# Requests to AppMetrica, and exports in progress.
#
# Invariants: the query string identifies an export on the server, so it is built once, saved before it is first sent,
# and resent unchanged until the export is done, across restarts; the number of parts is saved as well. A file older
# than a day is requested again, since the service has dropped it.

FILE = Path(__file__).with_name("resources.toml")
SECOND = timedelta(seconds=1)
LOCAL = "%Y-%m-%d %H:%M:%S"
COLUMN = re.compile(r"[a-z][a-z0-9_]{0,80}")
KEPT_FOR = timedelta(hours=24)
FORGOTTEN_AFTER = timedelta(days=30)
MAX_PARTS = 1024
LONGEST_PAUSE_SECONDS = 60.0
POLICY = RetryPolicy(attempts=5, first_seconds=1.0, cap_seconds=60.0)


@dataclass(frozen=True, slots=True)
class LogResource:
    """One kind of rows. `received` "" = its rows carry no receipt time."""

    name: str
    columns: tuple[str, ...]
    received: str


@lru_cache(maxsize=1)
def resources() -> Mapping[str, LogResource]:
    """All resources that can be requested, by name."""
    listed = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: LogResource(name, tuple(each["columns"].split()), each.get("received", ""))
        for name, each in listed.items()
    }


@dataclass(frozen=True, slots=True)
class LogsRequest:
    """A saved request to the Logs API. `span`: the hours that it covers, None when a person made it."""

    path: str
    span: Window | None = None

    @property
    def text(self) -> str:
        """The text that is saved."""
        span = [self.span.start.isoformat(), self.span.end.isoformat()] if self.span else None
        return json.dumps({"path": self.path, "span": span})

    @property
    def resource(self) -> str:
        """The requested resource."""
        return self.path.partition(".csv")[0].rpartition("/")[2]

    @property
    def columns(self) -> Sequence[str]:
        """The columns, in the order of the answer."""
        return self.path.rpartition("&fields=")[2].split(",")

    def part(self, number: int, count: int) -> str:
        """The path of one of several parts; for a file in one piece, the path itself."""
        return self.path if count == 1 else f"{self.path}&parts_count={count}&part_number={number}"


def logs_request(
    application_id: int,
    resource: str,
    *,
    since: str,
    until: str,
    columns: Sequence[str],
    by_receipt: bool,
    span: Window | None = None,
) -> LogsRequest:
    """Rows between two local times of the application's time zone, both inclusive.

    `fields` is last, since answers are read by it.
    """
    given = {
        "application_id": application_id,
        "date_since": since,
        "date_until": until,
        "date_dimension": "receive" if by_receipt else "default",
        "use_utf8_bom": "false",
        "fields": ",".join(columns),
    }
    query = urlencode(given, quote_via=quote, safe=",:")
    return LogsRequest(f"/logs/v1/export/{resource}.csv?{query}", span)


def request_of(export: PendingExport) -> LogsRequest:
    """Parse the saved request."""
    held = json.loads(export.request)
    span = held["span"]
    return LogsRequest(held["path"], Window(*(datetime.fromisoformat(each) for each in span)) if span else None)


class TooManyParts(Permanent):
    """The file is too large even for our maximum number of parts."""


class Exports:
    """The exports of one application, configured by `given`. `left_out` are columns that the service did not know.

    A call waits up to `poll_timeout_seconds`, with pauses that start at `poll_interval_seconds`.
    """

    def __init__(
        self,
        given: AppMetricaSettings,
        token: str,
        application_id: int,
        *,
        spool: Path,
        pulls: SqlPulls,
        clock: Callable[[], datetime],
    ) -> None:
        self.given, self.application_id, self.pulls, self.clock = given, application_id, pulls, clock
        headers = {"Authorization": f"OAuth {token}"}
        self.upstream = Upstream("AppMetrica", given.base_url, "APPMETRICA_BASE_URL", headers)
        self.left_out = set[str]()
        self._spool = spool

    @property
    def calls_today(self) -> int:
        """Number of calls made today."""
        return self.pulls.calls(SERVICE, self.clock())

    @cached_property
    def zone(self) -> ZoneInfo:
        """The application's time zone: the configured one, else the service's, requested once."""
        name = self.given.timezone or str(self.application().get("time_zone_name") or "UTC")
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise Permanent(f"unknown time zone {name[:60]!r}", "set APPMETRICA_TIMEZONE") from error

    def _answer(
        self, path: str, headers: Mapping[str, str], pauses: Pauses, read_seconds: float = READ_SECONDS
    ) -> AbstractContextManager[ServiceAnswer]:
        """Make and count one call. Raises Transient when the daily limit is used up."""
        self.pulls.count_call(SERVICE, self.given.daily_calls, self.clock())
        return self.upstream.get(path, headers, pauses, read_seconds)

    def ask(self, path: str, pauses: Pauses, *, fresh: bool) -> NotReady | BinaryIO:
        """The file of a request, as gzip, or NotReady. The receiver closes the file.

        `fresh`: do not reuse a file made before. This moves the request to the end of the queue, so send it only once.
        Raises MoreParts, RequestRefused, Transient and Permanent.
        """
        headers = {"Accept-Encoding": "gzip", **({"Cache-Control": "no-cache"} if fresh else {})}
        with self._answer(path, headers, pauses) as answer:
            if answer.status != HTTPStatus.OK:
                return _said(answer)
            with spooled(self._spool, "a file of many rows") as file:
                if answer.header("content-encoding").lower() == "gzip":
                    file.writelines(answer.raw())
                    is_measured = answer.header("content-length") or answer.header("transfer-encoding")
                    _check_whole(file, may_be_empty=bool(is_measured))
                else:
                    with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
                        packed.writelines(answer.raw())
                file.seek(0)
            return file

    def applications(self) -> Mapping[int, Mapping[str, Any]]:
        """The applications that the token can access, by id. Raises Transient and Permanent."""
        with self._answer(APPLICATIONS, {"Accept-Encoding": "identity"}, Stop(), LIST_SECONDS) as answer:
            if answer.status != HTTPStatus.OK:
                raise _error(answer, answer.text())
            body = bytearray()
            for piece in answer.raw():
                body += piece
                if len(body) > MAX_LIST_BYTES:
                    raise Permanent("the list of applications is too long", "use a token that sees fewer of them")
        try:
            return {int(each["id"]): each for each in json.loads(body)["applications"]}
        except (ValueError, KeyError, TypeError) as error:
            raise Permanent("the list of applications cannot be read", "check APPMETRICA_BASE_URL") from error

    def application(self) -> Mapping[str, Any]:
        """This application. Raises Permanent when the token cannot access it."""
        found = self.applications().get(self.application_id)
        if found is None:
            hint = "check APPMETRICA_APPLICATION_ID, and who made the token"
            raise Permanent(f"the token does not see application {self.application_id}", hint)
        return found

    def ping(self) -> str:
        """Whether the token can access the application, for `check`. Raises Transient or Permanent."""
        with closing(self.upstream):
            self.application()
        calls = f"{self.calls_today} of {self.given.daily_calls} calls used today"
        return f"may read application {self.application_id}; {calls}"

    def keep_received(self, owner: str, resource: LogResource, span: Window) -> PendingExport:
        """`keep` for all rows received in whole hours, without the columns that the service did not know.

        May return more rows: when clocks go back, two hours have the same local time.
        """
        since, until = (at.astimezone(self.zone) for at in (span.start, span.end - SECOND))
        request = logs_request(
            self.application_id,
            resource.name,
            since=since.strftime(LOCAL),
            until=until.strftime(LOCAL),
            columns=[column for column in resource.columns if column not in self.left_out],
            by_receipt=True,
            span=span,
        )
        return self.keep(owner, request)

    def keep(self, owner: str, request: LogsRequest) -> PendingExport:
        """Save a request as an export, which gets a number. Deletes exports that were done long ago."""
        now = self.clock()
        self.pulls.forget(SERVICE, owner, now - FORGOTTEN_AFTER)
        return self.pulls.add(SERVICE, owner, request.text, now)

    def leaves_out(self, resource: LogResource, error: AppError) -> bool:
        """When the service refuses a column that it does not know: leave it out from now on. False when it refuses
        something else, or a column that is needed.
        """
        named = _refused_words(error) & set(resource.columns)
        if len(named) != 1 or self.is_needed(resource, error):
            return False
        self.left_out.update(named)
        log.warning("AppMetrica has no column %s: it is no longer requested", ", ".join(named))
        return True

    def is_needed(self, resource: LogResource, error: AppError) -> bool:
        """Whether the service refuses a column that is needed to identify rows."""
        return bool(_refused_words(error) & {*NEEDED, resource.received})

    @contextmanager
    def resumed(self, export: PendingExport, *, fresh: bool = True) -> Iterator["ExportInProgress"]:
        """Continue an export. `fresh`: re-create its file unless the export is already in progress."""
        # The service has dropped yesterday's file: asking again with the same text makes a new one.
        if export.done or (export.asked_at is not None and self.clock() - export.asked_at > KEPT_FOR):
            export = replace(export, asked_at=None, done=False)
            self.pulls.save(export)
        with closing(ExportInProgress(self, export, fresh)) as under_way:
            yield under_way


@dataclass(slots=True)
class ExportInProgress:
    """One export, used by one caller. It can be abandoned at any time: the next caller continues from the saved state.

    `files`: the parts received so far, in order, each a gzip file with its own header.
    """

    exports: Exports
    export: PendingExport
    fresh: bool
    files: list[BinaryIO] = field(default_factory=list)

    @property
    def request(self) -> LogsRequest:
        """The request of this export."""
        return request_of(self.export)

    def step(self, pauses: Pauses) -> NotReady | None:
        """Ask for missing parts; None when all are in `files`. Raises the errors of `Exports.ask` except MoreParts."""
        while len(self.files) < self.export.parts_count:
            path = self.request.part(len(self.files), self.export.parts_count)
            fresh = self.fresh and self.export.asked_at is None
            try:
                answer = retry(partial(self.exports.ask, path, pauses, fresh=fresh), POLICY, pauses)
            except MoreParts:
                self._double()
                continue
            if self.export.asked_at is None and not (isinstance(answer, NotReady) and not answer.heard):
                self._save(replace(self.export, asked_at=self.exports.clock()))
            if isinstance(answer, NotReady):
                return answer
            self.files.append(answer)
        return None

    def wait(self, pauses: Pauses) -> NotReady | None:
        """Repeat `step` until all parts are there or the time is up; then returns the service's last answer."""
        given, waited_seconds = self.exports.given, 0.0
        interval_seconds = given.poll_interval_seconds
        while (answer := self.step(pauses)) is not None and waited_seconds < given.poll_timeout_seconds:
            # Capped: a service that asks for an hour must not block a run for that long.
            pause_seconds = min(max(interval_seconds, answer.at_least_seconds), given.poll_timeout_seconds)
            pauses.pause(pause_seconds)
            waited_seconds += pause_seconds
            interval_seconds = next_pause(interval_seconds)
        return answer

    def close(self) -> None:
        """Free the files. Idempotent."""
        while self.files:
            self.files.pop().close()

    def finish(self) -> None:
        """Mark the export as done, after its file was processed."""
        self._save(replace(self.export, done=True))

    def _double(self) -> None:
        """Double the number of parts. Files fetched so far belong to another split and are discarded."""
        self.close()
        if self.export.parts_count >= MAX_PARTS:
            raise TooManyParts(
                f"AppMetrica asks for more than {MAX_PARTS} parts of {self.request.path[:200]}", "ask for fewer days"
            )
        self._save(replace(self.export, parts_count=self.export.parts_count * 2))

    def _save(self, export: PendingExport) -> None:
        self.exports.pulls.save(export)
        self.export = export


def _refused_words(error: AppError) -> set[str]:
    """The words of the service's refusal; none when the error is another one."""
    return set(re.findall(r"\w+", error.text)) if isinstance(error, RequestRefused) else set()


def next_pause(interval_seconds: float) -> float:
    """The next pause. Pauses grow because the number of calls per day is limited."""
    return min(interval_seconds * 1.5, max(LONGEST_PAUSE_SECONDS, interval_seconds))
