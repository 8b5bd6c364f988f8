"""Runs: the folder that joins the processes, events, supervision, records."""
