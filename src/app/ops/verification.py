"""Verifications for people: started by a button or a route, one at a time per job, the latest result kept in memory.

Invariants: a look takes no lease and changes nothing; healing is a run like any other, under the job's lease and in its
record; a result holds at most SHOWN windows, those that are not equal.
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
from app.core.verify import ComparedWindow, PartitionWindow, Verdict, Verification, heal, refuse_unknown, verify
from app.core.windows import Window
from app.ops.scheduler import require_ability, with_run_in_logs

SHOWN = 500
NO_VERIFICATION = ("has no verification", "jobs whose two ends can be compared: {}")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """What a verification, or the healing of a part of a job, found so far.

    `counts` are by sign; `windows` are those that are not equal. `total` windows are to be compared, 0 while
    that is not known. `healed` of them were written again. `partition` None = all.
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
        """Whether all windows are equal; None while that is not known, and when nothing was compared."""
        if self.ended_at is None or self.error or not self.counts:
            return None
        return self.counts.keys() == {Verdict.EQUAL.value}

    def with_verdict(self, verdict: ComparedWindow) -> "VerificationResult":
        """The result with one more window."""
        sign = Verdict.EQUAL if verdict.healed else verdict.sign
        counts = {**self.counts, sign.value: self.counts.get(sign.value, 0) + 1}
        kept = sign is not Verdict.EQUAL and len(self.windows) < SHOWN
        windows = (*self.windows, verdict) if kept else self.windows
        return replace(self, counts=counts, windows=windows, healed=self.healed + verdict.healed)

    def with_mended(self, verdict: ComparedWindow) -> "VerificationResult":
        """The result after healing looked at one of its windows: what is equal now is not among them any more."""
        before = next((each for each in self.windows if each.slot == verdict.slot), None)
        if before is None:
            return self
        after = Verdict.EQUAL if verdict.healed else verdict.sign
        counts = Counter(self.counts)
        counts[before.sign.value] -= 1
        counts[after.value] += 1
        kept = (verdict,) if after is not Verdict.EQUAL else ()
        windows = [now for each in self.windows for now in ((each,) if each is not before else kept)]
        return replace(self, counts={sign: n for sign, n in counts.items() if n}, windows=windows)


class Verifications:
    """The latest verification and the latest healing of each job. `looked` is called at the end of one, before it is
    told, and `healed` after a window was written again. From any thread.
    """

    def __init__(
        self,
        verifications: Mapping[str, Verification],
        stop: Stop,
        clock: Callable[[], datetime],
        looked: Callable[[str], None],
        healed: Callable[[str, PartitionWindow], None] = lambda _, __: None,
    ) -> None:
        self._verifications = verifications
        self._stop = stop
        self._clock = clock
        self._looked = looked
        self._healed = healed
        self._lock = threading.Lock()
        self._results: dict[str, VerificationResult] = {}
        self._heals: dict[str, VerificationResult] = {}

    @property
    def jobs(self) -> Sequence[str]:
        """Jobs whose two ends can be compared."""
        return sorted(self._verifications)

    def results(self) -> Sequence[VerificationResult]:
        """The latest verification of each job, also one that goes on."""
        with self._lock:
            return [self._results[name] for name in sorted(self._results)]

    def heals(self) -> Sequence[VerificationResult]:
        """The latest healing of each job, also one that waits or goes on."""
        with self._lock:
            return [self._heals[name] for name in sorted(self._heals)]

    def start(self, job: str, span: Window, partition: str | None = None, by: str = "") -> None:
        """Begin to compare `span`. Raises Rejected for a job that has no verification, Transient while one goes on."""
        verification = require_ability(self._verifications, job, *NO_VERIFICATION)
        with self._lock:
            known = self._results.get(job)
            if known is not None and known.ended_at is None:
                raise Transient(f"{job} is being verified already", "wait for its result")
            self._results[job] = VerificationResult(job, span, self._clock(), partition=partition, by=by)
        threading.Thread(target=self._compare, args=(job, verification), name=f"verify-{job}", daemon=True).start()

    def heal(self, job: str, span: Window, partition: str | None, by: str) -> Callable[[Job], Job]:
        """What to queue so that `span` of a job is verified and mended, the course of which `heals` tells.

        Raises Rejected for a job without verification, and for a partition that is not known.
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
                self._healed(job, verdict.slot)

        def ended(error: AppError | None) -> None:
            with self._lock:
                message, hint = (error.message, error.hint) if error else ("", "")
                self._heals[job] = replace(self._heals[job], ended_at=self._clock(), error=message, hint=hint)
            self._looked(job)

        return lambda of: heal_job(of, verification, span, partition, seen=seen, ended=ended)

    def _compare(self, job: str, verification: Verification) -> None:
        result = self._results[job]
        broken = ("the verification broke off", "the log of the service around this moment says why; please report it")
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
            self._looked(job)
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
    """`job`, under its own name and lease, with the mending of `span` as its work, of all partitions or one. `seen` is
    told of each window that was compared, `ended` of the end of the work and what broke it off.
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
        log.info("%s %s: %s before it was mended", job.name, span, format_signs(counts))
        return report

    return with_run_in_logs(replace(job, work=work))


def format_signs(counts: Mapping[str, int]) -> str:
    """Signs and how many windows have each, as text."""
    return ", ".join(f"{counts[sign.value]} {sign.value}" for sign in Verdict if counts.get(sign.value)) or "no window"


def window_json(verdict: ComparedWindow) -> Mapping[str, Any]:
    """One window as JSON."""
    window, source, destination = verdict.slot.window, verdict.source, verdict.destination
    return {
        "partition": verdict.slot.partition,
        "start": f"{window.start:%Y-%m-%dT%H:%M:%SZ}",
        "end": f"{window.end:%Y-%m-%dT%H:%M:%SZ}",
        "sign": verdict.sign.value,
        "source_rows": source.rows if source else None,
        "source_digest": source.digest if source else None,
        "destination_rows": destination.rows if destination else None,
        "destination_digest": destination.digest if destination else None,
        "healed": verdict.healed,
        "error": verdict.error,
        "hint": verdict.hint,
    }
