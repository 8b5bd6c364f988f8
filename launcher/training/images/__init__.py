"""Images: their tokens in the text, and their pixels beside it."""
