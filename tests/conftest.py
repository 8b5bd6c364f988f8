"""What all tests share."""

from __future__ import annotations

import signal

# A job started in the background inherits an ignored SIGINT, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
