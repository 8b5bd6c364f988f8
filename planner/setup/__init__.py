"""What was asked: every knob, its defaults, and what follows from it."""
