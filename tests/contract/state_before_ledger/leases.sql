-- Leases, timed by the database's own clock. Each change is one statement, so two processes cannot interleave.

-- name: acquire (postgres)
-- A fresh generation; no row while another owner's lease lives. The clock is read after the row lock was waited for.
INSERT INTO leases AS held (name, owner, generation, expires_at)
VALUES (:name, :owner, 1, clock_timestamp() + :ttl_seconds * INTERVAL '1 second')
ON CONFLICT (name) DO UPDATE SET
    owner = excluded.owner,
    generation = held.generation + 1,
    expires_at = clock_timestamp() + :ttl_seconds * INTERVAL '1 second'
WHERE held.owner = excluded.owner OR held.expires_at <= clock_timestamp()
RETURNING generation, expires_at;

-- name: acquire (sqlite)
-- A fresh generation; no row while another owner's lease lives.
INSERT INTO leases AS held (name, owner, generation, expires_at)
VALUES (:name, :owner, 1, strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', printf('+%.3f seconds', :ttl_seconds)))
ON CONFLICT (name) DO UPDATE SET
    owner = excluded.owner,
    generation = held.generation + 1,
    expires_at = excluded.expires_at
WHERE held.owner = excluded.owner OR held.expires_at <= strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')
RETURNING generation, expires_at;

-- name: renew (postgres)
-- A later expiry for a lease that still lives; no row when it expired or has another owner or generation.
UPDATE leases
SET expires_at = clock_timestamp() + :ttl_seconds * INTERVAL '1 second'
WHERE name = :name AND owner = :owner AND generation = :generation AND expires_at > clock_timestamp()
RETURNING expires_at;

-- name: renew (sqlite)
-- A later expiry for a lease that still lives; no row when it expired or has another owner or generation.
UPDATE leases
SET expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', printf('+%.3f seconds', :ttl_seconds))
WHERE
    name = :name AND owner = :owner AND generation = :generation
    AND expires_at > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')
RETURNING expires_at;

-- name: release (postgres)
-- Expire a lease now. The row stays for its generation.
UPDATE leases
SET expires_at = clock_timestamp()
WHERE name = :name AND owner = :owner AND generation = :generation AND expires_at > clock_timestamp();

-- name: release (sqlite)
-- Expire a lease now. The row stays for its generation.
UPDATE leases
SET expires_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')
WHERE
    name = :name AND owner = :owner AND generation = :generation
    AND expires_at > strftime('%Y-%m-%dT%H:%M:%f000Z', 'now');

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
