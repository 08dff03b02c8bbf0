"""A straightforward mapping to the seven tables, one event at a time: the baseline for Headwater's mapping."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID


def plain_tables(event: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of an event."""
    get = event.get
    key = str(UUID(event["uuid"]))
    at = datetime.fromisoformat(event["event_time"]).replace(tzinfo=UTC).isoformat()
    person = get("user_properties") or {}
    record = person.get("EHR_ID")
    rows: list[tuple[Any, ...]] = [
        (
            *(key, get("event_type"), at, get("user_id"), get("platform"), get("device_id"), get("event_id")),
            *(get("language"), get("os_name"), get("os_version"), get("session_id"), get("start_version")),
            get("version_name"),
        ),
        (
            key,
            get("$insert_id"),
            json.dumps(get("amplitude_attribution_ids")),
            get("amplitude_id"),
            str(get("is_attribution_event")).lower() in ("true", "1"),
            get("library"),
            *(json.dumps(get(name)) for name in ("group_properties", "groups", "plan")),
        ),
        (key, json.dumps(get("event_properties"))),
        (key, json.dumps(person), get("language"), get("session_id"), get("start_version"), False, at),
        (key, *(get(name) for name in ("location_lat", "location_lng", "city", "country", "region", "ip_address"))),
    ]
    if get("device_id"):
        names = ("brand", "carrier", "family", "manufacturer", "model", "type")
        rows.append((get("device_id"), *(get(f"device_{name}") for name in names)))
    if record not in (None, "N/A", "no ehr", "no_ehr"):
        gender = person.get("Gender") or person.get("gender")
        said = str(person.get("registered_via_app")).lower()
        via = True if said in ("via app", "1", "true") else False if said in ("0", "false") else None
        cohorts = (person.get(f"cohort_{name}") for name in ("day", "week", "month"))
        rows.append((int(record), gender and gender.lower(), *cohorts, via, person.get("source")))
    return rows
