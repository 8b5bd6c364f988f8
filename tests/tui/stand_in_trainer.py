"""A trainer as far as its run folder shows it: `python -m tests.tui.stand_in_trainer RUN_DIR`.

Holds the trainer's lock and logs a step every 20 ms, until it is asked to stop.
"""

import fcntl
import os
import sys
import time
from pathlib import Path

from launcher.runs.folder import RunFolder
from tests.tui import synthetic

folder = RunFolder(Path(sys.argv[1]))
folder.lock_file("trainer").parent.mkdir(parents=True, exist_ok=True)
lock = os.open(folder.lock_file("trainer"), os.O_WRONLY | os.O_CREAT, 0o644)
fcntl.flock(lock, fcntl.LOCK_EX)
os.write(lock, f"{os.getpid()}\n".encode())
synthetic.append(folder.events, synthetic.start(100_000))
step = 0
while not folder.stop.exists() and step < 10_000:
    step += 1
    synthetic.append(folder.events, synthetic.log(step))
    time.sleep(0.02)
synthetic.append(folder.events, synthetic.end("stopped", step))
