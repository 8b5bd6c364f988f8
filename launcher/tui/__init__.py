"""The terminal interface: sizing, starting runs and following them."""

import os

FRAMES_PER_SECOND = "120"
"""Textual waits one to two frames before it paints a change that follows another: at its own 60 a second that
is 17 to 33 ms (textual/timer.py skips a frame that it is late for).
"""

# Textual reads it once, when it is imported; no module of this package can be before this one.
os.environ.setdefault("TEXTUAL_FPS", FRAMES_PER_SECOND)
