"""Reports over the Parquet objects below the prefix: four from summaries in memory, any other by DuckDB."""
