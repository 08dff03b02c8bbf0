"""Checks of the configured systems and of the actual permissions of their credentials, for `python -m app check`.

Invariant: an attempt leaves nothing behind; a missing permission is named, together with those that exist.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from app.config.settings import Settings
from app.core.errors import AppError, Permanent
from app.db.database import Database
from app.db.state import State
from app.ops.alerts import post
from app.ops.health import Check

if TYPE_CHECKING:
    from app.object_store.port import ObjectStore
    from app.object_store.s3 import S3Store

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
log = logging.getLogger(__name__)

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
