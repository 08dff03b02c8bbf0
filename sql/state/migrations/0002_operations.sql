-- What operators and metrics need to survive a restart: which jobs are paused, and what all runs moved so far.

CREATE TABLE paused_jobs (
    job       TEXT        NOT NULL PRIMARY KEY,
    paused_at TIMESTAMPTZ NOT NULL,
    paused_by TEXT        NOT NULL
);

-- Sums over all runs that ended, also those whose record was pruned since.
CREATE TABLE job_totals (
    job       TEXT        NOT NULL,
    outcome   TEXT        NOT NULL,
    runs      BIGINT      NOT NULL,
    rows      BIGINT      NOT NULL,
    bytes     BIGINT      NOT NULL,
    windows   BIGINT      NOT NULL,
    late_rows BIGINT      NOT NULL,
    ended_at  TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (job, outcome)
);

INSERT INTO job_totals (job, outcome, runs, rows, bytes, windows, late_rows, ended_at)
SELECT job, outcome, count(*), sum(rows), sum(bytes), sum(windows), sum(late_rows), max(ended_at)
FROM runs
WHERE ended_at IS NOT NULL
GROUP BY job, outcome;
