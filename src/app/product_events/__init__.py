"""What the pulls of product events share: the loop over partitions, the records of hours, verification, the gap map."""
