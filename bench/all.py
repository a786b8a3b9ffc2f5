"""All benches that need a GPU, one command: as many at once as this machine has GPUs, each with a limit; what is done stays done.

    python bench/all.py                       # every job below
    python bench/all.py --only course         # the jobs whose names contain this (repeat for several)
    python bench/all.py --list                # what there is, and what is done

A job starts when enough GPUs are free, in the order of the list, sees those alone, and writes a copy of its file of `results/bench` and
a log below `--folder`. When it ends well, what it has changed goes into the stored file. One that fails or runs past its limit is named at the
end; the same command tries those again. Jobs that time the host (TRL's, vLLM's) are slower beside others: `--gpus 1` runs one at a time.
"""
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer

BENCH = Path(__file__).resolve().parent
STORED = BENCH.parent / "results" / "bench"


class Job(NamedTuple):
    gpus: int
    limit_s: int
    stored: str  # a file of results/bench
    words: str


JOBS = {
    "step_course": Job(1, 400, "grpo_step", "grpo_step.py --only course"),
    "step_pocket": Job(1, 300, "grpo_step", "grpo_step.py --only pocket"),
    "trl_course": Job(1, 900, "grpo_step", "trl_step.py --only course --steps 1"),
    "trl_pocket": Job(1, 700, "grpo_step", "trl_step.py --only pocket"),
    "lean": Job(1, 600, "grpo_step", "grpo_step.py --only lean --steps 1"),
    "pass_course": Job(1, 600, "training_pass", "training_pass.py --only course"),
    "pass_pocket": Job(1, 400, "training_pass", "training_pass.py --only pocket"),
    "static_course": Job(1, 200, "decode_profile", "decode_profile.py --part static --shape course"),
    "static_pocket": Job(1, 150, "decode_profile", "decode_profile.py --part static --shape pocket"),
    "vllm_course": Job(1, 300, "decode_profile", "decode_profile.py --part profile --shape course"),
    "vllm_pocket": Job(1, 300, "decode_profile", "decode_profile.py --part profile --shape pocket"),
    "pairs_pocket": Job(1, 900, "decode_profile", "decode_profile.py --part pairs --shape pocket"),
    "rehearsal": Job(1, 1800, "dress_rehearsal", "dress_rehearsal.py"),
    "scaling": Job(4, 900, "scaling", "scaling.py"),  # one job: the other's rows are in the same list
    "server": Job(2, 300, "server_weights", "server_weights.py"),
}


def changed(before, after):
    """What of `after` differs from `before`: of dictionaries, those entries alone; a list counts as one value."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return after
    return {k: changed(before.get(k), v) for k, v in after.items() if k not in before or before[k] != v}


def joined(before, new):
    """`before` with the entries of `new` put in."""
    if not (isinstance(before, dict) and isinstance(new, dict)):
        return new
    return before | {k: joined(before.get(k), v) for k, v in new.items()}


def read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def keep(name: str, job: Job, folder: Path, stored: Path) -> None:
    """Puts what a finished job has changed into the stored file, and marks it as done."""
    found = changed(read(folder / f"{name}.before.json"), read(folder / f"{name}.json"))
    (stored / f"{job.stored}.json").write_text(json.dumps(joined(read(stored / f"{job.stored}.json"), found), indent=1) + "\n")
    (folder / f"{name}.done").touch()


def start(name: str, job: Job, gpus: list[str], folder: Path, stored: Path) -> subprocess.Popen:
    """A job in a process group of its own, which sees these GPUs alone."""
    for copy in (f"{name}.json", f"{name}.before.json"):
        (folder / copy).unlink(missing_ok=True)
        if before := read(stored / f"{job.stored}.json"):
            (folder / copy).write_text(json.dumps(before))
    script, *words = job.words.split()
    command = [sys.executable, BENCH / script, *words, "--out", folder / f"{name}.json"]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)})


def kill(process: subprocess.Popen) -> None:
    """Ends a job and all that it has started, in whatever process groups."""
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def run_all(jobs: dict[str, Job], gpus: list[str], folder: Path, stored: Path, tick_s: float = 0.5) -> dict[str, str]:
    """Runs the jobs in their order on the GPUs; why each that did not end well has failed."""
    waiting, free, running, failed = dict(jobs), list(gpus), {}, {}
    try:
        while waiting or running:
            for name in list(waiting):
                job = waiting[name]
                if job.gpus > len(free):
                    break  # it is next: no later one goes before it
                mine, free = free[:job.gpus], free[job.gpus:]
                running[name] = start(name, waiting.pop(name), mine, folder, stored), job, mine, time.monotonic()
                print(f"{name}: started on {', '.join(mine) or 'the CPU'}", flush=True)
            time.sleep(tick_s)
            for name, (process, job, mine, begin) in list(running.items()):
                late = time.monotonic() - begin > job.limit_s
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    kill(process)
                    failed[name] = f"ran past its {job.limit_s} s"
                elif process.returncode:
                    failed[name] = f"exit code {process.returncode}"
                else:
                    keep(name, job, folder, stored)
                process.wait()
                print(f"{name}: {failed.get(name, 'done')} after {time.monotonic() - begin:.0f} s", flush=True)
                free += running.pop(name)[2]
    finally:  # Ctrl-C: nothing stays on a GPU
        for process, *_ in running.values():
            kill(process)
    return failed


def main(only: Annotated[list[str], typer.Option(help="jobs whose names contain this (repeat for several)")] = [],
         folder: Annotated[Path, typer.Option(help="copies, logs, what is done")] = BENCH.parent / "results" / "logs" / "bench",
         gpus: Annotated[int | None, typer.Option(min=1, help="use so many (default: all)")] = None,
         show: Annotated[bool, typer.Option("--list", help="only print the jobs")] = False) -> None:
    """Runs the jobs that are not done yet. Exit status: 1 if one failed, 2 if nothing can run."""
    chosen = {name: job for name, job in JOBS.items() if not only or any(part in name for part in only)}
    done = {name for name in chosen if (folder / f"{name}.done").exists()}
    if show or not chosen:
        print(*(f"{name:16} {job.gpus} GPU(s)  {'done' if name in done else 'open'}  python bench/{job.words}" for name, job in chosen.items()), sep="\n")
        raise SystemExit(0 if chosen else 2)
    from cs336_alignment.vllm_engine import visible_gpus
    there = visible_gpus()[:gpus]
    if not there:
        typer.echo("error: no GPU here; each bench has a smoke test without one: --small --out FILE", err=True)
        raise SystemExit(2)
    folder.mkdir(parents=True, exist_ok=True)
    small = {name: f"needs {job.gpus} GPUs, {len(there)} are used" for name, job in chosen.items() if job.gpus > len(there) and name not in done}
    failed = small | run_all({n: j for n, j in chosen.items() if n not in done | small.keys()}, there, folder, STORED)
    print(*(f"not done: {name}, {why}" for name, why in failed.items()), sep="\n")
    raise SystemExit(int(bool(failed)))


if __name__ == "__main__":
    sys.path.insert(0, str(BENCH.parent))
    typer.run(main)
