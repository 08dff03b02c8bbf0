-- Leases, timed by the database's own clock. Each change is one statement, so two processes cannot interleave.

-- name: acquire (postgres)
-- A fresh generation; no row while another owner's lease lives. The clock is read after the row lock was waited for. Free,
-- whatever its time says: a lease that was given back, and one that stands as it was watched for long enough.
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
-- A fresh generation; no row while another owner's lease lives. See the other dialect for what is free.
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
-- A lease that was not given back, whether it still lives or not.
SELECT generation, expires_at, ttl_seconds, clock_timestamp() AS now_at
FROM leases
WHERE name = :name AND owner <> :free;

-- name: held (sqlite)
-- A lease that was not given back, whether it still lives or not.
SELECT generation, expires_at, ttl_seconds, strftime('%Y-%m-%dT%H:%M:%f000Z', 'now') AS now_at
FROM leases
WHERE name = :name AND owner <> :free;

-- name: renew (postgres)
-- A later expiry for a lease that still lives; no row when it expired or has another owner or generation.
UPDATE leases
SET expires_at = clock_timestamp() + :ttl_seconds * INTERVAL '1 second', ttl_seconds = :ttl_seconds
WHERE name = :name AND owner = :owner AND generation = :generation AND expires_at > clock_timestamp()
RETURNING expires_at;

-- name: renew (sqlite)
-- A later expiry for a lease that still lives; no row when it expired or has another owner or generation.
UPDATE leases
SET
    expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', printf('+%.3f seconds', :ttl_seconds)),
    ttl_seconds = :ttl_seconds
WHERE
    name = :name AND owner = :owner AND generation = :generation
    AND expires_at > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')
RETURNING expires_at;

-- name: release
-- Nobody holds it now, and no clock is asked whether that is so. The row stays for its generation.
UPDATE leases SET owner = :free WHERE name = :name AND owner = :owner AND generation = :generation;

-- name: fence (postgres)
-- The database's clock if the lease is still ours, else no row. FOR SHARE keeps a take-over waiting until this
-- transaction ends, and lets other commits under the same lease go on beside it.
SELECT clock_timestamp() AS now_at
FROM leases
WHERE name = :name AND owner = :owner AND generation = :generation AND expires_at > clock_timestamp()
FOR SHARE;

-- name: fence (sqlite)
-- The database's clock if the lease is still ours, else no row. The transaction holds the write lock already.
SELECT strftime('%Y-%m-%dT%H:%M:%f000Z', 'now') AS now_at
FROM leases
WHERE
    name = :name AND owner = :owner AND generation = :generation
    AND expires_at > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');
