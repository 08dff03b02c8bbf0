CREATE TABLE events_part (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uuid uuid NOT NULL UNIQUE,
    event_type text,
    event_time timestamptz,
    user_id text,
    platform text,
    device_id text,
    event_id bigint,
    language text,
    os_name text,
    os_version text,
    session_id bigint,
    start_version text,
    version_name text,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE mobile_devices (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_id text NOT NULL UNIQUE,
    device_brand text,
    device_carrier text,
    device_family text,
    device_manufacturer text,
    device_model text,
    device_type text,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE permanent_user_properties (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ehr_id bigint NOT NULL UNIQUE,
    gender text,
    cohort_day integer,
    cohort_week integer,
    cohort_month integer,
    registered_via_app boolean,
    source text,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE technical_data (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uuid uuid NOT NULL UNIQUE,
    insert_id text,
    amplitude_attribution_ids jsonb,
    amplitude_id bigint,
    is_attribution_event boolean,
    library text,
    group_properties_json jsonb,
    groups_json jsonb,
    plan_json jsonb,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tmp_event_properties (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uuid uuid NOT NULL UNIQUE,
    event_properties_json jsonb,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tmp_user_properties (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uuid uuid NOT NULL UNIQUE,
    user_properties_json jsonb,
    language text,
    session_id bigint,
    start_version text,
    migrated boolean NOT NULL DEFAULT FALSE,
    event_time timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE user_locations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uuid uuid NOT NULL UNIQUE,
    location_lat double precision,
    location_lng double precision,
    city text,
    country text,
    region text,
    ip_address text,
    created_at timestamptz NOT NULL DEFAULT now()
);
