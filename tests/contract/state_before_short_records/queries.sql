-- The queries of the version before migration 0026 that tests/contract/test_upgrade.py uses, word for word.

-- name: acquire (postgres)
-- A new generation; no row while another owner's lease is valid. The clock is read after waiting for the row lock.
-- Always free: a lease that was given back, and one that stayed unchanged while it was watched for long enough.
INSERT INTO leases AS held (name, owner, generation, expires_at, ttl_seconds)
VALUES (:name, :owner, 1, clock_timestamp() + :ttl_seconds * INTERVAL '1 second', :ttl_seconds)
ON CONFLICT (name) DO UPDATE SET
    owner = excluded.owner,
    generation = held.generation + 1,
    expires_at = clock_timestamp() + :ttl_seconds * INTERVAL '1 second',
    ttl_seconds = excluded.ttl_seconds
WHERE
    held.owner IN (excluded.owner, :free) OR held.expires_at <= clock_timestamp()
    OR (held.generation = :watched_generation AND held.expires_at = :watched_expires_at)
RETURNING generation, expires_at, clock_timestamp() AS now_at;

-- name: acquire (sqlite)
-- A new generation; no row while another owner's lease is valid. See the other dialect for what is free.
INSERT INTO leases AS held (name, owner, generation, expires_at, ttl_seconds)
VALUES (
    :name, :owner, 1, strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', printf('+%.3f seconds', :ttl_seconds)), :ttl_seconds
)
ON CONFLICT (name) DO UPDATE SET
    owner = excluded.owner,
    generation = held.generation + 1,
    expires_at = excluded.expires_at,
    ttl_seconds = excluded.ttl_seconds
WHERE
    held.owner IN (excluded.owner, :free) OR held.expires_at <= strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')
    OR (held.generation = :watched_generation AND held.expires_at = :watched_expires_at)
RETURNING generation, expires_at, strftime('%Y-%m-%dT%H:%M:%f000Z', 'now') AS now_at;

-- name: renew (postgres)
-- Extends a valid lease; no row if it expired or has another owner or generation.
UPDATE leases
SET expires_at = clock_timestamp() + :ttl_seconds * INTERVAL '1 second', ttl_seconds = :ttl_seconds
WHERE name = :name AND owner = :owner AND generation = :generation AND expires_at > clock_timestamp()
RETURNING expires_at;

-- name: renew (sqlite)
-- Extends a valid lease; no row if it expired or has another owner or generation.
UPDATE leases
SET
    expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', printf('+%.3f seconds', :ttl_seconds)),
    ttl_seconds = :ttl_seconds
WHERE
    name = :name AND owner = :owner AND generation = :generation
    AND expires_at > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')
RETURNING expires_at;

-- name: fence (postgres)
-- The database's clock if the lease is still ours, otherwise no row. FOR SHARE makes a takeover wait until this
-- transaction ends, while other commits under the same lease proceed.
SELECT clock_timestamp() AS now_at
FROM leases
WHERE name = :name AND owner = :owner AND generation = :generation AND expires_at > clock_timestamp()
FOR SHARE;

-- name: fence (sqlite)
-- The database's clock if the lease is still ours, otherwise no row. The transaction already holds the write lock.
SELECT strftime('%Y-%m-%dT%H:%M:%f000Z', 'now') AS now_at
FROM leases
WHERE
    name = :name AND owner = :owner AND generation = :generation
    AND expires_at > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');

-- name: save_checkpoint
-- The partition succeeded. Cursor and high watermark only move forward: repeating an older commit must not undo a newer
-- one. Those after :until_at were set by clocks that were ahead, and are replaced.
INSERT INTO export_checkpoints AS held (
    pipeline, device_id, started_at, last_exported_at, high_watermark_at, status, s3_key, record_count, error_message,
    created_at, updated_at
) VALUES (
    :pipeline, :partition, :cursor_at, :cursor_at, :high_watermark_at, 'ok', :key, :rows, NULL, :now_at, :now_at
)
ON CONFLICT (pipeline, device_id) DO UPDATE SET
    started_at = CASE
        WHEN held.started_at <= :until_at THEN held.started_at
        ELSE coalesce(excluded.started_at, held.started_at)
    END,
    last_exported_at = CASE
        WHEN held.last_exported_at > excluded.last_exported_at AND held.last_exported_at <= :until_at
            THEN held.last_exported_at
        ELSE coalesce(excluded.last_exported_at, held.last_exported_at)
    END,
    high_watermark_at = CASE
        WHEN held.high_watermark_at > excluded.high_watermark_at AND held.high_watermark_at <= :until_at
            THEN held.high_watermark_at
        ELSE coalesce(excluded.high_watermark_at, held.high_watermark_at)
    END,
    status = 'ok',
    s3_key = coalesce(excluded.s3_key, held.s3_key),
    record_count = coalesce(excluded.record_count, held.record_count),
    error_message = NULL,
    updated_at = excluded.updated_at;

-- name: save_run
-- Insert or replace the record of one run.
INSERT INTO runs (
    run_id, job, started_at, ended_at, outcome, rows, bytes, windows, late_rows, corrected_rows, new_rows, failures, more,
    error, hint, ledger
) VALUES (
    :run_id, :job, :started_at, :ended_at, :outcome, :rows, :bytes, :windows, :late_rows, :corrected_rows, :new_rows,
    :failures, :more, :error, :hint, :ledger
)
ON CONFLICT (run_id) DO UPDATE SET
    job = excluded.job,
    started_at = excluded.started_at,
    ended_at = excluded.ended_at,
    outcome = excluded.outcome,
    rows = excluded.rows,
    bytes = excluded.bytes,
    windows = excluded.windows,
    late_rows = excluded.late_rows,
    corrected_rows = excluded.corrected_rows,
    new_rows = excluded.new_rows,
    failures = excluded.failures,
    more = excluded.more,
    error = excluded.error,
    hint = excluded.hint,
    ledger = excluded.ledger;
