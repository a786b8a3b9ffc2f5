"""Strong scaling of a GRPO step: as many responses on 1, 2 and 4 GPUs of this machine, with the seconds of each phase (E9).

    python bench/scaling.py                                       # both shapes; about ten minutes on four GPUs
    python bench/scaling.py --only course --gpus 1,2,4,8
    python bench/scaling.py --small --out small.json  # a smoke test on any machine: CPUs, gloo, 1 and 2 processes

The settings are those of bench/grpo_step.py: 256 responses (32 questions, groups of 8) of full length, one update, 100% and 40% of
the groups with an advantage. Each number of GPUs is a job of its own, under `accelerate launch`; per job one step warms up, the
fastest of `--steps` counts, in the process that took longest. Rewards are random; grading is not part of the step."""
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import grpo_step  # the bench beside this one: its settings and its engine of full-length responses

STORED = Path(__file__).resolve().parent.parent / "results" / "bench" / "scaling.json"


# --- one job: all processes run this

class RewardsByText:
    """Random rewards that are the same whichever process grades: half of the responses of a mixed group are right.

    A question's ground truth is its number; the first `share` of the groups are mixed, the others all wrong."""

    def __init__(self, groups: int, share: float):
        self.mixed = round(share * groups)

    def __call__(self, response: str, truth: str) -> dict[str, float]:
        from zlib import crc32
        right = float(int(truth) < self.mixed and crc32(response.encode()) % 2)
        return {"format_reward": right, "answer_reward": right, "reward": right}


def stepper(config, policy, engine, problems, share: float, pass_tokens: int):
    """A function that makes a GRPO step and returns its seconds by phase, the longest of all processes."""
    from itertools import count
    from unittest import mock

    from cs336_alignment import grpo
    from cs336_alignment.distributed import everyones
    from cs336_alignment.packing import make_optimizer
    timed_engine, optimizer, number = grpo_step.FullLength(engine), make_optimizer(policy, config.learning_rate), count(1)
    rewards = RewardsByText(len(problems), share)

    def step() -> dict[str, float]:
        timed_engine.seconds.clear()
        k = next(number)
        completions, truths = grpo.sample_rollouts(config, timed_engine, problems, k)
        with mock.patch.object(grpo, "reward_fn_of", lambda prompt: rewards):
            line = grpo.grpo_step(config, policy, optimizer, completions, truths, k, pass_tokens=pass_tokens)
        timed_engine.load_weights(policy)
        own = {phase: (line | timed_engine.seconds)[f"s_{phase}"] for phase in ("rollout", "reward", "old", "update", "sync")}
        return {phase: max(other[phase] for other in everyones(own)) for phase in own} | {"share_trained": line["share_trained"]}

    return step


def job(name: str, small: bool, engine: str, replicas: int, steps: int, out: Path) -> None:
    """Measures one shape with as many processes as there are; process 0 writes its rows."""
    from cs336_alignment.distributed import joined, on_rank_zero, processes
    with joined(), grpo_step.workload(name, small) as work:  # joined before anything looks at the GPUs
        import torch

        from cs336_alignment.packing import compile_policy
        config, rows = work["config"], []
        problems = [replace(p, ground_truth=str(i)) for i, p in enumerate(work["problems"])]
        with start_engine(engine, work, replicas) as e:
            for share in (1.0, 0.4):
                policy = work["build"](torch.float32)
                if grpo_step.on_gpu():
                    compile_policy(policy)
                row = grpo_step.measure(f"ours, {name}, {processes()} process(es), {share:.0%} mixed groups",
                                        stepper(config, policy, e, problems, share, work["pass_tokens"]), steps, work, share)
                row["update_mfu"] /= processes()  # of all GPUs
                trained = row["phases_s"].pop("share_trained")
                rows.append({"shape": name, "processes": processes(), "mixed_groups": share, "share_trained": trained} | row)
                del policy
                grpo_step.free()
        on_rank_zero(lambda: out.write_text(json.dumps(rows)) and None)


def start_engine(kind: str, work: dict, replicas: int):
    """An engine of this process: the static one, or vLLM's replicas."""
    from cs336_alignment.side_by_side import ENGINE
    if kind == "static":
        return grpo_step.static_engine(work)
    options = {"gpu_memory_utilization": 0.2, "max_model_len": work["context"]} | ENGINE
    return grpo_step.start_engine(work["model"], work["tokenizer"], replicas, work["n"], options)


# --- the command: a job for each shape and number

def start(n: int, arguments: list[str]) -> int:
    """One job on n GPUs; its exit status."""
    import os
    import subprocess
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", str(n)] if n > 1 else []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(i) for i in range(n)]
    alone = {} if seen == "" else {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:n])}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // n))}
    return subprocess.call([sys.executable, *launcher, __file__, *arguments], env=threads | os.environ | alone)


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Each row with its speed-up over one process, divided by the processes; None without a row of one."""
    one = {(r["shape"], r["mixed_groups"]): r["step_s"] for r in rows if r["processes"] == 1}
    base = lambda r: one.get((r["shape"], r["mixed_groups"]))
    return [r | {"efficiency": base(r) and base(r) / r["step_s"] / r["processes"]} for r in rows]


def main(out: Path = STORED, small: bool = False, steps: int = 3,
         engine: Annotated[str, typer.Option(help="static or vllm")] = "static",
         replicas: Annotated[int, typer.Option(help="vLLM engines a GPU")] = 2,
         only: Annotated[str, typer.Option(help="pocket or course; default both")] = "",
         gpus: Annotated[str, typer.Option(help="how many, as 1,2,4; default those there are")] = "",
         here: Annotated[bool, typer.Option(help="in a job", hidden=True)] = False) -> None:
    """Measures, prints a table and writes JSON after each job, so that a stopped run leaves those before."""
    if only not in ("", "pocket", "course"):
        grpo_step.refuse(f"--only is pocket or course, not {only!r}")
    if engine not in ("static", "vllm"):
        grpo_step.refuse(f"--engine is static or vllm, not {engine!r}")
    if here:
        return job(only, small, engine, replicas, steps, out)
    if not all(n.isdigit() and int(n) for n in gpus.split(",") if gpus):
        grpo_step.refuse(f"--gpus takes numbers, as 1,2,4, not {gpus!r}")
    from cs336_alignment.cli import bench_refusal
    if problem := bench_refusal(small, out, STORED, grpo_step.on_gpu()):
        grpo_step.refuse(problem)
    import torch
    there = torch.cuda.device_count() or 2
    numbers = [int(n) for n in gpus.split(",")] if gpus else [n for n in (1, 2, 4, 8) if n <= there]
    if grpo_step.on_gpu() and max(numbers) > there:
        grpo_step.refuse(f"--gpus {gpus}, but there are {there}")
    sys.exit(measure_all(out, small, steps, engine, replicas, [only] if only else ["pocket", "course"], numbers))


def measure_all(out: Path, small: bool, steps: int, engine: str, replicas: int, shapes: list[str], numbers: list[int]) -> int:
    """All jobs, one after the other; the exit status, 1 if one failed. A shape that is not measured keeps its rows."""
    import platform
    import tempfile
    import time

    import torch
    import transformers

    from cs336_alignment.runs import environment
    from cs336_alignment.vllm_engine import multi_process_service, vllm_version
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    rows, failed = [r for r in rows if r["shape"] not in shapes or r["processes"] not in numbers], []
    about = {"gpu": torch.cuda.get_device_name() if grpo_step.on_gpu() else f"{platform.machine()} CPU", "torch": torch.__version__,
             "transformers": transformers.__version__, "vllm": vllm_version(), "small": small, "engine": engine, "commit": environment()["commit"]}
    if engine == "vllm":
        about["engines_a_gpu"] = replicas
    with multi_process_service() if engine == "vllm" else nullcontext():
        for shape in shapes:
            for n in numbers:
                with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
                    part = Path(folder) / "rows.json"
                    options = ["--here", "--only", shape, "--out", str(part), "--steps", str(steps), "--engine", engine,
                               "--replicas", str(replicas), *(["--small"] if small else [])]
                    if start(n, options) or not part.exists():
                        failed.append(f"{shape} on {n}")
                    else:
                        rows += json.loads(part.read_text())
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(about | {"date": time.strftime("%Y-%m-%d"), "rows": with_efficiency(rows), "failed": failed},
                                          indent=1) + "\n")
    for r in with_efficiency(rows):
        print(f"{r['shape']:8}{r['processes']:3} process(es), {r['mixed_groups']:.0%} mixed: {r['step_s']:7.2f} s"
              + (f", efficiency {r['efficiency']:.0%}" if r["efficiency"] else ""))
    print(*(f"failed: {name}" for name in failed), f"written: {out}", sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    typer.run(main)
