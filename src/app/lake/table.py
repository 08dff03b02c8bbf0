"""The Iceberg table: catalog in a SQL database, files in the object store, commits, repair and expiry.

Only this module imports pyiceberg. Invariants: the table in the store is the truth and the catalog only points to it,
so a catalog that is lost or outdated is set to the newest metadata file. All changes of a run are one commit, which is
refused when another process committed since the table was loaded. Files are deleted only when no retained snapshot
references them, and never when they are young.
"""

import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, TableAlreadyExistsError, ValidationError
from pyiceberg.io import FileIO, InputFile, OutputFile
from pyiceberg.io.pyarrow import (
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadataUtil
from pyiceberg.transforms import DayTransform
from pyiceberg.typedef import Record
from pyiceberg.types import IcebergType, NestedField
from sqlalchemy import delete, select, update
from sqlalchemy.exc import SQLAlchemyError

from app.config.settings import Settings
from app.core.closed_days import TableState
from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.windows import EPOCH
from app.lake.columns import FIRST, TIMESTAMP, LakeColumns
from app.lake.day import NewFile
from app.lake.plan import LakeFile
from app.object_store.port import ObjectInfo, ObjectStore, PutRequest

NAMESPACE, TABLE = "headwater", "telemetry"
METADATA = re.compile(r"(\d+)-[0-9a-f-]+\.metadata\.json")
# What pyiceberg's decoders raise for a file that is gone or damaged: the bytes may ask for anything.
DAMAGED = (
    *(FileNotFoundError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, SystemError, MemoryError),
    *(zlib.error, Rejected),
)
STORE, BASE = "headwater.store", "headwater.base"
ORPHAN_AGE = timedelta(days=1)
COMMIT_AGE = timedelta(minutes=10)
MAPPING, TREE = "schema.name-mapping.default", "headwater.tree"
PROPERTIES = {
    "format-version": "2",
    "commit.retry.num-retries": "0",  # a refused commit is planned again, from the objects
    "write.metadata.previous-versions-max": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.metrics.default": "truncate(64)",
}


class StoreFileIO(FileIO):
    """pyiceberg's files as objects of the store, so that its keys, encryption, network and request counting apply."""

    def new_input(self, location: str) -> "StoreFile":
        """See FileIO."""
        return StoreFile(location, self.properties)

    new_output = new_input

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """See FileIO."""
        file = self.new_input(location if isinstance(location, str) else location.location)
        file.store.delete(file.key)


class StoreFile(InputFile, OutputFile):
    """One object, read as a whole, since the table's own files are small, and stored when its stream is closed. Names
    contain a random number, so they never collide. Raises FileNotFoundError for what was written elsewhere.
    """

    def __init__(self, location: str, properties: Mapping[str, Any]) -> None:
        super().__init__(location)
        if not location.startswith(properties[BASE]):
            raise FileNotFoundError(f"{location} was written before the store was moved")
        self.store: ObjectStore = properties[STORE]
        self.key = location.removeprefix(properties[BASE])

    def __len__(self) -> int:
        info = self.store.head(self.key)
        if info is None:
            raise FileNotFoundError(self.location)
        return info.size_bytes

    def exists(self) -> bool:
        """See InputFile."""
        return self.store.head(self.key) is not None

    def open(self, seekable: bool = True) -> Any:  # noqa: ARG002, FBT001, FBT002 - as pyiceberg has it
        """See InputFile."""
        with self.store.open(self.key) as body:
            if body is None:
                raise FileNotFoundError(self.location)
            return io.BytesIO(body.read())

    def to_input_file(self) -> "StoreFile":
        """See OutputFile."""
        return self

    def create(self, overwrite: bool = False) -> Any:  # noqa: ARG002, FBT001, FBT002 - as pyiceberg has it
        """See OutputFile."""
        return _Stored(self.store, self.key)


class _Stored(io.BytesIO):
    def __init__(self, store: ObjectStore, key: str) -> None:
        super().__init__()
        self._store, self._key = store, key

    def close(self) -> None:
        if not self.closed:
            self.seek(0)
            self._store.put(self._key, self, PutRequest("application/octet-stream"))
        super().close()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            super().close()  # an incomplete file is not stored
        self.close()


@contextmanager
def open_table(settings: Settings, store: ObjectStore) -> Iterator["LakeTable"]:
    """The table, for the duration of the block. Its catalog is in the checkpoint database, or in a separate file if
    that is SQLite. Raises Transient while the database is unreachable.
    """
    data_dir, s3 = settings.service.data_dir.resolve(), settings.s3
    url = settings.checkpoint.url.get_secret_value()
    base = f"s3://{s3.bucket}/" if s3.bucket else f"file://{data_dir / 'objects'}/"
    properties = {
        "uri": "postgresql+psycopg://" + url.partition("://")[2] if url else f"sqlite:///{data_dir / 'lake.db'}",
        "py-io-impl": f"{__name__}.{StoreFileIO.__name__}",
        STORE: store,
        BASE: base,
    }
    logging.getLogger("pyiceberg").setLevel(logging.WARNING)  # it logs every file it opens
    with _translated():
        catalog = SqlCatalog("headwater", **cast("dict[str, str]", properties))
        try:
            catalog.create_namespace_if_not_exists(NAMESPACE)
            yield LakeTable(catalog, store, base, f"{settings.lake.prefix}/{TABLE}", tree=s3.prefix)
        finally:
            catalog.close()


@contextmanager
def _translated() -> Iterator[None]:
    """Convert the exceptions of both packages to ours."""
    try:
        yield
    except (CommitFailedException, NoSuchTableError, TableAlreadyExistsError) as error:
        raise Conflict(
            f"the table was changed by another process: {error}", "no action needed; it is retried"
        ) from error
    except SQLAlchemyError as error:
        text = str(getattr(error, "orig", None) or type(error).__name__)[:200]
        raise Transient(f"the catalog cannot be reached: {text}", "look at the checkpoint database") from error


class LakeTable:
    """The table in its catalog. `base`: what precedes a key of the store in a location that other programs can read;
    `folder`: where its files are in the store; `tree`: the prefix of the objects that it is made from. `notes` lists
    repairs.
    """

    def __init__(self, catalog: SqlCatalog, store: ObjectStore, base: str, folder: str, *, tree: str) -> None:
        self._catalog, self._store, self._base, self.folder, self._tree = catalog, store, base, folder, tree
        self._name = (NAMESPACE, TABLE)
        self._row = (
            IcebergTables.catalog_name == catalog.name,
            IcebergTables.table_namespace == NAMESPACE,
            IcebergTables.table_name == TABLE,
        )
        self._table: Table | None = None
        self._entries: list[DataFile] = []
        self.stored: dict[str, ObjectInfo] = {}
        self.notes: list[str] = []

    def load(self, now: datetime, *, repair: bool) -> None:
        """Load the table from its newest readable metadata file. Nothing is created here.

        `repair`: set the catalog to that file and remove unreadable ones; if none is readable, the next commit
        re-creates the table. A young file newer than the catalog may belong to a commit in progress and is left alone.
        The catalog is queried before files are listed, so that what it names is either in the listing or gone.
        """
        held = self.pointer()
        self.stored = {info.key: info for info in self._store.list(f"{self.folder}/")}
        pointed = held.removeprefix(self._base) if held.startswith(self._base) else ""
        young = {key for key, info in self.stored.items() if info.modified_at > now - COMMIT_AGE}
        newest = _number(pointed)
        known = sorted(
            (
                key
                for key in {pointed, *self.stored}
                if _number(key) >= 0 and not (0 <= newest < _number(key) and key in young)
            ),
            key=lambda key: (_number(key), key == pointed, key),
            reverse=True,
        )
        for place, key in enumerate(known):
            try:
                is_read = self._read(f"{self._base}{key}")
            except Permanent:
                if repair:
                    raise
                return  # readers do without the table
            if is_read:
                if repair:
                    self._settle(held, key, known[:place])
                return
        if repair:
            self._settle(held, "", known)

    def pointer(self) -> str:
        """The metadata file that the catalog names, whether it exists or not; "" for none."""
        with self._catalog.engine.connect() as connection:
            return str(connection.execute(select(IcebergTables.metadata_location).where(*self._row)).scalar() or "")

    def _read(self, location: str) -> bool:
        """Load the table and its entries from this metadata file; False when one of its files is gone or damaged.

        Raises Permanent for one that is whole but not ours, or cannot be understood: it must not be removed.
        """
        files, self._entries = StoreFileIO(self._catalog.properties), []
        try:
            text = files.new_input(location).open().read()
            json.loads(text)
            metadata = TableMetadataUtil.parse_raw(text)
        except (FileNotFoundError, ValueError):
            return False
        except ValidationError as error:
            raise Permanent(
                f"{location} cannot be understood: {error}"[:300],
                "if it is damaged, delete it: the state before it is then taken; otherwise install a newer Headwater",
            ) from error
        self._check_ours(metadata, location)
        table = Table(self._name, metadata, location, files, self._catalog)
        try:
            files.new_input(metadata.location)  # where it writes to
            self._entries = [task.file for task in table.scan().plan_files()]
        except DAMAGED:
            return False
        self._table = table
        return True

    def _check_ours(self, metadata: Any, location: str) -> None:
        """Raises Permanent for the table of another program or tree, which must be neither overwritten nor removed."""
        spec = metadata.spec()
        tree = metadata.properties.get(TREE, self._tree)  # earlier versions did not record it
        if [(each.name, str(each.transform)) for each in spec.fields] != [("day", "day")]:
            raise Permanent(f"{location} is another program's table", "set S3_LAKE_PREFIX to a prefix of its own")
        if tree != self._tree:
            raise Permanent(
                f"{location} is the table of the objects below {tree}, not of those below {self._tree}",
                "set S3_LAKE_PREFIX to a prefix of its own, or delete what is below this one",
            )

    def _settle(self, held: str, key: str, unreadable: Sequence[str]) -> None:
        """Set the catalog to the metadata file `key`, "" for none, and remove the unreadable ones."""
        location = f"{self._base}{key}" if key else ""
        if unreadable:
            self.notes.append(
                f"{len(unreadable)} snapshots of the table cannot be read, since their files are gone or damaged"
            )
            if not key:
                self.notes.append("the table is re-created from the objects")
        if held != location:
            if key and not unreadable:
                self.notes.append(f"the catalog was behind the table: it is set to {key}")
            self._point(held, location)
        for each in unreadable:
            self.stored.pop(each, None)
            self._store.delete(each)

    def _point(self, held: str, location: str) -> None:
        """Set the catalog to `location` ("" = nothing) if it still names `held`. Raises Conflict."""
        if not held:
            self._catalog.register_table(self._name, location)
            return
        change = update(IcebergTables).values(metadata_location=location, previous_metadata_location=held)
        if not location:
            change = delete(IcebergTables)  # type: ignore[assignment]
        with self._catalog.engine.begin() as connection:
            if not connection.execute(change.where(*self._row, IcebergTables.metadata_location == held)).rowcount:
                raise Conflict("another process changed the table", "no action needed; it is retried")

    def files(self) -> list[LakeFile]:
        """The files of the newest snapshot."""
        return [self._file(entry) for entry in self._entries]

    def _file(self, entry: DataFile) -> LakeFile:
        key = entry.file_path.removeprefix(self._base)
        day = EPOCH.date() + timedelta(days=entry.partition[0])
        held = self.stored.get(key)
        return LakeFile(key, day, entry, missing=held is None or held.size_bytes != entry.file_size_in_bytes)

    def valid_at(self, instant: datetime | None) -> tuple[TableState, list[LakeFile]] | None:
        """The snapshot that was newest at `instant` (None: now), and its files; None if there was none.

        Raises Rejected when its files are not known any more.
        """
        table, newest = self._table, self._table.current_snapshot() if self._table else None
        if table is None or newest is None:
            return None
        if instant is None:
            return self._state(newest), self.files()
        valid = [each for each in table.snapshots() if _taken_at(each) <= instant]
        if not valid:
            return None
        # Not by timestamp: one from a clock that was ahead does not count once another snapshot followed.
        found = max(valid, key=lambda each: each.sequence_number or 0)
        try:
            files = [self._file(task.file) for task in table.scan(snapshot_id=found.snapshot_id).plan_files()]
        except DAMAGED as error:
            told = f"the state of {_taken_at(found).isoformat()} cannot be read: {error or type(error).__name__}"
            raise Rejected(told[:300], "send a later timestamp") from error
        return self._state(found), files

    def _state(self, snapshot: Any) -> TableState:
        return TableState(snapshot.snapshot_id, _taken_at(snapshot), f"{self._base}{self.folder}")

    def oldest_at(self) -> datetime | None:
        """When the oldest retained snapshot was taken."""
        return min(map(_taken_at, self._table.snapshots()), default=None) if self._table else None

    def columns(self) -> LakeColumns:
        """The columns of the table, or of the one that the first commit creates."""
        if self._table is None:
            return LakeColumns(FIRST, {name: number for number, name in enumerate(FIRST, 1)}, len(FIRST))
        fields = self._table.schema().fields
        kinds = {each.name: str(each.field_type) for each in fields}
        return LakeColumns(kinds, {each.name: each.field_id for each in fields}, self._table.metadata.last_column_id)

    def commit(self, columns: LakeColumns, new: Sequence[NewFile], replaced: Sequence[LakeFile]) -> None:
        """One snapshot that replaces `replaced` with `new` and adds the columns they need. Raises Conflict."""
        table = self._table or self._created()
        with table.transaction() as transaction:
            self._widen(transaction, columns)
            with transaction.update_snapshot().overwrite() as overwrite:
                for old in replaced:
                    overwrite.delete_data_file(old.entry)
                for file in new:
                    overwrite.append_data_file(self._entry(transaction.table_metadata, file))
        self._table = table

    def _created(self) -> Table:
        fields = [
            NestedField(number, name, IcebergType.model_validate(kind), required=False)
            for number, (name, kind) in enumerate(FIRST.items(), 1)
        ]
        schema = Schema(*fields)
        source = schema.find_field(TIMESTAMP).field_id
        spec = PartitionSpec(PartitionField(source, 1000, DayTransform(), "day"))
        properties = {**PROPERTIES, TREE: self._tree, MAPPING: schema.name_mapping.model_dump_json()}
        location = f"{self._base}{self.folder}"
        return self._catalog.create_table(self._name, schema, location, spec, properties=properties)

    @staticmethod
    def _widen(transaction: Any, columns: LakeColumns) -> None:
        held = {each.name: str(each.field_type) for each in transaction.table_metadata.schema().fields}
        if held == columns.kinds:
            return
        with transaction.update_schema() as update:
            for name in sorted(columns.ids, key=lambda name: columns.ids[name]):
                kind = columns.kinds[name]
                if name not in held:
                    # As a path: a name such as `cpu.load` would otherwise be that of a column inside a struct.
                    update.add_column((name,), IcebergType.model_validate(kind))
                elif held[name] != kind:
                    update.update_column((name,), field_type=IcebergType.model_validate(kind))
        given = {each.name: each.field_id for each in transaction.table_metadata.schema().fields}
        if given != columns.ids:
            raise Conflict("another process added columns", "no action needed; it is retried")

    def _entry(self, metadata: Any, file: NewFile) -> DataFile:
        """The table's entry for a file. The day comes from the file, not from its rows."""
        schema = metadata.schema()
        statistics = data_file_statistics_from_parquet_metadata(
            parquet_metadata=file.footer,
            stats_columns=compute_statistics_plan(schema, metadata.properties),
            parquet_column_mapping=parquet_path_to_id_mapping(schema),
        )
        return DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=f"{self._base}{file.key}",
            file_format=FileFormat.PARQUET,
            partition=Record((file.day - EPOCH.date()).days),
            file_size_in_bytes=file.size_bytes,
            sort_order_id=None,
            spec_id=metadata.default_spec_id,
            equality_ids=None,
            key_metadata=None,
            **statistics.to_serialized_dict(),
        )

    def expire(self, now: datetime, keep: timedelta) -> int:
        """Expire snapshots older than `keep`, then delete old unreferenced files. Returns the number of files."""
        table = self._table
        if table is None:
            return 0
        oldest = now - keep
        if any(_taken_at(each) < oldest for each in table.snapshots()[:-1]):
            table.maintenance.expire_snapshots().older_than(oldest.replace(tzinfo=None)).commit()
        old = {key for key, info in self.stored.items() if info.modified_at < now - ORPHAN_AGE}
        unnamed = old - self._named(table) if old else set()
        for key in unnamed:
            self._store.delete(key)
        return len(unnamed)

    def _named(self, table: Table) -> set[str]:
        """Every key that a snapshot of the table or its metadata log references, as far as snapshots can be read."""
        locations = {table.metadata_location, *(each.metadata_file for each in table.metadata.metadata_log)}
        seen: set[str] = set()
        for snapshot in table.snapshots():
            locations.add(snapshot.manifest_list)
            with suppress(*DAMAGED):
                for manifest in snapshot.manifests(table.io):
                    if manifest.manifest_path not in seen:
                        seen.add(manifest.manifest_path)
                        entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
                        locations.update(entry.data_file.file_path for entry in entries)
        return {location.removeprefix(self._base) for location in locations | seen}


def _number(location: str) -> int:
    """The version number of a metadata file, which grows by one per commit; -1 for any other file."""
    named = METADATA.fullmatch(location.rpartition("/")[2])
    return int(named[1]) if named else -1


def _taken_at(snapshot: Any) -> datetime:
    return datetime.fromtimestamp(snapshot.timestamp_ms / 1000, UTC)
