"""What all tests share."""

from __future__ import annotations

import os
import signal

from planner.setup.cuda_allocator import VARIABLES

# A job started in the background inherits an ignored SIGINT, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Plans are for the allocator that the environment asks for: here for what suits the machine.
for _name in VARIABLES:
    os.environ.pop(_name, None)
