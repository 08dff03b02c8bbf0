"""Whether the process lives and outside systems can be reached: /health, /ready, and `python -m app check`.

Invariants: the probes contact nothing, so they answer within milliseconds whatever state the outside systems are in; a
check that hangs delays only its own result, and a result that is too old counts as a failure. An attempt of `check`
leaves nothing behind; a missing permission is named, together with those that exist.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from app.config.settings import Settings
from app.core.errors import AppError, Permanent
from app.core.windows import whole_second
from app.db.database import Database
from app.db.state import State
from app.ops.alerts import post

if TYPE_CHECKING:
    from app.object_store.port import ObjectStore
    from app.object_store.s3 import S3Store

PATHS = ("/health", "/ready")
SYSTEMS = {
    "checkpoint_store_connected": "the state database",
    "s3_accessible": "the object store",
    "dwh_connected": "the warehouse",
}
OK = 200
UNAVAILABLE = 503
EVERY_SECONDS = 10.0
LIMIT_SECONDS = 10.0
NOT_YET = "not checked yet"
log = logging.getLogger(__name__)

Check = Callable[[], str]
"""One attempt: a short note for a person, or "". Raises AppError."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check. On success `note` is the check's own message, and `error` and `hint` are empty."""

    ok: bool
    note: str = ""
    error: str = ""
    hint: str = ""


def check_once(check: Check) -> CheckResult:
    """The result of one attempt."""
    try:
        return CheckResult(ok=True, note=check())
    except AppError as error:
        return CheckResult(ok=False, error=error.message, hint=error.hint)


class Readiness:
    """One thread per check, each running every ten seconds."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._found: dict[str, tuple[CheckResult, float]] = {}
        self._closed = threading.Event()

    def start(self) -> None:
        """Start checking; until its first result a check counts as failed."""
        for name in self._checks:
            threading.Thread(target=self._watch, args=(name,), name=f"check-{name}", daemon=True).start()

    def close(self) -> None:
        """Stop checking; a hanging check is abandoned."""
        self._closed.set()

    def findings(self) -> Mapping[str, CheckResult]:
        """The latest result of each check. No I/O."""
        now, found = time.monotonic(), {}
        for name in self._checks:
            found[name], at = self._found.get(name, (CheckResult(ok=False, error=NOT_YET, hint="ask again soon"), now))
            if now - at > EVERY_SECONDS + LIMIT_SECONDS:
                error, hint = f"no answer for {now - at:.0f} s", "check whether that system hangs"
                found[name] = CheckResult(ok=False, error=error, hint=hint)
        return found

    def _watch(self, name: str) -> None:
        """Logs an error once, and again when it changes."""
        told = ""
        while not self._closed.is_set():
            finding = check_once(self._checks[name])
            self._found[name] = (finding, time.monotonic())
            if finding.error and finding.error != told:
                log.error("%s: %s (%s)", name, finding.error, finding.hint)
            elif told and finding.ok:
                log.info("%s: reached again", name)
            told = finding.error
            self._closed.wait(EVERY_SECONDS)


class ProbeAnswer(NamedTuple):
    """A status code and a JSON body."""

    status: int
    body: Mapping[str, Any]


class WorkLoop(Protocol):
    """The scheduler as the probes see it. No I/O."""

    @property
    def turning(self) -> bool:
        """False when only a restart helps."""

    @property
    def running(self) -> bool:
        """True from the start until a stop is requested."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What the two probes report on."""

    version: str
    scheduler: WorkLoop
    readiness: Readiness
    clock: Callable[[], datetime]

    def health(self) -> ProbeAnswer:
        """Liveness: 503 once the scheduler has stalled, which only a restart cures."""
        turning = self.scheduler.turning
        body = {
            "status": "healthy" if turning else "unhealthy",
            "version": self.version,
            "timestamp": whole_second(self.clock()),
        }
        return ProbeAnswer(OK if turning else UNAVAILABLE, body)

    def unreachable(self) -> Mapping[str, tuple[str, str]]:
        """Error and hint of each outside system that cannot be reached; systems without a result yet are left out."""
        findings = self.readiness.findings().items()
        return {SYSTEMS.get(name, name): (f.error, f.hint) for name, f in findings if not f.ok and f.error != NOT_YET}

    def ready(self) -> ProbeAnswer:
        """Readiness: 503 while an outside system cannot be reached, and from the stop signal on."""
        findings = self.readiness.findings()
        checks = {"worker_running": self.scheduler.running and self.scheduler.turning}
        checks |= {name: finding.ok for name, finding in findings.items()}
        ready = all(checks.values())
        body: dict[str, Any] = {"ready": ready, "checks": checks}
        if notes := {name: finding.note for name, finding in findings.items() if finding.note}:
            body["notes"] = notes
        return ProbeAnswer(OK if ready else UNAVAILABLE, body)


# The checks of single systems, and of the actual permissions of their credentials.

NAMED = 5
ABSENT = "headwater-check-of-rights"
LOOK_KEY = "headwater-readiness"
ONE_REPLICA = "the object store honours no conditional writes: run one replica only"
ENCODING_HINT = "move to a database made with CREATE DATABASE ... TEMPLATE template0 ENCODING 'UTF8'"
POSTGRES = """
SELECT current_setting('server_version') AS version, current_user AS name, current_schema() AS place,
    current_setting('server_encoding') AS encoding,
    has_schema_privilege(current_schema(), 'CREATE') AS creates
"""
Attempt = tuple[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class ConnectionCheck:
    """One system. `key` is its name for programs; `variable` is the one that sets it, or would replace the embedded
    part.
    """

    key: str
    title: str
    variable: str
    check: Check


def try_all(attempts: Sequence[Attempt]) -> str:
    """What is permitted, when all attempts succeed. Raises Permanent that names the failed attempts and
    their causes.
    """
    may, refused = [], list[tuple[str, AppError]]()
    for name, attempt in attempts:
        try:
            attempt()
            may.append(name)
        except AppError as error:
            refused.append((name, error))
    if refused:
        names = ", ".join(name for name, _ in refused)
        _, first = refused[0]
        has = f"may {', '.join(may)}; " if may else ""
        raise Permanent(f"{has}may not {names}: {first.message}", first.hint)
    return f"may {', '.join(may)}"


def of_objects(store: "ObjectStore", prefix: str) -> str:
    """Checks listing below the prefix, reading, and conditional writes, which the store's own probe covers."""
    said = try_all(
        [
            ("list", lambda: next(iter(store.list(f"{prefix}/" if prefix else "")), None)),
            ("read", lambda: store.head(f"{prefix}/{ABSENT}" if prefix else ABSENT)),
            ("write", store.probe),
        ]
    )
    holds = "conditions hold" if store.conditional else "conditions do NOT hold: run one replica only"
    return f"{said}; {holds}"


def of_undeleted(state: State, pipelines: Sequence[str], store: "ObjectStore") -> str:
    """Objects that could not be deleted and still exist, and why; "" for none."""
    known = {key: error for name in pipelines for key, error in state.checkpoints.undeleted(name).items()}
    there = {key: error for key, error in known.items() if store.head(key) is not None}
    if not there:
        return ""
    names = ", ".join(list(there)[:NAMED]) + (f" and {len(there) - NAMED} more" if len(there) > NAMED else "")
    return (
        f"deltas of an older version cannot be deleted: {names} ({next(iter(there.values()))}): allow"
        " s3:DeleteObject, or end their Object Lock; until then other readers see their rows twice"
    )


def of_database(database: Database) -> str:
    """Who is signed in where, and whether tables can be created; opens a write transaction and ends it.

    Raises Permanent for an encoding that covers only some characters: the service works there, but rejects the others.
    """
    with database.transaction() as session:
        if database.dialect == "sqlite":
            version = session.rows("SELECT sqlite_version() AS version")[0]["version"]
            return f"{database.place}, version {version}: may read and write"
        found = session.rows(POSTGRES)[0]
    if found["encoding"] != "UTF8":
        raise Permanent(
            f"{database.place}: its encoding {found['encoding']} holds only some characters; others are refused",
            ENCODING_HINT,
        )
    creates = "may read, write and make tables" if found["creates"] else "may read and write, not make tables"
    return f"PostgreSQL {found['version']} as {found['name']}, schema {found['place']}: {creates}"


def webhook(settings: Settings) -> Iterator[ConnectionCheck]:
    """Sends a test message to the alert webhook."""
    url = settings.alert.webhook_url.get_secret_value()
    if not url:
        return
    text = f"{settings.service.name}: `python -m app check` tries this webhook; nothing is wrong"

    def check() -> str:
        post(url, {"event": "check", "service": settings.service.name, "text": text})
        return "accepted a message of the event check"

    yield ConnectionCheck("webhook", "webhook", "ALERT_WEBHOOK_URL", check)


def destinations(settings: Settings) -> Mapping[str, str]:
    """Where rows end up, in readable form, for each pipeline without a configuration file of its own."""
    export, drive, s3, data_dir = settings.export, settings.drive, settings.s3, settings.service.data_dir.absolute()
    root = f"s3://{s3.bucket}" if s3.bucket else str(data_dir / "objects")
    file = f"{drive.csv_name_prefix}_YYYYMMDD_HH.csv"
    is_on_drive = drive.credentials_file or drive.credentials_json
    folder = drive.folder_id or drive.shared_drive_id or "root"
    tree = f"{s3.prefix}/device_id=.../date={export.date_format}/export_HHMMSS.{export.format}".lstrip("/")
    return {
        "influx_to_s3": f"{root}/{tree}",
        "dynamo_to_drive": f"Google Drive folder {folder}: {file}" if is_on_drive else str(data_dir / "drive" / file),
        "amplitude": f"{root}/amplitude/ and /dwh",
        "appmetrica": f"{root}/appmetrica/ and /dwh",
    }


def _first(once: Callable[[], object], check: Check) -> Check:
    """`check`, preceded by `once` until that has succeeded."""
    done = False

    def both() -> str:
        nonlocal done
        if not done:
            once()
            done = True
        return check()

    return both


def state_check(state: State) -> Check:
    """A full check of the state at first, then round trips; the note is for a person."""
    return _first(state.check, state.note)


def store_check(store: "ObjectStore") -> Check:
    """One write at first, then reads only: versions must not pile up in the bucket from monitoring."""

    def look() -> str:
        store.head(LOOK_KEY)
        return "" if store.conditional else ONE_REPLICA

    return _first(store.probe, look)


def store_checks(
    settings: Settings, state: State, warehouse: Database, store: "ObjectStore", listed: Sequence[str]
) -> Iterator[ConnectionCheck]:
    """The three stores that always exist, embedded or external, under their names in /ready."""
    look = state_check(state)
    variable = "CHECKPOINT_DB_HOST" if settings.checkpoint.host else "CHECKPOINT_DATABASE_URL"

    def kept() -> str:
        return "; ".join(filter(None, (of_database(state.database), look())))

    def objects() -> str:
        from app.object_store.s3_multipart import note_of_versions

        prefix, bucket = settings.s3.prefix, settings.s3.bucket
        said = of_objects(store, prefix), of_undeleted(state, listed, store)
        old_versions = note_of_versions(cast("S3Store", store), prefix) if bucket else ""  # not in a directory
        return "; ".join(filter(None, (*said, old_versions)))

    yield ConnectionCheck("checkpoint_store_connected", "state: checkpoints, runs, leases", variable, kept)
    yield ConnectionCheck("s3_accessible", "objects", "S3_BUCKET", objects)
    yield ConnectionCheck("dwh_connected", "warehouse", "DWH_DATABASE_URL", lambda: of_database(warehouse))
