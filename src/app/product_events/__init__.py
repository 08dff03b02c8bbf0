"""Code shared by the product event pulls: partition loop, records, verification, mapping, HTTP client."""
