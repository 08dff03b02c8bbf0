CREATE TABLE events_part (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    event_type TEXT,
    event_time TEXT,
    user_id TEXT,
    platform TEXT,
    device_id TEXT,
    event_id INTEGER,
    language TEXT,
    os_name TEXT,
    os_version TEXT,
    session_id INTEGER,
    start_version TEXT,
    version_name TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;

CREATE TABLE mobile_devices (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    device_id TEXT NOT NULL UNIQUE,
    device_brand TEXT,
    device_carrier TEXT,
    device_family TEXT,
    device_manufacturer TEXT,
    device_model TEXT,
    device_type TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;

CREATE TABLE permanent_user_properties (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    ehr_id INTEGER NOT NULL UNIQUE,
    gender TEXT,
    cohort_day INTEGER,
    cohort_week INTEGER,
    cohort_month INTEGER,
    registered_via_app INTEGER,
    source TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;

CREATE TABLE technical_data (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    insert_id TEXT,
    amplitude_attribution_ids TEXT,
    amplitude_id INTEGER,
    is_attribution_event INTEGER,
    library TEXT,
    group_properties_json TEXT,
    groups_json TEXT,
    plan_json TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;

CREATE TABLE tmp_event_properties (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    event_properties_json TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;

CREATE TABLE tmp_user_properties (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    user_properties_json TEXT,
    language TEXT,
    session_id INTEGER,
    start_version TEXT,
    migrated INTEGER NOT NULL DEFAULT FALSE,
    event_time TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;

CREATE TABLE user_locations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL UNIQUE,
    location_lat REAL,
    location_lng REAL,
    city TEXT,
    country TEXT,
    region TEXT,
    ip_address TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'))
) STRICT;
