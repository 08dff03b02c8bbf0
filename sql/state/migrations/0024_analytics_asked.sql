-- Whether anybody ever asked /analytics, since what it sums is known of exported objects also where nobody did. Valid in
-- SQLite and PostgreSQL.
CREATE TABLE analytics_asked (
    only_row INTEGER NOT NULL PRIMARY KEY CHECK (only_row = 1)
);

INSERT INTO analytics_asked (only_row) SELECT 1 WHERE EXISTS (SELECT 1 FROM analytics_objects);
