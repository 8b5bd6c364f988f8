"""What became of a run, from its files alone: facts, page, picture."""
