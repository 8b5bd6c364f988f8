"""Claims: figures that others state for a setup, read from text, and judged by what the models say."""
