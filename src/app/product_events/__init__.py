"""What the pulls of product events share: mapping to the warehouse, raw objects, and the HTTP client."""
