-- Window records and days in a shorter form, which the version before cannot read: "=" in `source_fields` and
-- `source_digest`, lists of four numbers in `source_sums`, a list in `windows`; see `app.db.checkpoints`. What older versions
-- stored stays as it is.

-- As in 0006, so that a process of an older version writes nothing more: owners of this format begin with 'v4|', and the
-- leases of the others end here. The lock waits for every statement that is changing a lease, and lets none begin.
LOCK TABLE leases IN SHARE ROW EXCLUSIVE MODE;

CREATE OR REPLACE FUNCTION leases_of_this_format() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.owner LIKE 'v4|%' THEN
        RETURN NEW;
    END IF;
    RETURN NULL;
END
$$;

UPDATE leases SET owner = 'v4|upgrade', generation = generation + 1, expires_at = clock_timestamp();
