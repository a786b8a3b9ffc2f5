"""One GRPO step: the handout's loop written literally against `grpo_step`'s parts, both in one process.

    python bench/grpo_step.py                      # one GPU, about six minutes
    python bench/grpo_step.py --only pocket        # 135M parameters, answers of up to 256 tokens, about two minutes
    python bench/grpo_step.py --small              # a smoke test on any machine, under a minute

Both sides sample 256 answers (32 questions, groups of 8) and make one update (reinforce_with_baseline, masked_mean).
The literal side has one engine, the first of ours; bfloat16 weights, as the handout loads them; padded micro-batches of 2 with float32
logits and entropies at every position (`get_response_log_probs`, `grpo_microbatch_train_step`), for all 256 answers.
Our side: the fastest number of engines up to `--replicas` (course: two), float32 weights, packed rows, compiled layers
on a GPU, answers without an advantage dropped. The same on both sides: rewards are random (a grader would be fed noise
here), so that the share of answers with a non-zero advantage is known, all or 40%; and answers have the full length
(ignore_eos). The fastest of a few steps counts, after one to warm up; all are kept (`step_s_all`).

Where all 128 micro-batches would take long, a part of them is measured and scaled (`literal_share` in the result).
Peak memory: the trainer's (torch's max_memory_allocated) and the whole GPU's (nvidia-smi, with the engines' reserved
caches).
"""

import gc
import json
import math
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cs336_alignment import grpo as G
from cs336_alignment.data import fill_prompt, load_problems, load_prompt
from cs336_alignment.grpo_helper import grpo_microbatch_train_step
from cs336_alignment.inference import Completion, SamplingParams
from cs336_alignment.packing import compile_policy, make_optimizer
from cs336_alignment.sft_helper import get_response_log_probs
from cs336_alignment.vllm_engine import make_engine, multi_process_service, vllm_problem
from cs336_alignment.run_queue import ENGINE
from training_throughput import DEVICE, QWEN_1_5B, synchronize

TINY = dict(vocab_size=99, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True)


# --- measuring

@contextmanager
def phase(seconds: dict[str, float], name: str):
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds[name] += time.perf_counter() - start


class WholeGPU:
    """Watches nvidia-smi's used memory of the first GPU in a thread; `peak` in GB (0 without a GPU)."""

    def __enter__(self):
        self.peak, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        while DEVICE == "cuda" and not self.ended.wait(0.5):
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
                self.peak = max(self.peak, float(answer[0]) * 2**20 / 1e9)
            except (OSError, subprocess.SubprocessError, ValueError, IndexError):
                return

    def __exit__(self, *exc):
        self.ended.set()
        self.thread.join()


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_rewards(n: int, group: int, share: float) -> torch.Tensor:
    """Rewards such that `share` of the groups is mixed (half right), the others all wrong."""
    mixed = round(share * n / group)
    return torch.tensor([float(g < mixed and i < group // 2) for g in range(n // group) for i in range(group)])


# --- the two sides

def literal_update(policy: PreTrainedModel, completions: list[Completion], advantages, share: float) -> float:
    """The handout's micro-batches of 2, `share` of them; returns by what their time has to be multiplied."""
    total = len(completions) // 2
    measured = max(1, round(share * total))
    for k in range(measured):
        rows = [2 * k, 2 * k + 1]
        width = max(len(completions[i].prompt_token_ids) + len(completions[i].token_ids) for i in rows)
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.bool)
        for r, i in enumerate(rows):
            prompt, answer = completions[i].prompt_token_ids, completions[i].token_ids
            ids[r, :len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            mask[r, len(prompt):len(prompt) + len(answer)] = True
        ids, mask = ids.to(DEVICE), mask.to(DEVICE)
        lp = get_response_log_probs(policy, ids[:, :-1], ids[:, 1:], return_token_entropy=True)["log_probs"]
        grpo_microbatch_train_step(lp, mask[:, 1:], total, "reinforce_with_baseline",
                                   advantages=advantages[rows, None].to(DEVICE))
    return total / measured


def literal_step(policy, optimizer, engine, prompts, sampling, advantages, share: float) -> dict[str, float]:
    seconds = defaultdict(float)
    with phase(seconds, "rollout"):
        completions = [c for group in engine.generate(prompts, sampling, progress=False) for c in group]
    with phase(seconds, "update"):
        scale = literal_update(policy, completions, advantages, share)
    seconds["update"] *= scale
    with phase(seconds, "optimizer"):
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with phase(seconds, "sync"):
        engine.load_weights(policy)
    return dict(seconds)


def our_step(policy, optimizer, engine, prompts, sampling, advantages, config, pass_tokens: int) -> dict[str, float]:
    seconds = defaultdict(float)
    with phase(seconds, "rollout"):
        completions = [c for group in engine.generate(prompts, sampling, progress=False) for c in group]
    with phase(seconds, "update"):
        examples = {i: e for i, e in enumerate(G.rollout_examples(completions, advantages))
                    if G.has_gradient(config, completions[i], e.side["advantage"])}
        lengths = [len(c.token_ids) for c in completions]
        list(G.updates(config, policy, optimizer, examples, lengths, 1, pass_tokens))
    with phase(seconds, "sync"):
        engine.load_weights(policy)
    return dict(seconds)


def measure(name: str, step, n: int) -> dict:
    """One warm-up step and `n` timed ones: per phase the seconds of the fastest step, and its total."""
    start = time.perf_counter()
    step()
    first, runs = time.perf_counter() - start, []
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with WholeGPU() as gpu:
        for _ in range(n):
            runs.append(step())
    best = min(runs, key=lambda s: sum(s.values()))
    row = {"variant": name, "step_s": sum(best.values()), "phases_s": best, "first_step_s": first,
           "step_s_all": [sum(r.values()) for r in runs]}
    if DEVICE == "cuda":
        row |= {"trainer_peak_gb": torch.cuda.max_memory_allocated() / 1e9, "gpu_peak_gb": gpu.peak}
    phases = "  ".join(f"{k} {v:.2f}" for k, v in best.items())
    print(f"{name:52} {row['step_s']:8.2f} s  ({phases})  trainer {row.get('trainer_peak_gb', 0):.1f} GB, "
          f"GPU {row.get('gpu_peak_gb', 0):.1f} GB", flush=True)
    return row


# --- the two settings

def rollout_seconds(engine, prompts, sampling, repeats: int) -> dict[int, float]:
    """Seconds of one rollout batch with 1, 2, … of the engine's replicas at work; it is left with the fastest number."""
    team, seconds = engine.backend.replicas, {}
    for k in range(1, len(team) + 1):
        engine.backend.replicas, turns = team[:k], []
        for _ in range(1 + repeats):  # the first warms up
            start = time.perf_counter()
            engine.generate(prompts, sampling, progress=False)
            turns.append(time.perf_counter() - start)
        seconds[k] = min(turns[1:])
        print(f"rollouts with {k} engine(s): {seconds[k]:.2f} s", flush=True)
    engine.backend.replicas = team[:min(seconds, key=seconds.get)]
    return seconds


def compare(build, model_name, prompts, max_tokens: int, replicas: int, options: dict, literal_share: float,
            pass_tokens: int, steps: int, n: int, group: int, save, try_teams: bool) -> None:
    """Literal loop, with one of the engines; then ours with all, 100% and 40% of the answers having an advantage.

    `build(dtype)` makes the policy. `save` takes the result after each. `try_teams`: with the best number of engines."""
    config = replace(G.grpo_config("pocket"), rollout_batch_size=n, train_batch_size=n, group_size=group,
                     gradient_accumulation_steps=n // 2, max_tokens=max_tokens)
    sampling = SamplingParams(n=group, max_tokens=max_tokens, stop=(), ignore_eos=True, logprobs=None)
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    advantages = {share: G.compute_advantages(config, random_rewards(n, group, share))[0] for share in (1.0, 0.4)}
    result = {"rollouts": n, "group_size": group, "prompts": len(prompts), "response_tokens": max_tokens, "literal_share": literal_share,
              "rollout_s_by_engines": {}, "pass_tokens": pass_tokens, "engine_options": options, "variants": []}

    def attempt(name: str, measured) -> None:  # after an error the others still run
        try:
            row = measured()
        except Exception as error:
            traceback.print_exc()
            row = {"variant": name, "error": f"{type(error).__name__}: {error}"[:2000]}
        result["variants"].append(row)
        save(result | {"speedups": speedups(result["variants"])})
        free()

    def literal(e) -> dict:
        policy = build(half)
        optimizer = make_optimizer(policy, 1e-6)
        return measure("literal: one engine, padded pairs", lambda: literal_step(
            policy, optimizer, e, prompts, sampling, advantages[1.0], literal_share), max(1, steps - 1))

    def ours(e, share: float) -> dict:
        policy = build(torch.float32)
        if DEVICE == "cuda":
            compile_policy(policy)
        optimizer = make_optimizer(policy, 1e-6)
        return measure(f"ours, {share:.0%} with an advantage", lambda: our_step(
            policy, optimizer, e, prompts, sampling, advantages[share], config, pass_tokens), steps)

    with start_engine(model_name, replicas, n, options) as e:
        e.load_weights(build(half))  # all the engines, before one works alone: it shares the memory for weights with them
        with one_at_work(e):
            attempt("literal", lambda: literal(e))
        if try_teams and not vllm_problem():
            result["rollout_s_by_engines"] = rollout_seconds(e, prompts, sampling, steps - 1)
        for share in advantages:
            attempt(f"ours, {share:.0%}", lambda: ours(e, share))


def start_engine(model_name: str, replicas: int, batch_size: int, options: dict):
    """vLLM's replicas where it can run, else transformers in this process."""
    if vllm_problem():
        return make_engine(model_name, kind="transformers", batch_size=batch_size)
    return make_engine(model_name, kind="vllm", replicas=replicas, in_process=False, **options)


@contextmanager
def one_at_work(engine):
    """Within it only the first of the engine's replicas works."""
    backend = getattr(engine, "backend", None)
    team = getattr(backend, "replicas", None)
    if team:
        backend.replicas = team[:1]
    try:
        yield
    finally:
        if team:
            backend.replicas = team


def speedups(rows: list[dict]) -> dict[str, float]:
    """How many times faster than the literal loop each of our variants is; {} if that failed."""
    literal = rows[0].get("step_s", math.nan)
    return {r["variant"]: literal / r["step_s"] for r in rows[1:] if "step_s" in r and not math.isnan(literal)}


def pocket(small: bool, replicas: int, steps: int, vllm: dict, save) -> None:
    """SmolLM2-135M on GSM-Symbolic questions, answers of 256 tokens (--small: the micro model on sums, 12 tokens)."""
    model, data, prompt = ("micro", "micro", "micro") if small else ("smollm2-135m", "gsm_symbolic", "r1_zero")
    n, group, tokens, pass_tokens = (16, 4, 12, 500) if small else (256, 8, 256, 32_768)
    prompts = [fill_prompt(load_prompt(prompt), p.question) for p in load_problems(data, "train", n=n // group)]

    def build(dtype):
        return G.load_policy(model, device=DEVICE, dtype=dtype)[0]
    options = {"gpu_memory_utilization": 0.2} | ENGINE | vllm
    compare(build, model, prompts, tokens, replicas, options, 0.25, pass_tokens, steps, n, group, save, try_teams=True)


def course(small: bool, replicas: int, steps: int, vllm: dict, save) -> None:
    """The shape of Qwen2.5-Math-1.5B with random weights: prompts of 150 random tokens, answers of 1,024."""
    shape, rng = TINY if small else QWEN_1_5B, random.Random(0)
    n, group, length, tokens, pass_tokens = (16, 4, 10, 16, 500) if small else (256, 8, 150, 1024, 4 * 1173)
    prompts = [rng.choices(range(3, 90), k=length) for _ in range(n // group)]

    def build(dtype):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            return Qwen2ForCausalLM(Qwen2Config(**shape)).to(dtype)
    # of an H200's 151 GB 29 for two engines: either alone has room for all 256 sequences, or the literal loop's would queue
    options = {"gpu_memory_utilization": 0.19, "max_model_len": length + tokens + 106} | ENGINE | vllm
    with tempfile.TemporaryDirectory(prefix="grpo_step_") as folder:
        save_random_weights(build, shape["vocab_size"], folder)
        compare(build, folder, prompts, tokens, min(replicas, 2), options, 1 / 16, pass_tokens, min(steps, 2), n, group, save,
                try_teams=False)


def save_random_weights(build, vocab_size: int, folder: str) -> None:
    """A policy with random weights, for the engine; its tokenizer knows as many tokens."""
    build(torch.bfloat16).save_pretrained(folder)
    core = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    special = dict(unk_token="t0", eos_token="t1", pad_token="t2")
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    free()


def main(out: Path = Path("results/bench/grpo_step.json"), small: bool = False, steps: int = 3, replicas: int = 4,
         only: str = typer.Option("", help="pocket or course; default both"),
         vllm: Annotated[dict, typer.Option(parser=json.loads, help="more options for vLLM, as JSON")] = "{}",
         here: bool = typer.Option(False, help="in this process", hidden=True)) -> None:
    """Measures both settings, prints a table, writes JSON after each variant, so that a stopped run leaves those before."""
    if DEVICE == "cuda" and not here:  # trainer and engines share the GPU
        with multi_process_service():
            sys.exit(subprocess.call([sys.executable, *sys.argv, "--here"]))
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU"
    result = json.loads(out.read_text()) if out.exists() else {}  # with --only, the other setting is kept
    result |= {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__, "small": small,
               "rewards": "random: 100% or 40% of the groups are mixed; grading is not part of the step"}
    print(f"{gpu}, torch {torch.__version__}")
    for name, setting in {"pocket": pocket, "course": course}.items():
        if only in ("", name):
            start = time.perf_counter()
            result.pop(name, None)
            print(f"\n{name}: {setting.__doc__}", flush=True)

            def save(measured: dict) -> None:
                result[name] = measured | {"wall_s": time.perf_counter() - start}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
            try:
                setting(small, replicas, steps, vllm, save)
            except Exception as error:
                traceback.print_exc()
                save(result.get(name, {}) | {"error": f"{type(error).__name__}: {error}"})
            print({k: round(v, 2) for k, v in result[name].get("speedups", {}).items()})
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    typer.run(main)
