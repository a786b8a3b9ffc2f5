"""Runs in forked children that are killed with SIGKILL, and what a run must leave whatever happened to it."""
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from cs336_alignment import runs


def in_child(work: Callable) -> int:
    """Starts `work()` in a child process, which inherits all imports; returns its id. Errors show in its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        tqdm.set_lock(threading.RLock())  # the usual one is shared by all forked processes, and a killed one may hold it
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended_by(pid: int) -> int:
    """Waits for a child; the signal that killed it, or minus its exit status."""
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def kill_ten_times(work: Callable, folder: Path, longest: float) -> list[int]:
    """Starts `work()`, which writes the run `folder`, and kills it within `longest` s; ten times, then lets it finish.

    Returns the step of the checkpoint that each kill left.
    """
    rng, steps = random.Random(), []
    while len(steps) < 10:
        pid = in_child(work)
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        if ended_by(pid) == signal.SIGKILL:
            checkpoint = runs.find_checkpoint(folder)
            steps.append(int(checkpoint.name[5:]) if checkpoint else 0)
        else:  # it was faster than we: begin once more, with less patience
            shutil.rmtree(folder)
            steps, longest = [], 0.7 * longest
    assert ended_by(in_child(work)) == 0
    print("kills left checkpoints of steps", steps)
    return steps


def without_clock(numbers: dict) -> dict:
    """All but what a clock says."""
    name = lambda key: key.split("/")[-1]
    return {k: v for k, v in numbers.items()
            if name(k) not in ("wall_s", "seconds", "tokens_per_s") and not name(k).startswith("s_")}


def record(folder: Path) -> dict:
    """All that a run leaves and that must not depend on interruptions, as it was written: there NaN equals itself."""
    lines = {name: [without_clock(json.loads(line)) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
             for name in runs.LOGS}
    summary = without_clock(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    summary["final"] = without_clock(summary["final"])
    return lines | {"summary": summary, "files": sorted(path.name for path in folder.iterdir())}
