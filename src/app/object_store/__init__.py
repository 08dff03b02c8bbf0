"""Objects on S3 or in a directory: one port, and the sink of the pipelines that write tables."""
