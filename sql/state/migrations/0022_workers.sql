-- Workers of a queue, and what came of the steps of plans. Valid in SQLite and PostgreSQL.

CREATE TABLE workers (
    owner      TEXT        NOT NULL PRIMARY KEY,
    started_at TIMESTAMPTZ NOT NULL,
    seen_at    TIMESTAMPTZ NOT NULL
);

-- The report of one step, until a plan takes it into its own. plan_id is the run that planned the step.
CREATE TABLE step_reports (
    pipeline TEXT        NOT NULL,
    plan_id  TEXT        NOT NULL,
    step     TEXT        NOT NULL,
    report   TEXT        NOT NULL,
    ended_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (pipeline, plan_id, step)
);
