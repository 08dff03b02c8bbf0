-- The ledger of each run and its sums, and a fence against the version before.

ALTER TABLE runs ADD COLUMN ledger TEXT NOT NULL DEFAULT '{}';

-- Sums over all runs that ended, also those whose record was pruned since, by job and entry of the ledger. What was newly
-- set aside stands by reason; the other entries have the reason ''.
CREATE TABLE ledger_totals (
    job    TEXT   NOT NULL,
    entry  TEXT   NOT NULL,
    reason TEXT   NOT NULL,
    total  BIGINT NOT NULL,
    PRIMARY KEY (job, entry, reason)
);

-- A process of the version before that still runs during a deploy must write nothing more. Owners of this format begin with
-- 'v2|'; a lease of another owner is not taken: that process finds each job held by another one. The leases that it has
-- end here with a generation that it does not know, so that its next commit and its next renewal are refused.
CREATE FUNCTION leases_of_this_format() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.owner LIKE 'v2|%' THEN
        RETURN NEW;
    END IF;
    RETURN NULL;
END
$$;

-- Made before the leases are ended: it waits for every statement that is changing one, and lets none begin.
CREATE TRIGGER leases_of_this_format BEFORE INSERT OR UPDATE ON leases
FOR EACH ROW EXECUTE FUNCTION leases_of_this_format();

UPDATE leases SET owner = 'v2|upgrade', generation = generation + 1, expires_at = clock_timestamp();
