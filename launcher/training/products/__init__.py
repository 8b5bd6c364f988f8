"""Matrix products of the frozen base in 8 bits."""
