-- title: Rows by day
-- summary: rows_by_day
-- How many rows, and of how many devices, each UTC day has.
SELECT
    CAST(timestamp AS DATE) AS date,
    count(*) AS row_count,
    count(DISTINCT device_id) AS device_count
FROM read_parquet({{S3_PATH}})
WHERE timestamp IS NOT NULL
GROUP BY ALL
ORDER BY date;
