"""/s3: object upload and download, on S3 or a local directory, for people and programs without an SDK."""
