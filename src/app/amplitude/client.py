"""Client of Amplitude's Export API: fetches archives of hours from `/api/2/export`.

Invariants: a request names its first and last hour, so adjacent requests do not overlap; a range that is too large is
halved, in order, down to single hours; a project makes one request at a time. An archive is an unnamed temporary file,
so a killed process leaves nothing behind.
"""

import base64
import re
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path

from app.amplitude.archives import ExportArchive
from app.core.errors import AppError, Permanent, Transient
from app.core.retry import Pauses, RetryPolicy, retry
from app.core.runs import Stop
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, Window, window_at, windows_between
from app.product_events.hours import HOUR
from app.product_events.http_client import ServiceAnswer, Upstream, held_turn, spooled

TOO_LARGE = re.compile(r"too large|limit size|shorten the time", re.IGNORECASE)
CODES_OF_SIZE = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
BUSY_SECONDS = 60.0
IDENTITY = {"Accept-Encoding": "identity"}  # the archive is compressed already: once more only costs time
POLICY = RetryPolicy(attempts=5, first_seconds=2.0, cap_seconds=120.0)
# Used after a fault: halving a day down to the hour must not take a day of waiting.
SHORT_POLICY = replace(POLICY, attempts=2)
KEYS_HINT = "check the pair of keys, and that AMPLITUDE_BASE_URL is for the project's region"
LARGE_HINT = "export this hour through Amplitude's S3 destination: it is too large for the Export API"


class HourTooLarge(Permanent):
    """The service reports that a single hour is above its limit and cannot be exported."""


class _TimedOut(Transient):
    """The service took too long for so many hours, perhaps because they are too large."""


class _KeysRefused(Permanent):
    """The key pair is rejected, which is not the fault of an hour."""


class _TooManyRequests(Transient):
    """Rate limited, which is not the fault of an hour."""


class Project:
    """One key pair, which means one project. Thread-safe."""

    def __init__(self, base_url: str, client_id: str, secret_key: str, spool: Path) -> None:
        token = base64.b64encode(f"{client_id}:{secret_key}".encode()).decode()
        headers = {"Authorization": f"Basic {token}"}
        self.upstream = Upstream("Amplitude", base_url, "AMPLITUDE_BASE_URL", headers)
        self._spool, self._turn = spool, threading.Lock()

    def fetch(
        self, span: Window, pauses: Pauses, policy: RetryPolicy = POLICY, *, past_faults: bool = False
    ) -> Iterator[ExportArchive]:
        """The archives of whole hours, oldest first, in chunks of at most a day. Raises Transient and Permanent.

        `past_faults`: a failing range is halved down to the hour, which is returned with its fault. Then only errors
        that are not the fault of an hour are raised: a rejected key pair, too many requests.
        """
        days = windows_between(span.start, span.end, DAY_SECONDS)
        left = deque((Window(max(day.start, span.start), min(day.end, span.end)), policy) for day in days)
        while left:
            part, part_policy = left.popleft()
            try:
                fetched = retry(partial(self._fetch, part, pauses), part_policy, pauses)
            except (_KeysRefused, _TooManyRequests):
                raise
            except (Transient, Permanent) as error:
                fetched = ExportArchive(part, None, error)
            hours, fault = len(fetched.hours), fetched.fault
            if fault is None or (past_faults and hours == 1):
                yield fetched
                continue
            fetched.close()
            if hours == 1 or not (past_faults or isinstance(fault, HourTooLarge | _TimedOut)):
                raise fault
            middle = part.start + hours // 2 * HOUR
            left.appendleft((Window(middle, part.end), SHORT_POLICY))
            left.appendleft((Window(part.start, middle), SHORT_POLICY))

    def try_hour(self, hour: Window, pauses: Pauses) -> None:
        """Fetch an hour and discard it. Raises Transient or Permanent when the service does not respond for it; an hour
        above its limit is a response.
        """
        (fetched,) = self.fetch(hour, pauses, SHORT_POLICY, past_faults=True)
        fetched.close()
        if fetched.fault is not None and not isinstance(fetched.fault, HourTooLarge):
            raise fetched.fault

    def ping(self, clock: Callable[[], datetime]) -> str:
        """Try one hour of yesterday, for `check`. Raises Transient or Permanent."""
        with closing(self.upstream):
            self.try_hour(window_at(clock() - timedelta(days=1), HOUR_SECONDS), Stop())
        return "may export events"

    def _fetch(self, span: Window, pauses: Pauses) -> ExportArchive:
        path = f"/api/2/export?start={span.start:%Y%m%dT%H}&end={span.end - HOUR:%Y%m%dT%H}"
        with held_turn(self._turn, pauses), self.upstream.get(path, IDENTITY, pauses) as answer:
            if answer.status == HTTPStatus.NOT_FOUND:
                return ExportArchive(span, None)
            if answer.status != HTTPStatus.OK:
                return ExportArchive(span, None, _refusal(span, answer))
            with spooled(self._spool, "an archive of up to 4 GB") as file:
                for piece in answer.raw():
                    file.write(piece)
                    pauses.pause(0)
                # A proxy's error page, or a truncated archive, may well have status 200.
                if not zipfile.is_zipfile(file):
                    kind = answer.header("content-type") or "nothing"
                    raise Transient(
                        f"the export of {span} is not a complete zip but {kind}",
                        "no action needed if this is temporary",
                    )
                file.seek(0)
            return ExportArchive(span, file)


def _refusal(span: Window, answer: ServiceAnswer) -> AppError:
    """The fault of hours that are too large for one archive. Raises the error that any other answer without an archive
    stands for.
    """
    text = answer.text()
    said = f"Amplitude answered {answer.status} for {span}: {text[:300]}"
    match answer.status:
        case status if status in CODES_OF_SIZE and (status != HTTPStatus.BAD_REQUEST or TOO_LARGE.search(text)):
            return HourTooLarge(said, LARGE_HINT)
        case HTTPStatus.GATEWAY_TIMEOUT:
            return _TimedOut(said, LARGE_HINT)
        case HTTPStatus.TOO_MANY_REQUESTS:
            seconds = answer.retry_after_seconds or BUSY_SECONDS
            raise _TooManyRequests(said, "no action needed: it is retried", retry_after_seconds=seconds)
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            raise _KeysRefused(said, KEYS_HINT)
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise Transient(said, "no action needed if this is temporary; otherwise see Amplitude's status page")
    raise Permanent(said, "please report it: the service gave an unknown response")
