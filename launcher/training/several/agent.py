"""`python -m launcher.training.several.agent RUN_DIR`: torchrun's agent, which starts a run's ranks here.

It is torchrun itself (torch.distributed.run), called so that what it says of a rank's death comes as values
and not as text. The exit code is that of the rank that ended the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.runs.attempts import read_attempts
from launcher.runs.ends import RunExit
from launcher.runs.folder import RunFolder
from launcher.runs.minding.ranks import Death, tell_deaths
from launcher.runs.training_job import TrainingJob
from launcher.training.several import meeting
from launcher.training.several.ranks import AGENT
from planner.base.errors import InputError


def torchrun_arguments(job: TrainingJob, run_dir: Path) -> list[str]:
    """What torchrun is asked for: this machine's share of the ranks, none of them started again."""
    wanted = ["--nproc-per-node", str(job.local_processes), "--max-restarts", "0"]
    if job.nnodes == 1:
        wanted.append("--standalone")
    else:
        wanted += ["--nnodes", str(job.nnodes), "--node-rank", str(job.node_rank)]
        wanted += ["--rdzv-backend", "static", "--rdzv-endpoint", str(job.rdzv_endpoint)]
        wanted += ["--rdzv-conf", f"timeout={meeting.MEETING_SECONDS}"]
    return [*wanted, "-m", "launcher.training.train", str(run_dir)]


def main(arguments: list[str]) -> int:
    """Run the ranks of the folder named; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.training.several.agent RUN_DIR", file=sys.stderr)
        return RunExit.BAD_INPUT
    folder = RunFolder(Path(arguments[0]).resolve())
    try:
        job, attempts = folder.read_job(), read_attempts(folder.attempts)
        if attempts:
            job = attempts[-1].apply(job)
        if job.nnodes > 1:
            meeting.resolve(job)
    except InputError as error:
        print(error, file=sys.stderr)
        return RunExit.BAD_INPUT

    # As the launcher's own processes: no file of the folder that it was started in shadows a library.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ[AGENT] = str(os.getpid())

    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if job.nnodes > 1:
        meeting.bound(folder, job)
    try:
        run.run(run.parse_args(torchrun_arguments(job, folder.path)))
    except ChildFailedError as error:
        first = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        deaths = [Death(rank=rank, pid=one.pid, code=one.exitcode) for rank, one in first]
        tell_deaths(folder, deaths)
        codes = [death.code for death in deaths if death.code > 0]
        return codes[0] if codes else RunExit.BUG
    except DistError as error:
        print(meeting.missed(job, error), file=sys.stderr)
        return RunExit.BAD_INPUT
    return RunExit.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
