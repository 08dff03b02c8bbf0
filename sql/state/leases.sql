-- Leases, timed by the database's own clock. Each change is one statement, so two processes cannot interleave.

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

-- name: held (postgres)
-- A lease that was not given back, valid or expired.
SELECT generation, expires_at, ttl_seconds, clock_timestamp() AS now_at
FROM leases
WHERE name = :name AND owner <> :free;

-- name: held (sqlite)
-- A lease that was not given back, valid or expired.
SELECT generation, expires_at, ttl_seconds, strftime('%Y-%m-%dT%H:%M:%f000Z', 'now') AS now_at
FROM leases
WHERE name = :name AND owner <> :free;

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

-- name: release
-- Releases the lease without asking a clock. The row stays, for its generation.
UPDATE leases SET owner = :free WHERE name = :name AND owner = :owner AND generation = :generation;

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
