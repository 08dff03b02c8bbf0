"""Verifications started by a button or a route: one at a time per job, with the latest result kept in memory.

Invariants: a verification takes no lease and changes nothing; healing is a normal run, with the job's lease and a run
record; a result holds at most SHOWN windows, all of which differ.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
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


Change = Callable[[VerificationResult], VerificationResult]


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
        begun = VerificationResult(job, span, self._clock(), partition=partition, by=by)
        with self._lock:
            if job in self._results and self._results[job].ended_at is None:
                raise Transient(f"{job} is being verified already", "wait for its result")
            self._results[job] = begun
        threading.Thread(target=self._compare, args=(begun, verification), name=f"verify-{job}", daemon=True).start()

    def heal(
        self, job: str, span: Window, partition: str | None, by: str, queue: Callable[[Callable[[Job], Job]], None]
    ) -> None:
        """Verify and heal `span` in a run that `queue` takes; `heals` shows the progress.

        Raises Rejected for a job without verification, and for an unknown partition; and the errors of `queue`.
        """
        verification = require_ability(self._verifications, job, *NO_VERIFICATION)
        refuse_unknown(verification(self._stop), span, partition)
        begun = VerificationResult(job, span, self._clock(), partition=partition, by=by)

        def seen(verdict: ComparedWindow) -> None:
            self._change(self._heals, begun, lambda held: held.with_verdict(verdict))
            with self._lock:
                known = self._results.get(job)
                if known is not None and known.ended_at is not None:
                    self._results[job] = known.with_mended(verdict)
            if verdict.healed:
                self._maps.forget(job)
            if verdict.healed or verdict.sign is Verdict.EQUAL:
                self._maps.healed(job, verdict.slot.partition, verdict.slot.window)

        def recorded(of: Job) -> Job:
            healing = heal_job(of, verification, span, partition, seen)

            def work(context: Context) -> Report:
                with self._recorded(self._heals, begun):
                    return healing.work(context)

            return replace(healing, work=work)

        with self._lock:  # the run waits for it before it reports its first window
            queue(recorded)
            self._heals[job] = begun

    def _compare(self, begun: VerificationResult, verification: Verification) -> None:
        with suppress(AppError), self._recorded(self._results, begun) as change:
            ends = verification(self._stop)
            total = sum(1 for _ in ends.slots(begun.span, begun.partition))
            change(lambda held: replace(held, total=total))
            for verdict in verify(ends, begun.span, self._stop, begun.partition):
                change(partial(VerificationResult.with_verdict, verdict=verdict))
        log.info("%s verified: %s", begun.job, format_signs(self._results[begun.job].counts))

    @contextmanager
    def _recorded(
        self, kept: dict[str, VerificationResult], begun: VerificationResult
    ) -> Iterator[Callable[[Change], None]]:
        """Yields a function that changes the result while the work goes on; then records the end, and its error."""
        error, hint = (
            "the verification was interrupted",
            "the log of the service around this moment says why; please report it",
        )
        try:
            yield partial(self._change, kept, begun)
            error = hint = ""
        except AppError as fault:
            error, hint = fault.message, fault.hint
            raise
        finally:
            self._maps.forget(begun.job)
            self._change(kept, begun, lambda held: replace(held, ended_at=self._clock(), error=error, hint=hint))

    def _change(self, kept: dict[str, VerificationResult], begun: VerificationResult, change: Change) -> None:
        """Replace the result of what was `begun`, unless a newer one has taken its place."""
        with self._lock:
            held = kept.get(begun.job)
            if held is not None and held.started_at == begun.started_at:
                kept[begun.job] = change(held)


def heal_job(
    job: Job,
    verification: Verification,
    span: Window,
    partition: str | None,
    seen: Callable[[ComparedWindow], None],
) -> Job:
    """`job`, with its name and lease, whose work is to heal `span`, for all partitions or one. `seen` gets each
    compared window.
    """

    def work(context: Context) -> Report:
        counts: Counter[str] = Counter()

        def note(verdict: ComparedWindow) -> None:
            counts[verdict.sign.value] += 1
            seen(verdict)

        report = heal(verification(context.stop), span, context, note, partition)
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
