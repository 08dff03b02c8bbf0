"""DynamoDB to one CSV file per hour on Google Drive, or in a directory."""
