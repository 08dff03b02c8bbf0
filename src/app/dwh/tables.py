"""The seven tables, declared once: routes, row types, DDL, upserts and OpenAPI are all derived from here.

Invariant: the first column of a table is its natural key, required and unique. Every table also has `id` and
`created_at`, which the database sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["uuid", "text", "integer", "bigint", "float", "bool", "json", "instant"]

KEY_CHARACTERS = 512  # an index entry of PostgreSQL holds 2704 bytes
INTEGER_BITS = {"integer": 31, "bigint": 63}
WANTED: dict[Kind, str] = {
    "uuid": "a UUID such as 0b1c6a6e-7c1d-4f2a-9d57-2f6f0a9a1b11",
    "text": "text in valid Unicode, without NUL",
    "integer": "an integer of 32 bits",
    "bigint": "an integer of 64 bits",
    "float": "a finite number",
    "bool": "true or false",
    "json": "any JSON of at most 100 levels, numbers in the range of a double, no repeated key, NUL or lone surrogate",
    "instant": "an ISO 8601 timestamp such as 2026-02-07T12:34:56.789Z; without an offset it is taken as UTC",
}


@dataclass(frozen=True, slots=True)
class TableColumn:
    """One column. `default` replaces an absent or null value; `takes_integers`: a text column that also accepts
    integers.
    """

    name: str
    kind: Kind
    required: bool = False
    default: bool | None = None
    takes_integers: bool = False

    @property
    def wanted(self) -> str:
        """A description of valid values, for messages."""
        if self.required and self.kind == "text":
            return f"text of 1 to {KEY_CHARACTERS} characters, without NUL"
        return WANTED[self.kind]


@dataclass(frozen=True)
class Table:
    """One table. `number` orders locks; `updates`: a new row's non-null values update the row with the same key."""

    number: int
    name: str
    path: str
    columns: Sequence[TableColumn]
    updates: bool = False

    @cached_property
    def key(self) -> TableColumn:
        """The natural key."""
        return self.columns[0]

    @cached_property
    def names(self) -> Sequence[str]:
        """Names of the columns that a caller sets, in order."""
        return [column.name for column in self.columns]

    @cached_property
    def stored(self) -> Sequence[TableColumn]:
        """All columns of a returned row."""
        return [TableColumn("id", "bigint"), *self.columns, TableColumn("created_at", "instant")]


def _texts(names: str) -> tuple[TableColumn, ...]:
    return tuple(TableColumn(name, "text") for name in names.split())


UUID = TableColumn("uuid", "uuid", required=True)
EVENTS = Table(
    1,
    "events_part",
    "events-part",
    (
        UUID,
        TableColumn("event_type", "text"),
        TableColumn("event_time", "instant"),
        TableColumn("user_id", "text", takes_integers=True),
        TableColumn("platform", "text"),
        TableColumn("device_id", "text", takes_integers=True),
        TableColumn("event_id", "bigint"),
        *_texts("language os_name os_version"),
        TableColumn("session_id", "bigint"),
        *_texts("start_version version_name"),
    ),
)
DEVICES = Table(
    2,
    "mobile_devices",
    "mobile-devices",
    (
        TableColumn("device_id", "text", required=True, takes_integers=True),
        *_texts("device_brand device_carrier device_family device_manufacturer device_model device_type"),
    ),
    updates=True,
)
PERMANENT = Table(
    3,
    "permanent_user_properties",
    "permanent-user-properties",
    (
        TableColumn("ehr_id", "bigint", required=True),
        TableColumn("gender", "text"),
        TableColumn("cohort_day", "integer"),
        TableColumn("cohort_week", "integer"),
        TableColumn("cohort_month", "integer"),
        TableColumn("registered_via_app", "bool"),
        TableColumn("source", "text"),
    ),
)
TECHNICAL = Table(
    4,
    "technical_data",
    "technical-data",
    (
        UUID,
        TableColumn("insert_id", "text"),
        TableColumn("amplitude_attribution_ids", "json"),
        TableColumn("amplitude_id", "bigint"),
        TableColumn("is_attribution_event", "bool"),
        TableColumn("library", "text"),
        TableColumn("group_properties_json", "json"),
        TableColumn("groups_json", "json"),
        TableColumn("plan_json", "json"),
    ),
)
EVENT_PROPERTIES = Table(
    5, "tmp_event_properties", "event-properties", (UUID, TableColumn("event_properties_json", "json"))
)
USER_PROPERTIES = Table(
    6,
    "tmp_user_properties",
    "user-properties",
    (
        UUID,
        TableColumn("user_properties_json", "json"),
        TableColumn("language", "text"),
        TableColumn("session_id", "bigint"),
        TableColumn("start_version", "text"),
        TableColumn("migrated", "bool", default=False),
        TableColumn("event_time", "instant"),
    ),
)
LOCATIONS = Table(
    7,
    "user_locations",
    "user-locations",
    (
        UUID,
        TableColumn("location_lat", "float"),
        TableColumn("location_lng", "float"),
        *_texts("city country region ip_address"),
    ),
)
TABLES = (EVENTS, DEVICES, PERMANENT, TECHNICAL, EVENT_PROPERTIES, USER_PROPERTIES, LOCATIONS)
BY_NAME = {table.name: table for table in TABLES}


# Column types in PostgreSQL. A test checks that the first migrations in `sql/dwh/migrations` match.
POSTGRES_TYPES: dict[Kind, str] = {
    "uuid": "uuid",
    "text": "text",
    "integer": "integer",
    "bigint": "bigint",
    "float": "double precision",
    "bool": "boolean",
    "json": "jsonb",
    "instant": "timestamptz",
}
# In SQLite the text has the same width as all timestamps that we write, so that text order is time order.
SQLITE_NOW = "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')"
