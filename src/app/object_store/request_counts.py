"""Counts of the requests that an outside system charges for, as sent by this process."""

from collections import defaultdict
from collections.abc import Mapping
from threading import Lock
from typing import Any

from app.core.runs import current_run

PUT, LIST, GET, DELETE, READ_UNIT = "put", "list", "get", "delete", "read_unit"

LISTS = frozenset(
    {"ListObjectsV2", "ListObjects", "ListObjectVersions", "ListMultipartUploads", "ListParts", "ListBuckets"}
)
FREE = frozenset({"DeleteObject", "DeleteObjects", "AbortMultipartUpload", "DeleteObjectTagging"})


def kind_of(operation: str) -> str:
    """The price class of an S3 operation, given the SDK's name for it.

    Source: Amazon S3 pricing, "Requests and data retrievals": PUT, COPY, POST and LIST are one class, GET and all
    others are the other; DELETE is free.
    """
    if operation in FREE:
        return DELETE
    if operation in LISTS:
        return LIST
    return GET if operation.startswith(("Get", "Head")) else PUT


class RequestCounter:
    """Sums by kind since they were last taken, in total and for each current run. Thread-safe."""

    def __init__(self) -> None:
        self._counts = defaultdict[str, float](float)
        self._of_runs = defaultdict[str, defaultdict[str, float]](lambda: defaultdict(float))
        self._lock = Lock()

    def add(self, kind: str, number: float = 1) -> None:
        """Count requests, or read units, which may be fractions."""
        run_id = current_run.get()
        with self._lock:
            self._counts[kind] += number
            if run_id:
                self._of_runs[run_id][kind] += number

    def add_elsewhere(self, counts: Mapping[str, float]) -> None:
        """Count for the current run what another process sent and records itself."""
        with self._lock:
            for kind, number in counts.items():
                self._of_runs[current_run.get()][kind] += number

    def count_sent(self, event_name: str, **_: Any) -> None:
        """Count an S3 request on the SDK's event `before-send.s3.<Operation>`; does not change the request."""
        self.add(kind_of(event_name.rpartition(".")[2]))

    def take(self) -> dict[str, float]:
        """The counts since the last call."""
        with self._lock:
            taken, self._counts = dict(self._counts), defaultdict(float)
        return taken

    def take_run(self, run_id: str) -> dict[str, float]:
        """The counts of a run that has ended."""
        with self._lock:
            return dict(self._of_runs.pop(run_id, {}))
