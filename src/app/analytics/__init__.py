"""Reports over the Parquet objects below the prefix: four from in-memory summaries, all others run by DuckDB."""
