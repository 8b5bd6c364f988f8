"""What watches a training from within: its heartbeat, how long it waits, its peaks of memory."""
