"""Training data: rows read, lengths counted, batches formed."""
