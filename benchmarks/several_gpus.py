"""Measure setups on several GPUs of this machine, by DDP and by FSDP2, with random weights.

    python -m benchmarks.several_gpus RECORDS.jsonl [--gpus 2] [--only WORD ...] [--seconds N] [--one-gpu]

Each setup is a process group of its own, started by torchrun; its record is appended as soon as it is
there, with each rank's peaks. What failed is told in RECORDS.failed.jsonl with the end of its log, and the
next one is started. Setups whose record is there are left out: started again, it goes on where it was. With
--profiles FILE the setups are those of a file of profiles (launcher/measuring/profile.py). With --one-gpu all
ranks share the first GPU (launcher/measuring/one_gpu.py): memory is measured, speed is not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.measuring.profile import Profile, profile_line, read_profiles
from launcher.runs.allocator import measuring_environment
from planner.calibration.records import read_records
from planner.setup.training_setup import TrainingSetup

RUN_SECONDS = 300.0
"""The most that one setup may take; a 70B is filled and quantised for about three minutes."""
CARD_BYTES = int(23.5 * 2**30)
"""What a 24 GB card leaves, for the setups that must train on one."""
KEPT_LOG = 6000


@dataclass(frozen=True, slots=True)
class Measured:
    """A setup to measure, and what is left of each GPU for it; null for all."""

    name: str
    profile: Profile
    cap_bytes: int | None = None


def _setup(model: str, length: int, batch: int, distributed: str, gpus: int, **knobs: Any) -> TrainingSetup:
    return TrainingSetup.from_dict(
        {
            "model": model,
            "max_length": length,
            "per_device_train_batch_size": batch,
            "num_processes": gpus,
            "distributed": distributed,
            "optim": "adamw_torch_fused" if distributed == "fsdp" else "adamw_8bit",
            **knobs,
        }
    )


def setups(gpus: int, steps: int) -> list[Measured]:
    """What is measured, the most telling first."""
    found: list[Measured] = []

    def add(
        name: str,
        *where: Any,
        padded: bool = False,
        evaluates: bool = False,
        cap: int | None = None,
        **knobs: Any,
    ) -> None:
        profile = Profile(
            setup=_setup(*where, gpus, **knobs), padded=padded, evaluates=evaluates, steps=steps
        )
        found.append(Measured(f"{where[3]} {name}", profile, cap))

    full = {"method": "full", "optim": "adamw_torch_fused"}
    lora = {"method": "lora", "optim": "adamw_torch_fused"}
    add("70b llama 3.1 on 24 GB", "llama-3.1-70b", 512, 1, "fsdp", cap=CARD_BYTES)
    add("70b llama 2 on 24 GB", "llama-2-70b", 1024, 1, "fsdp", cap=CARD_BYTES)
    for way in ("fsdp", "ddp"):
        add("qlora 8b", "llama-3.1-8b", 2048, 4, way)
        add("lora 3b", "llama-3.2-3b", 2048, 2, way, **lora)
        add("full 0.5b", "qwen2.5-0.5b", 1024, 4, way, **full)
        add("qlora 1b accumulated", "llama-3.2-1b", 1024, 2, way, gradient_accumulation_steps=8)
    for way in ("fsdp", "ddp"):
        add("qlora 7b packed", "mistral-7b-v0.3", 4096, 1, way, packing=True)
        add("qlora 8b padded", "qwen3-8b", 2048, 4, way, padded=True)
        add(
            "lora 3b packed accumulated",
            *("qwen2.5-3b", 2048, 1, way),
            packing=True,
            gradient_accumulation_steps=8,
            **lora,
        )
        add("full 1b accumulated", "llama-3.2-1b", 1024, 2, way, gradient_accumulation_steps=8, **full)
        add("qlora 14b", "qwen2.5-14b", 2048, 2, way)
        add("qlora 8b compiled", "llama-3.1-8b", 2048, 4, way, compile="regional")
    for way in ("fsdp", "ddp"):
        add("qlora 1b saved", "llama-3.2-1b", 2048, 2, way, evaluates=True)
        add("full 0.5b saved", "qwen2.5-0.5b", 2048, 2, way, evaluates=True, **full)
    add("70b saved", "llama-3.1-70b", 512, 1, "fsdp", cap=CARD_BYTES, evaluates=True, lora_r=8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="words that a setup's name must contain")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--one-gpu", action="store_true")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    if arguments.profiles is None:
        wanted = setups(arguments.gpus, 1 if arguments.one_gpu else 3)
    else:
        wanted = [Measured(profile.setup.model, profile) for profile in read_profiles(arguments.profiles)]
    wanted = [one for one in wanted if all(word in one.name for word in arguments.only)]
    done = {record.setup for record in read_records(arguments.output)} if arguments.output.exists() else set()
    for one in wanted:
        if one.profile.setup in done:
            continue
        left = end - time.monotonic()
        if left < 60.0:
            print("no time left", flush=True)
            break
        measure(one, arguments.output, min(RUN_SECONDS, left), one_gpu=arguments.one_gpu)


def measure(one: Measured, output: Path, seconds: float, *, one_gpu: bool) -> None:
    """Measure a setup in a process group of its own, and tell how it went."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        profile, log = Path(folder) / "profile.jsonl", Path(folder) / "log"
        profile.write_text(profile_line(one.profile) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(one.profile.setup.num_processes)]
        command += ["-m", "launcher.measuring.several", str(profile), str(output)]
        command += [] if one.cap_bytes is None else ["--cap", str(one.cap_bytes)]
        command += ["--one-gpu"] if one_gpu else []
        with log.open("wb") as file:
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
            )
            try:
                code: int | str = child.wait(seconds)
            except subprocess.TimeoutExpired:
                code = f"no end after {seconds:.0f} s"
            finally:
                if child.poll() is None:
                    # torchrun ends its ranks on SIGTERM; what is left then is ended with the session.
                    child.terminate()
                    try:
                        child.wait(40.0)
                    except subprocess.TimeoutExpired:
                        os.killpg(child.pid, signal.SIGKILL)
                        child.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
    took = round(time.monotonic() - started, 1)
    if code == 0:
        record = list(read_records(output))[-1]
        step = record.phase("step")
        told = (
            "no step"
            if step is None
            else f"{step.allocated_bytes / 2**30:.3f} GiB allocated, {step.reserved_bytes / 2**30:.3f} held"
        )
        rate = "" if record.tokens_per_second is None else f"{record.tokens_per_second:,.0f} tokens/s"
        print(f"{one.name}: ok, {told}, {rate}, {took} s", flush=True)
        return
    failed = {"name": one.name, "setup": one.profile.setup.to_dict(), "code": code, "seconds": took}
    with output.with_suffix(".failed.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**failed, "log": text[-KEPT_LOG:], "errors": _errors(text)}) + "\n")
    print(f"{one.name}: failed ({code}), {took} s: {' | '.join(_errors(text))[:300]}", flush=True)


def _errors(log: str) -> list[str]:
    """The lines of a log that name an error."""
    lines = [line.strip() for line in log.splitlines()]
    return [line for line in lines if "Error" in line and "ChildFailedError" not in line][:6]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {
        **measuring_environment(os.environ),
        "PYTHONPATH": path,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


if __name__ == "__main__":
    main()
