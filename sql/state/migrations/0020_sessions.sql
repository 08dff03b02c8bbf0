-- Who is signed in to the dashboard. Valid in SQLite and PostgreSQL.

-- A session is known by the SHA-256 of its random token, which only the browser's cookie holds, and belongs to one key, known by
-- its name and SHA-256: it ends with the key.
CREATE TABLE dashboard_sessions (
    token_hash TEXT        NOT NULL PRIMARY KEY,
    key_name   TEXT        NOT NULL,
    key_hash   TEXT        NOT NULL,
    ends_at    TIMESTAMPTZ NOT NULL
);
