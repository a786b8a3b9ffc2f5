"""Strong scaling of a GRPO step: the same responses on 1, 2 and 4 GPUs of this machine, with the seconds of each phase (E9).

    python bench/scaling.py                                       # both shapes; about ten minutes on four GPUs
    python bench/scaling.py --only course --gpus 1,2,4,8
    python bench/scaling.py --small --out small.json  # a smoke test on any machine: CPUs, gloo, 1 and 2 processes

The settings are those of bench/grpo_step.py: 256 responses (32 questions, groups of 8) of full length, one update, 100% and 40% of
the groups with an advantage. Each number of GPUs is a job of its own, under `accelerate launch`; per job one step warms up, the
fastest of `--steps` counts, in the process that took longest. Rewards are random; grading is not part of the step."""
import json
import sys
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


def setting(name: str, small: bool, folder: Path):
    """(configuration, build(dtype), the engine's model, its tokenizer, problems, engine options, tokens a pass)."""
    import random
    from dataclasses import replace

    import torch
    from training_throughput import QWEN_1_5B
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from cs336_alignment.data import Problem, load_problems
    from cs336_alignment.distributed import on_rank_zero
    from cs336_alignment.models import load_policy
    n, group = (16, 4) if small else (256, 8)
    numbered = lambda problems: [replace(p, ground_truth=str(i)) for i, p in enumerate(problems)]
    if name == "pocket":
        model, data, prompt, tokens = ("micro", "micro", "micro", 12) if small else ("smollm2-135m", "gsm_symbolic", "r1_zero", 256)
        return (grpo_step.settings(small, n, group, tokens, prompt), lambda dtype: load_policy(model, dtype=dtype)[0], model,
                load_policy(model)[1], numbered(load_problems(data, "train", n=n // group)), {"gpu_memory_utilization": 0.2},
                500 if small else 32_768)
    shape, length, tokens = (grpo_step.TINY, 10, 16) if small else (QWEN_1_5B, 150, 1024)
    rng = random.Random(0)
    problems = [Problem(" ".join(f"t{i}" for i in rng.choices(range(3, 90), k=length)), "0") for _ in range(n // group)]

    def build(dtype):
        torch.manual_seed(0)
        with torch.device("cuda" if grpo_step.on_gpu() else "cpu"):
            return Qwen2ForCausalLM(Qwen2Config(**shape)).to(dtype)

    def save():
        grpo_step.save_random_weights(build, shape["vocab_size"], str(folder))
        (folder / "bare.prompt").write_text("{question}")

    on_rank_zero(save)
    options = {"gpu_memory_utilization": 0.19, "max_model_len": length + tokens + 106}
    return (grpo_step.settings(small, n, group, tokens, f"{folder}/bare.prompt"), build, str(folder),
            grpo_step.word_tokenizer(shape["vocab_size"]), numbered(problems), options, 500 if small else 4 * 1173)


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


def job(name: str, small: bool, replicas: int, steps: int, vllm: dict, folder: Path, out: Path) -> None:
    """Measures one shape with as many processes as there are; process 0 writes its rows."""
    from cs336_alignment.distributed import joined, on_rank_zero, processes
    with joined():  # before anything looks at the GPUs
        import torch

        from cs336_alignment.packing import compile_policy
        from cs336_alignment.side_by_side import ENGINE
        config, build, model, tokenizer, problems, options, pass_tokens = setting(name, small, folder)
        rows = []
        with grpo_step.start_engine(model, tokenizer, replicas, config.rollout_batch_size, options | ENGINE | vllm) as engine:
            for share in (1.0, 0.4):
                policy = build(torch.float32)
                if grpo_step.on_gpu():
                    compile_policy(policy)
                row = grpo_step.measure(f"{name}, {processes()} process(es), {share:.0%} mixed groups",
                                        stepper(config, policy, engine, problems, share, pass_tokens), steps)
                trained = row["phases_s"].pop("share_trained")
                rows.append({"shape": name, "processes": processes(), "mixed_groups": share, "share_trained": trained} | row)
                del policy
                grpo_step.free()
        on_rank_zero(lambda: out.write_text(json.dumps(rows)) and None)


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


def main(out: Path = STORED, small: bool = False, steps: int = 3, replicas: Annotated[int, typer.Option(help="engines a GPU")] = 2,
         only: Annotated[str, typer.Option(help="pocket or course; default both")] = "",
         gpus: Annotated[str, typer.Option(help="how many, as 1,2,4; default those there are")] = "",
         vllm: Annotated[dict, typer.Option(parser=json.loads, help="more options for vLLM, as JSON")] = "{}",
         folder: Annotated[Path | None, typer.Option(hidden=True)] = None) -> None:
    """Measures, prints a table and writes JSON after each job, so that a stopped run leaves those before."""
    if only not in ("", "pocket", "course"):
        grpo_step.refuse(f"--only is pocket or course, not {only!r}")
    if folder:  # in a job
        return job(only, small, replicas, steps, vllm, folder, out)
    if not all(n.isdigit() and int(n) for n in filter(None, gpus.split(","))):
        grpo_step.refuse(f"--gpus takes numbers, as 1,2,4, not {gpus!r}")
    from cs336_alignment.cli import bench_refusal
    if problem := bench_refusal(small, out, STORED, grpo_step.on_gpu()):
        grpo_step.refuse(problem)
    import torch
    there = torch.cuda.device_count() or 2
    numbers = [int(n) for n in gpus.split(",")] if gpus else [n for n in (1, 2, 4, 8) if n <= there]
    if grpo_step.on_gpu() and max(numbers) > there:
        grpo_step.refuse(f"--gpus {gpus}, but there are {there}")
    sys.exit(measure_all(out, small, steps, replicas, [only] if only else ["pocket", "course"], numbers, vllm))


def measure_all(out: Path, small: bool, steps: int, replicas: int, shapes: list[str], numbers: list[int], vllm: dict) -> int:
    """All jobs, one after the other; the exit status, 1 if one failed. A shape that is not measured keeps its rows."""
    import platform
    import tempfile
    import time

    import torch
    import transformers

    from cs336_alignment.vllm_engine import multi_process_service, vllm_version
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    rows, failed = [r for r in rows if r["shape"] not in shapes], []
    about = {"gpu": torch.cuda.get_device_name() if grpo_step.on_gpu() else f"{platform.machine()} CPU", "torch": torch.__version__,
             "transformers": transformers.__version__, "vllm": vllm_version(), "small": small, "engines_a_gpu": replicas}
    with multi_process_service():
        for shape in shapes:
            for n in numbers:
                with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
                    part = Path(folder) / "rows.json"
                    options = ["--only", shape, "--folder", folder, "--out", str(part), "--steps", str(steps), "--replicas",
                               str(replicas), "--vllm", json.dumps(vllm), *(["--small"] if small else [])]
                    if start(n, options) or not part.exists():
                        failed.append(f"{shape} on {n}")
                        continue
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
