-- What the source answered for a window, beside what its object holds: the digest of its rows; '' for records of older
-- versions.

ALTER TABLE export_windows ADD COLUMN source_digest TEXT NOT NULL DEFAULT '';

-- A process of an older version would write late rows to delta objects, which this one folds. As in 0006: owners of this
-- format begin with 'v3|', and the leases of the others end here. The lock waits for every statement that is changing a
-- lease, and lets none begin.
LOCK TABLE leases IN SHARE ROW EXCLUSIVE MODE;

CREATE OR REPLACE FUNCTION leases_of_this_format() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.owner LIKE 'v3|%' THEN
        RETURN NEW;
    END IF;
    RETURN NULL;
END
$$;

UPDATE leases SET owner = 'v3|upgrade', generation = generation + 1, expires_at = clock_timestamp();
