"""The launcher: everything that needs torch, transformers, TRL or Textual."""
