"""/s3: objects in and out, on S3 or on a local directory, for people and programs without an SDK."""
