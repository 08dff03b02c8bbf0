"""Checkpoints, leases and runs in memory, keeping the contracts of the real ones: for tests of the core."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from app.core.errors import LeaseLost
from app.core.pipeline import Commit, Record
from app.core.runs import Lease, Outcome, Run
from app.db.leases import AHEAD


def wall_clock() -> datetime:
    return datetime.now(UTC)


class MemoryLeases:
    def __init__(self, clock: Callable[[], datetime] = wall_clock) -> None:
        self._clock = clock
        self._held: dict[str, Lease] = {}
        self._free: set[str] = set()
        self.lock = threading.RLock()

    def acquire(self, name: str, owner: str, ttl_seconds: float) -> Lease | None:
        with self.lock:
            held = self._held.get(name)
            if held is not None and held.owner != owner and self.remaining_seconds(name) > 0:
                return None
            generation = held.generation + 1 if held else 1
            self._held[name] = Lease(name, owner, generation, self._expiry(ttl_seconds))
            self._free.discard(name)
            return self._held[name]

    def remaining_seconds(self, name: str) -> float:
        with self.lock:
            held = self._held.get(name)
            if held is None or name in self._free:
                return 0.0
            return max((held.expires_at - self._clock()).total_seconds(), 0.0)

    def watch_seconds(self, name: str, ttl_seconds: float) -> float:
        return 0.0  # its clock is the tests' own: nobody sets it back

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        with self.lock:
            self.check(lease)
            self._held[lease.name] = replace(lease, expires_at=self._expiry(ttl_seconds))
            return self._held[lease.name]

    def release(self, lease: Lease) -> None:
        with self.lock:
            held = self._held.get(lease.name)
            if held is not None and (held.owner, held.generation) == (lease.owner, lease.generation):
                self._free.add(lease.name)

    def check(self, lease: Lease) -> None:
        """Raises LeaseLost unless the lease is held and lives."""
        if not self._is_held(lease):
            raise LeaseLost(f"the lease {lease.name} (generation {lease.generation}) expired or was taken over")

    def _is_held(self, lease: Lease) -> bool:
        held = self._held.get(lease.name)
        same = held is not None and (held.owner, held.generation) == (lease.owner, lease.generation)
        return held is not None and same and self.remaining_seconds(lease.name) > 0

    def _expiry(self, ttl_seconds: float) -> datetime:
        return self._clock() + timedelta(seconds=ttl_seconds)


class MemoryCheckpoints:
    def __init__(self, leases: MemoryLeases) -> None:
        self._leases = leases
        self._cursors: dict[tuple[str, str], datetime] = {}
        self._starts: dict[tuple[str, str], datetime] = {}
        self._records: dict[tuple[str, str], dict[tuple[datetime, int], Record]] = {}
        self.errors: dict[tuple[str, str], str] = {}
        self.undeleted: dict[str, str] = {}

    def cursors(self, pipeline: str) -> Mapping[str, datetime]:
        with self._leases.lock:
            return {partition: at for (name, partition), at in self._cursors.items() if name == pipeline}

    def starts(self, pipeline: str) -> Mapping[str, datetime]:
        with self._leases.lock:
            return {partition: at for (name, partition), at in self._starts.items() if name == pipeline}

    def records(self, pipeline: str, partition: str, since: datetime, until: datetime) -> Sequence[Record]:
        with self._leases.lock:
            held = self._records.get((pipeline, partition), {})
            return [record for (start, _), record in sorted(held.items()) if since <= start < until]

    def live_records(
        self, pipeline: str, since: datetime, partitions: Sequence[str] | None = None
    ) -> Mapping[str, Sequence[Record]]:
        names = [each for name, each in list(self._records) if name == pipeline and each in (partitions or (each,))]
        return {name: self.records(pipeline, name, since, datetime.max.replace(tzinfo=UTC)) for name in names}

    def commit_all(self, pipeline: str, commits: Sequence[tuple[str, Commit]], lease: Lease) -> None:
        for partition, commit in commits:
            self.commit(pipeline, partition, commit, lease)

    def commit(self, pipeline: str, partition: str, commit: Commit, lease: Lease) -> None:
        of = (pipeline, partition)
        with self._leases.lock:
            self._leases.check(lease)
            held = self._records.setdefault(of, {})
            held.update({(each.window.start, each.part): replace(each, trouble="") for each in commit.records})
            if commit.cursor_at is not None:
                self._starts.setdefault(of, commit.cursor_at)
                self._cursors[of] = max(commit.cursor_at, self._cursors.get(of, commit.cursor_at))
            self.errors.pop(of, None)

    def fail(self, pipeline: str, partition: str, message: str, lease: Lease) -> None:
        with self._leases.lock:
            self._leases.check(lease)
            self.errors[pipeline, partition] = message

    def mark(self, pipeline: str, partition: str, troubles: Sequence[tuple[Record, str]]) -> None:
        with self._leases.lock:
            held = self._records.get((pipeline, partition), {})
            for record, trouble in troubles:
                slot = (record.window.start, record.part)
                if slot in held and held[slot].version == record.version:
                    held[slot] = replace(held[slot], trouble=trouble)

    def note_undeleted(self, pipeline: str, key: str, error: str) -> None:
        with self._leases.lock:
            self.undeleted.pop(key, None)
            if error:
                self.undeleted[key] = error


class MemoryRuns:
    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    def save(self, run: Run) -> None:
        with self._lock:
            self._runs[run.run_id] = run

    def recent(self, job: str | None, limit: int) -> Sequence[Run]:
        with self._lock:
            runs = [run for run in self._runs.values() if job in (None, run.job)]
        until_at = wall_clock() + AHEAD
        key = lambda run: (run.started_at <= until_at, run.started_at, run.run_id)  # noqa: E731 - named once
        return sorted(runs, key=key, reverse=True)[:limit]

    def since_done_seconds(self, job: str) -> float | None:
        now = wall_clock()
        done = [run for run in self.recent(job, len(self._runs)) if run.outcome in (Outcome.OK, Outcome.PARTIAL)]
        starts = [run.started_at for run in done if run.started_at <= now + AHEAD]
        return max((now - max(starts)).total_seconds(), 0.0) if starts else None
