"""Verifications for people: started by a button or a route, one at a time per job, the latest result kept in memory.

Invariants: a look takes no lease and changes nothing; healing is a run like any other, under the job's lease and in its
record; a result holds at most SHOWN windows, those that are not equal.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from app.core.errors import AppError, Rejected, Transient
from app.core.runs import Context, Job, Report, Stop
from app.core.verify import Sign, Verdict, Verification, heal, verify
from app.core.windows import Window
from app.ops.scheduler import named

SHOWN = 500
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What a verification found so far. `counts` are by sign; `windows` are those that are not equal."""

    job: str
    span: Window
    started_at: datetime
    ended_at: datetime | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    windows: Sequence[Verdict] = ()
    error: str = ""
    hint: str = ""

    @property
    def equal(self) -> bool | None:
        """Whether all windows are equal; None while that is not known, and when nothing was compared."""
        if self.ended_at is None or self.error or not self.counts:
            return None
        return self.counts.keys() == {Sign.EQUAL.value}

    def with_verdict(self, verdict: Verdict) -> "Result":
        """The result with one more window."""
        counts = {**self.counts, verdict.sign.value: self.counts.get(verdict.sign.value, 0) + 1}
        kept = verdict.sign is not Sign.EQUAL and len(self.windows) < SHOWN
        return replace(self, counts=counts, windows=(*self.windows, verdict) if kept else self.windows)

    def with_mended(self, verdict: Verdict) -> "Result":
        """The result after healing looked at one of its windows: what is equal now is not among them any more."""
        before = next((each for each in self.windows if each.slot == verdict.slot), None)
        if before is None:
            return self
        after = Sign.EQUAL if verdict.healed else verdict.sign
        counts = Counter(self.counts)
        counts[before.sign.value] -= 1
        counts[after.value] += 1
        kept = (verdict,) if after is not Sign.EQUAL else ()
        windows = [now for each in self.windows for now in ((each,) if each is not before else kept)]
        return replace(self, counts={sign: n for sign, n in counts.items() if n}, windows=windows)


class Proofs:
    """The latest verification of each job; `looked` is called at the end of one, before it is told. From any thread."""

    def __init__(
        self,
        verifications: Mapping[str, Verification],
        stop: Stop,
        clock: Callable[[], datetime],
        looked: Callable[[str], None],
    ) -> None:
        self._verifications = verifications
        self._stop = stop
        self._clock = clock
        self._looked = looked
        self._lock = threading.Lock()
        self._results: dict[str, Result] = {}

    @property
    def jobs(self) -> Sequence[str]:
        """Jobs whose two ends can be compared."""
        return sorted(self._verifications)

    def results(self) -> Sequence[Result]:
        """The latest of each job, also one that goes on."""
        with self._lock:
            return [self._results[name] for name in sorted(self._results)]

    def start(self, job: str, span: Window) -> None:
        """Begin to compare `span`. Raises Rejected for a job that has no verification, Transient while one goes on."""
        verification = found(self._verifications, job)
        with self._lock:
            known = self._results.get(job)
            if known is not None and known.ended_at is None:
                raise Transient(f"{job} is being verified already", "wait for its result")
            self._results[job] = Result(job, span, self._clock())
        threading.Thread(target=self._compare, args=(job, verification), name=f"verify-{job}", daemon=True).start()

    def mended(self, job: str, verdict: Verdict) -> None:
        """Healing came past a window: the latest result of the job says how it is now."""
        with self._lock:
            known = self._results.get(job)
            if known is not None and known.ended_at is not None:
                self._results[job] = known.with_mended(verdict)

    def _compare(self, job: str, verification: Verification) -> None:
        result = self._results[job]
        broken = ("the verification broke off", "the log of the service around this moment says why; please report it")
        try:
            for verdict in verify(verification(self._stop), result.span, self._stop):
                result = result.with_verdict(verdict)
                self._keep(result)
            broken = ("", "")
        except AppError as error:
            broken = (error.message, error.hint)
        finally:
            self._looked(job)
            self._keep(replace(result, ended_at=self._clock(), error=broken[0], hint=broken[1]))
        log.info("%s verified: %s", job, told(result.counts))

    def _keep(self, result: Result) -> None:
        with self._lock:
            self._results[result.job] = result


def found(verifications: Mapping[str, Verification], job: str) -> Verification:
    """The verification of a job. Raises Rejected when it has none."""
    if job not in verifications:
        able = ", ".join(sorted(verifications)) or "none"
        raise Rejected(f"job {job} has no verification", f"jobs whose two ends can be compared: {able}")
    return verifications[job]


@dataclass(frozen=True, slots=True)
class Healing:
    """What is to be verified and mended; `partition` None = all."""

    span: Window
    partition: str | None = None


def heal_job(
    job: Job, verification: Verification, what: Healing, seen: Callable[[Verdict], None] = lambda _: None
) -> Job:
    """`job`, under its own name and lease, with the mending of `what` as its work."""

    def work(context: Context) -> Report:
        counts: Counter[str] = Counter()

        def note(verdict: Verdict) -> None:
            counts[verdict.sign.value] += 1
            seen(verdict)

        report = heal(verification(context.stop), what.span, context, note, what.partition)
        log.info("%s %s: %s before it was mended", job.name, what.span, told(counts))
        return report

    return named(replace(job, work=work))


def told(counts: Mapping[str, int]) -> str:
    """Signs and how many windows have each, as text."""
    return ", ".join(f"{counts[sign.value]} {sign.value}" for sign in Sign if counts.get(sign.value)) or "no window"


def summary(verdicts: Iterable[Verdict]) -> Mapping[str, int]:
    """How many windows have each sign."""
    return dict(Counter(verdict.sign.value for verdict in verdicts))


def shown(verdict: Verdict) -> Mapping[str, Any]:
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
