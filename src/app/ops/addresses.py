"""Calling addresses outside: one call without surprises, and the thread that calls heartbeats.

Invariants: a redirect is never followed, an error names no more than the host, no answer is read beyond its head; a
heartbeat that cannot be delivered holds up nothing but other heartbeats, and those for no longer than one time-out.
"""

import logging
import threading
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from app.core.errors import AppError, Permanent, Transient

SEND_SECONDS = 10.0
BEAT_SECONDS = 4.0
REFUSED = 300
log = logging.getLogger(__name__)


def post(url: str, body: Mapping[str, Any] | None, seconds: float = SEND_SECONDS) -> None:
    """POST JSON, or GET without a body. Raises Transient or Permanent, whose texts hold no more than the host."""
    import urllib3

    host, method = urlsplit(url).hostname, "GET" if body is None else "POST"
    pool = urllib3.PoolManager(retries=False, timeout=seconds, headers={"User-Agent": "headwater"})
    try:
        with pool, closing(pool.request(method, url, json=body, redirect=False, preload_content=False)) as answer:
            status = answer.status
    except urllib3.exceptions.HTTPError as error:
        raise Transient(f"{host}: {type(error).__name__}", "check the address and the network") from error
    if status in (408, 429) or status >= 500:  # noqa: PLR2004 - HTTP's own numbers
        raise Transient(f"{host} answers {status}", "nothing to do: it is tried again")
    if status >= REFUSED:
        raise Permanent(f"{host} answers {status}", "check the address; redirects are not followed")


class Heartbeats:
    """One thread that calls the address of a job, once for each `beat`, which never waits.

    Beats of a job that come while one of it waits are one, so what waits is bounded by the number of jobs.
    """

    def __init__(self, urls: Mapping[str, str], seconds: float = BEAT_SECONDS) -> None:
        self._urls = urls
        self._seconds = seconds
        self._changed = threading.Condition()
        self._waiting: dict[str, None] = {}
        self._silent: set[str] = set()
        self._closed = False

    def start(self) -> None:
        """Begin to call, if there is anybody to call."""
        if self._urls:
            threading.Thread(target=self._loop, name="heartbeats", daemon=True).start()

    def close(self) -> None:
        """Call no more; one that is on its way is left behind."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def beat(self, job: str) -> None:
        """A run of `job` went well."""
        if job in self._urls:
            with self._changed:
                self._waiting[job] = None
                self._changed.notify_all()

    def _loop(self) -> None:
        while (job := self._next()) is not None:
            self._call(job)

    def _next(self) -> str | None:
        """The job that waits longest; None once closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            job = next(iter(self._waiting))
            del self._waiting[job]
            return job

    def _call(self, job: str) -> None:
        """One attempt: the next good run calls again. That an address is away is said once, and so is its return."""
        try:
            post(self._urls[job], None, self._seconds)
        except AppError as error:
            if job not in self._silent:
                log.warning("the heartbeat of %s does not arrive: %s", job, error)
            self._silent.add(job)
        else:
            if job in self._silent:
                log.info("the heartbeat of %s arrives again", job)
            self._silent.discard(job)
