"""Verifications started by a button or a route: one at a time per job, with the latest result kept in memory.

Invariants: a verification takes no lease and changes nothing; healing is a normal run, with the job's lease and a run
record; a result holds at most SHOWN windows, all of which differ.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from app.core.errors import AppError, Transient
from app.core.runs import Context, Job, Report, Stop
from app.core.verify import ComparedWindow, Verdict, Verification, heal, refuse_unknown, verify
from app.core.windows import Window, whole_second
from app.ops.delivery_map import DeliveryMaps
from app.ops.scheduler import require_ability

SHOWN = 500
NO_VERIFICATION = ("has no verification", "jobs whose two ends can be compared: {}")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The state of a verification, or of the healing of a part of a job.

    `counts` are by `Verdict`; `windows` are those that differ. `total` is the number of windows to compare, 0 until it
    is known; `healed` of them were rewritten. `partition` None = all.
    """

    job: str
    span: Window
    started_at: datetime
    ended_at: datetime | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    windows: Sequence[ComparedWindow] = ()
    error: str = ""
    hint: str = ""
    total: int = 0
    healed: int = 0
    partition: str | None = None
    by: str = ""

    @property
    def equal(self) -> bool | None:
        """Whether all windows are equal; None while that is unknown, and when nothing was compared."""
        if self.ended_at is None or self.error or not self.counts:
            return None
        return self.counts.keys() == {Verdict.EQUAL.value}

    def with_verdict(self, verdict: ComparedWindow) -> "VerificationResult":
        """The result with one more window."""
        sign = Verdict.EQUAL if verdict.healed else verdict.sign
        kept = sign is not Verdict.EQUAL and len(self.windows) < SHOWN
        return replace(
            self,
            counts={**self.counts, sign.value: self.counts.get(sign.value, 0) + 1},
            windows=(*self.windows, verdict) if kept else self.windows,
            healed=self.healed + verdict.healed,
        )

    def with_mended(self, verdict: ComparedWindow) -> "VerificationResult":
        """The result after one of its windows was checked by healing: windows that are now equal are removed."""
        before = next((each for each in self.windows if each.slot == verdict.slot), None)
        if before is None:
            return self
        after = Verdict.EQUAL if verdict.healed else verdict.sign
        counts = Counter(self.counts) - Counter([before.sign.value]) + Counter([after.value])
        kept = (verdict,) if after is not Verdict.EQUAL else ()
        windows = [now for each in self.windows for now in ((each,) if each is not before else kept)]
        return replace(self, counts=counts, windows=windows)


class Verifications:
    """The latest verification and the latest healing of each job. When either ends, and after each window that was
    rewritten, nobody sees a map of `maps` from before any more. Thread-safe.
    """

    def __init__(
        self,
        verifications: Mapping[str, Verification],
        stop: Stop,
        clock: Callable[[], datetime],
        maps: DeliveryMaps,
    ) -> None:
        self._verifications = verifications
        self._stop = stop
        self._clock = clock
        self._maps = maps
        self._lock = threading.Lock()
        self._results: dict[str, VerificationResult] = {}
        self._heals: dict[str, VerificationResult] = {}

    @property
    def jobs(self) -> Sequence[str]:
        """Jobs that can be verified."""
        return sorted(self._verifications)

    def results(self) -> Sequence[VerificationResult]:
        """The latest verification of each job, including running ones."""
        with self._lock:
            return [self._results[name] for name in sorted(self._results)]

    def heals(self) -> Sequence[VerificationResult]:
        """The latest healing of each job, including queued and running ones."""
        with self._lock:
            return [self._heals[name] for name in sorted(self._heals)]

    def start(self, job: str, span: Window, partition: str | None = None, by: str = "") -> None:
        """Start to compare `span`. Raises Rejected for a job without verification, Transient while another one runs."""
        verification = require_ability(self._verifications, job, *NO_VERIFICATION)
        with self._lock:
            known = self._results.get(job)
            if known is not None and known.ended_at is None:
                raise Transient(f"{job} is being verified already", "wait for its result")
            self._results[job] = VerificationResult(job, span, self._clock(), partition=partition, by=by)
        threading.Thread(target=self._compare, args=(job, verification), name=f"verify-{job}", daemon=True).start()

    def heal(self, job: str, span: Window, partition: str | None, by: str) -> Callable[[Job], Job]:
        """What to queue to verify and heal `span` of a job; `heals` shows the progress.

        Raises Rejected for a job without verification, and for an unknown partition.
        """
        verification = require_ability(self._verifications, job, *NO_VERIFICATION)
        refuse_unknown(verification(self._stop), span, partition)
        with self._lock:
            self._heals[job] = VerificationResult(job, span, self._clock(), partition=partition, by=by)

        def seen(verdict: ComparedWindow) -> None:
            with self._lock:
                self._heals[job] = self._heals[job].with_verdict(verdict)
                known = self._results.get(job)
                if known is not None and known.ended_at is not None:
                    self._results[job] = known.with_mended(verdict)
            if verdict.healed or verdict.sign is Verdict.EQUAL:
                self._maps.healed(job, verdict.slot.partition, verdict.slot.window)

        def ended(error: AppError | None) -> None:
            with self._lock:
                message, hint = (error.message, error.hint) if error else ("", "")
                self._heals[job] = replace(self._heals[job], ended_at=self._clock(), error=message, hint=hint)
            self._maps.forget(job)

        return lambda of: heal_job(of, verification, span, partition, seen=seen, ended=ended)

    def _compare(self, job: str, verification: Verification) -> None:
        result = self._results[job]
        broken = (
            "the verification was interrupted",
            "the log of the service around this moment says why; please report it",
        )
        try:
            ends = verification(self._stop)
            result = replace(result, total=sum(1 for _ in ends.slots(result.span, result.partition)))
            self._keep(result)
            for verdict in verify(ends, result.span, self._stop, result.partition):
                result = result.with_verdict(verdict)
                self._keep(result)
            broken = ("", "")
        except AppError as error:
            broken = (error.message, error.hint)
        finally:
            self._maps.forget(job)
            self._keep(replace(result, ended_at=self._clock(), error=broken[0], hint=broken[1]))
        log.info("%s verified: %s", job, format_signs(result.counts))

    def _keep(self, result: VerificationResult) -> None:
        with self._lock:
            self._results[result.job] = result


def heal_job(
    job: Job,
    verification: Verification,
    span: Window,
    partition: str | None,
    *,
    seen: Callable[[ComparedWindow], None],
    ended: Callable[[AppError | None], None] = lambda _: None,
) -> Job:
    """`job`, with its name and lease, whose work is to heal `span`, for all partitions or one. `seen` gets each
    compared window; `ended` is called at the end, with the error if there was one.
    """

    def work(context: Context) -> Report:
        counts: Counter[str] = Counter()

        def note(verdict: ComparedWindow) -> None:
            counts[verdict.sign.value] += 1
            seen(verdict)

        try:
            report = heal(verification(context.stop), span, context, note, partition)
        except AppError as error:
            ended(error)
            raise
        ended(None)
        log.info("%s %s: %s before it was repaired", job.name, span, format_signs(counts))
        return report

    return replace(job, work=work)


def format_signs(counts: Mapping[str, int]) -> str:
    """The number of windows per verdict, as text."""
    return ", ".join(f"{counts[sign.value]} {sign.value}" for sign in Verdict if counts.get(sign.value)) or "no window"


def window_json(verdict: ComparedWindow) -> Mapping[str, Any]:
    """One window as JSON."""
    window, source, destination = verdict.slot.window, verdict.source, verdict.destination
    return {
        "partition": verdict.slot.partition,
        "start": whole_second(window.start),
        "end": whole_second(window.end),
        "sign": verdict.sign.value,
        "source_rows": source.rows if source else None,
        "source_digest": source.digest if source else None,
        "destination_rows": destination.rows if destination else None,
        "destination_digest": destination.digest if destination else None,
        "healed": verdict.healed,
        "error": verdict.error,
        "hint": verdict.hint,
    }
