"""What the pulls of product events share: the loop over partitions, records, verification, mapping, HTTP client."""
