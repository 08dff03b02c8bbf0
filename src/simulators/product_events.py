"""Product events as two services would have collected them: made from a seed, the same each time they are asked for.

Invariant: an event depends on its source, its hour and its number only. Shapes are those of the contracts: nulls,
members that nobody documented, ids beyond 2^53, a session of -1, event times long before the upload.
"""

import json
import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

BRANDS = (("Apple", "iPhone15,3", "Apple iPhone"), ("Samsung", "SM-S918B", "Samsung Galaxy S"), ("Google", None, None))
PLACES = (
    ("Berlin", "Germany", "Berlin", "DE"),
    ("Lisboa", "Portugal", "Lisboa", "PT"),
    ("Tbilisi", "Georgia", None, "GE"),
)
TYPES = ("open", "view", "search", "purchase", "$identify")
PROJECT = 187_520


def amplitude_events(source: str, hour_at: datetime, count: int) -> Sequence[dict[str, Any]]:
    """The events that reached Amplitude in an hour."""
    return [amplitude_event(source, hour_at, number) for number in range(count)]


def amplitude_event(source: str, hour_at: datetime, number: int) -> dict[str, Any]:
    """One event, as a line of an export holds it."""
    name = f"{source}:{hour_at:%Y%m%dT%H}:{number}"
    draw = random.Random(name)  # noqa: S311 - plausible, not secret
    person = draw.randrange(200)
    brand, model, family = BRANDS[person % len(BRANDS)]
    city, country, region, _ = PLACES[person % len(PLACES)]
    arrived_at = hour_at + timedelta(seconds=draw.random() * 3599)
    # A phone that was offline hands over what it kept for days.
    happened_at = arrived_at - timedelta(days=draw.choice((0,) * 19 + (6,)), seconds=draw.random() * 30)
    return {
        "uuid": str(uuid5(NAMESPACE_URL, name)),
        "$insert_id": f"{person}-{draw.randrange(10**6)}" if number % 7 else None,
        "server_upload_time": _spaced(arrived_at),
        "server_received_time": _spaced(arrived_at),
        "event_time": _spaced(happened_at),
        "client_event_time": _spaced(happened_at),
        "app": PROJECT,
        "amplitude_id": 2**53 + person,
        "event_id": number,
        "session_id": int(happened_at.timestamp() * 1000) if number % 5 else -1,
        "user_id": f"user-{person}" if person % 4 else None,
        "device_id": f"{source}-device-{person}",
        "event_type": draw.choice(TYPES),
        "amplitude_event_type": None,
        "event_properties": {"screen": f"s{number % 9}", "price": round(draw.random() * 90, 2), "note": "é\n\u2028"},
        "user_properties": _person(source, person),
        "group_properties": {},
        "groups": {"plan": ["free"]} if person % 3 else {},
        "global_user_properties": {},
        "plan": None,
        "platform": "Web" if source == "web" else "iOS",
        "os_name": "Chrome" if source == "web" else "ios",
        "os_version": "122" if source == "web" else "17.3.1",
        "version_name": None if source == "web" else "4.2.0",
        "start_version": None if source == "web" else "4.0.0",
        "library": "amplitude-ts/2.3.8" if source == "web" else "amplitude-swift/1.4.2",
        "language": "English",
        "device_brand": brand,
        "device_carrier": None,
        "device_family": family,
        "device_manufacturer": brand,
        "device_model": model,
        "device_type": family,
        "city": city,
        "country": country,
        "region": region,
        "dma": None,
        "ip_address": f"203.0.113.{person % 250}",
        "location_lat": None,
        "location_lng": None,
        "amplitude_attribution_ids": None if person % 6 else f"attribution-{person}",
        "is_attribution_event": (False, None, "true", 1)[number % 4],
        "paying": None,
        "sample_rate": None,
        "$schema": 12,
        "source_id": None,
        "data": {"path": "/2/httpapi"},
    }


def _person(source: str, person: int) -> dict[str, Any]:
    records = (10_000 + person, str(10_000 + person), "N/A", None)
    return {
        "EHR_ID": records[person % 4],
        ("Gender", "gender")[person % 2]: ("Female", "male", None)[person % 3],
        "cohort_day": 20_000 + person,
        "cohort_week": 2_857,
        "cohort_month": 658,
        "registered_via_app": ("via app", "1", "0", 1, True, False, "unknown", None)[person % 8],
        "source": source,
    }


def _spaced(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S.%f")


def appmetrica_rows(application_id: int, hour_at: datetime, count: int) -> Sequence[dict[str, str]]:
    """The events that AppMetrica received in an hour, every value as text; two of them equal in every column."""
    rows = [_received(application_id, hour_at, number) for number in range(count)]
    return [*rows, rows[0]] if rows else rows


def _received(application_id: int, hour_at: datetime, number: int) -> dict[str, str]:
    draw = random.Random(f"{application_id}:{hour_at:%Y%m%dT%H}:{number}")  # noqa: S311 - plausible, not secret
    person = draw.randrange(100)
    brand, model, _ = BRANDS[person % len(BRANDS)]
    city, _, _, country = PLACES[person % len(PLACES)]
    received_at = hour_at + timedelta(seconds=number % 3600)
    happened_at = received_at - timedelta(seconds=draw.randrange(90), days=draw.choice((0,) * 9 + (5,)))
    properties = {"screen": f"s{number % 7}", "text": 'a "quoted"\nline, and another'}
    return {
        "event_json": {5: "", 7: "no json {", 9: "{}"}.get(number % 12, json.dumps(properties, indent=1)),
        "event_name": draw.choice(TYPES[:4]),
        "event_receive_timestamp": str(int(received_at.timestamp())),
        "event_timestamp": str(int(happened_at.timestamp())),
        "session_id": str((2**64 - 1 if person % 5 == 0 else 10_000_000_000) - person),
        "installation_id": UUID(int=person + 1).hex,
        "appmetrica_device_id": str(2**64 - 1 - person),
        "city": city,
        "country_iso_code": country,
        "device_ipv6": f"::ffff:203.0.113.{person}",
        "device_locale": "de_DE",
        "device_manufacturer": brand,
        "device_model": model or "",
        "device_type": "phone",
        "operator_name": "MTS" if person % 2 else "",
        "os_name": "android",
        "os_version": "14",
        "profile_id": str(50_000 + person) if person % 3 else f"guest-{person}",
        "app_package_name": "com.example.app",
        "app_version_name": "4.2.0",
        "application_id": str(application_id),
    }
