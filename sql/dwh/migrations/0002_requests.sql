-- Answers kept under an Idempotency-Key, in one transaction with the rows.
CREATE TABLE dwh_requests (
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    answer TEXT,
    created_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (caller, key)
);

CREATE INDEX dwh_requests_by_age ON dwh_requests (created_at);
