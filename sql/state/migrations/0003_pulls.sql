-- What the pulls from services remember besides their windows. Valid in SQLite and PostgreSQL.

-- One row per question that was put to an export service. The question itself is the name of the file upstream, so the
-- same question is asked until the file is there, by whichever process. `asked_at` is its first answer, null before.
CREATE TABLE pull_exports (
    export_id   BIGINT      NOT NULL PRIMARY KEY,
    service     TEXT        NOT NULL,
    owner       TEXT        NOT NULL,
    request     TEXT        NOT NULL,
    parts_count INTEGER     NOT NULL,
    status      TEXT        NOT NULL CHECK (status IN ('open', 'done')),
    asked_at    TIMESTAMPTZ,
    created_at  TIMESTAMPTZ NOT NULL,
    UNIQUE (service, owner, request)
);

-- Calls of a service on one day UTC: many services allow so many a day.
CREATE TABLE pull_calls (
    service TEXT        NOT NULL,
    day_at  TIMESTAMPTZ NOT NULL,
    calls   BIGINT      NOT NULL,
    PRIMARY KEY (service, day_at)
);
