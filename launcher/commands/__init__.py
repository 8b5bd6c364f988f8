"""One module a command of the launcher."""
