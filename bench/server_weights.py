"""New weights for a vLLM server (E9a): does it sample with them, and how long do they take?

    python bench/server_weights.py                        # two GPUs: the server on the first, the trainer on the second, NCCL
    python bench/server_weights.py --server URL           # a server that runs already, on another machine
    python bench/server_weights.py --small --out FILE     # a smoke test on vLLM's CPU build, over gloo

A policy's weights are changed and sent. An engine of this process gets the same weights; greedy tokens and log-probs of both are compared.
On a GPU bfloat16 rounds by batch, and a token may flip: the gap between log-probs must be a tenth of what it was before the transfer, or less.
Exit status 1: it is not.
Without two GPUs nothing is measured: refused with exit code 2.
"""
import argparse
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results/bench/server_weights.json"


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="smollm2-135m")
    ap.add_argument("--server", help="http://HOST:PORT of a server of this model that runs already")
    ap.add_argument("--prompts", type=int, default=256)
    ap.add_argument("--max-tokens", type=int, default=128)
    ap.add_argument("--repeats", type=int, default=10, help="transfers that are timed")
    ap.add_argument("--out", type=Path, default=PUBLISHED)
    ap.add_argument("--small", action="store_true", help="the micro model, a few tokens")
    if "--small" in argv:
        ap.set_defaults(model="micro", prompts=16, max_tokens=32, repeats=2)
    return ap.parse_args(argv)


OPTIONS = parse(sys.argv[1:]) if __name__ == "__main__" else None  # before the slow imports: --help answers at once
sys.path.insert(0, str(ROOT))
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

import torch

from cs336_alignment.cli import bench_refusal
from cs336_alignment.data import fill_prompt, load_prompt, micro_problems
from cs336_alignment.inference import SamplingParams, named_weights
from cs336_alignment.models import load_policy
from cs336_alignment.runs import environment
from cs336_alignment.vllm_engine import make_engine, visible_gpus
from cs336_alignment.vllm_server import ServerEngine, ServerError, look_at, serve_command


@contextlib.contextmanager
def running_server(options, gpus: list[str]):
    """The address of the server: the one that was named, or one started here on the first GPU."""
    if options.server:
        yield options.server
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    more = ["--gpu-memory-utilization", "0.5"] if gpus else ["--enforce-eager", "--max-num-seqs", "32"]
    words = serve_command(options.model, *more, port=port, backend="nccl" if gpus else "gloo")
    own = {"CUDA_VISIBLE_DEVICES": gpus[0] if gpus else "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(words, env=os.environ | own, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                with contextlib.suppress(ServerError):
                    look_at(f"http://127.0.0.1:{port}")
                    break
                time.sleep(1)
            if process.poll() is not None:
                raise RuntimeError("the server did not start:\n" + Path(log.name).read_text()[-3000:])
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def timed(work, repeats: int = 1) -> tuple[float, object]:
    """Median seconds of `work()`, and what it returned last."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def change(policy) -> None:
    """Adds noise of a fifth of its spread to each weight."""
    noise = torch.Generator(policy.device).manual_seed(0)
    with torch.no_grad():
        for _, w in named_weights(policy):
            w += 0.2 * w.std() * torch.randn(w.shape, generator=noise, device=w.device)


def agreement(ours, theirs) -> dict:
    """How far two engines' greedy responses are the same: the share of equal ones, and the gap between log-probs (nats)
    of tokens before the first that differs."""
    pairs = [(a, b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True)]
    common = lambda a, b: next((k for k, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), min(len(a.token_ids), len(b.token_ids)))
    gaps = [abs(x - y) for a, b in pairs for x, y in zip(a.logprobs[:common(a, b)], b.logprobs)]
    return {"equal_responses": statistics.fmean(a.token_ids == b.token_ids for a, b in pairs), "tokens_compared": len(gaps),
            "gap_mean": statistics.fmean(gaps or [math.inf]), "gap_max": max(gaps, default=math.inf)}


def measure(options, gpus: list[str]) -> dict:
    prompts = [fill_prompt(load_prompt("micro" if options.model == "micro" else "r1_zero"), p.question)
               for p in micro_problems(options.prompts, seed=1, split="test")]
    greedy = SamplingParams(temperature=0, max_tokens=options.max_tokens, stop=())
    sample = lambda engine: engine.generate(prompts, greedy, progress=False)
    policy, _ = load_policy(options.model, dtype="float32")
    change(policy)
    with running_server(options, gpus) as url, ServerEngine(options.model, [url]) as far:
        before = sample(far)
        first, _ = timed(lambda: far.load_weights(policy))
        transfer, _ = timed(lambda: far.load_weights(policy), options.repeats)
        far_s, there = timed(lambda: sample(far))
        server = far.backend.servers[0]
    local = dict(gpu_memory_utilization=0.3) if gpus else dict(enforce_eager=True, max_num_seqs=32)
    with make_engine(options.model, "vllm", dtype=server.dtype, verbose=False, **local) as near:
        near.load_weights(policy)
        reload, _ = timed(lambda: near.load_weights(policy), options.repeats)
        near_s, here = timed(lambda: sample(near))
    sent = sum(w.numel() for _, w in named_weights(policy)) * getattr(torch, server.dtype).itemsize
    return {"options": {k: str(v) for k, v in vars(options).items()}, "environment": environment(), "backend": server.backend,
            "vllm": server.version, "bytes": sent, "first_transfer_s": first, "transfer_s": transfer, "local_reload_s": reload,
            "rollout_s": {"server": far_s, "local": near_s}, "after": agreement(there, here), "before": agreement(before, here)}


def main() -> int:
    gpus = visible_gpus()
    if problem := bench_refusal(OPTIONS.small, OPTIONS.out, PUBLISHED, len(gpus) > (0 if OPTIONS.server else 1)):
        print(f"server_weights: {problem}", file=sys.stderr)
        return 2
    if len(gpus) > 1 and not OPTIONS.server:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[1]  # before CUDA starts here
    result = measure(OPTIONS, gpus)
    OPTIONS.out.parent.mkdir(parents=True, exist_ok=True)
    OPTIONS.out.write_text(json.dumps(result, indent=1) + "\n")
    after, before = result["after"], result["before"]
    print(f"{result['bytes'] / 1e6:.1f} MB over {result['backend']}: {result['transfer_s']:.3f} s (the first time {result['first_transfer_s']:.2f} s)")
    print(f"after it: {after}\nbefore it: {before}")
    if after["gap_mean"] > 0.1 * before["gap_mean"]:
        print("FAILED: the server does not sample with the weights that were sent", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
