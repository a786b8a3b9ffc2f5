"""One GRPO step: `grpo_train_loop`, the handout's loop written literally (notebook 12), against `grpo_step`, both in one process.

    python bench/grpo_step.py                                   # one GPU, about eight minutes
    python bench/grpo_step.py --only pocket                     # 135M parameters, responses of 256 tokens
    python bench/grpo_step.py --trl                             # and TRL's trainer (trl_step.py), about 20 minutes in all
    python bench/grpo_step.py --only lean                       # the course shape as for a card with 24 GB; needs torchao
    python bench/grpo_step.py --small --out small.json  # a smoke test on any machine, under a minute

Both sides sample 256 responses (32 questions, groups of 8) and make one update (reinforce_with_baseline, masked_mean).
The literal side has one vLLM engine; bfloat16 weights, as the handout loads them; padded micro-batches of 2
with float32 logits at every position, for all 256 responses: nothing is scaled. Our side: the static engine (notebook E2a),
float32 weights, packed rows, compiled layers on a GPU, responses without an advantage dropped. `--replicas N` also times
rollouts with 1 to N vLLM engines, and our side with the fastest number (`with_vllm`). The same on both sides: rewards are random (a grader would be fed noise here), so that the share of responses with
a non-zero advantage is known, all or 40%; and responses have the full length (ignore_eos). The fastest of a few steps
counts, after one to warm up; all are kept (`step_s_all`). Peak memory: the trainer's (torch's max_memory_allocated) and the
whole GPU's (nvidia-smi, with the engines' reserved caches). `response_tokens_per_s`: sampled tokens over the step's seconds.
`update_mfu`: model FLOPs of the responses with an advantage (`model_flops` of training_throughput.py: no padding, no
recomputation, no second forward pass counts; of our rows a prompt once a group where they share it) over the update's seconds and the bfloat16 matrix rate measured here.
"""

import importlib.util
import json
import math
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

STORED = Path(__file__).resolve().parent.parent / "results" / "bench" / "grpo_step.json"
TINY = dict(vocab_size=99, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True)


# --- measuring

class WholeGPU:
    """Watches nvidia-smi's used memory of the first GPU in a thread; `peak` in GB (0 without a GPU)."""

    def __enter__(self):
        import threading
        self.peak, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        import subprocess

        from cs336_alignment.vllm_engine import visible_gpus
        first = (visible_gpus() or ["0"])[0]
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", first]
        while on_gpu() and not self.ended.wait(0.5):
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
                self.peak = max(self.peak, float(answer[0]) * 2**20 / 1e9)
            except (OSError, subprocess.SubprocessError, ValueError, IndexError):
                return

    def __exit__(self, *exc):
        self.ended.set()
        self.thread.join()


def on_gpu() -> bool:
    import torch
    return torch.cuda.is_available()


def free() -> None:
    import gc

    import torch
    gc.collect()
    torch._dynamo.reset()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class RandomRewards:
    """A reward function for responses in order: `share` of the groups is mixed (half right), the others all wrong."""

    def __init__(self, n: int, group: int, share: float):
        mixed = round(share * n / group)
        self.rewards = [float(g < mixed and i < group // 2) for g in range(n // group) for i in range(group)]
        self.calls = 0

    def __call__(self, response: str, truth: str) -> dict[str, float]:
        reward = self.rewards[self.calls % len(self.rewards)]
        self.calls += 1
        return {"format_reward": reward, "answer_reward": reward, "reward": reward}


class FullLength:
    """An engine whose responses all have the full length, and that notes the seconds of sampling and of new weights."""

    def __init__(self, engine):
        from collections import defaultdict
        self.engine, self.seconds = engine, defaultdict(float)

    def generate(self, prompts, sampling, progress=False):
        from dataclasses import replace

        from cs336_alignment.grpo import timed
        with timed(self.seconds, "rollout"):
            full = replace(sampling, stop=(), ignore_eos=True, min_tokens=0)
            return self.engine.generate(prompts, full, progress=False)

    def load_weights(self, policy):
        from cs336_alignment.grpo import timed
        with timed(self.seconds, "sync"):
            self.engine.load_weights(policy)


@cache
def matrix_rate() -> float:
    """FLOP/s of a bfloat16 matrix product on this device."""
    from training_throughput import matrix_peak
    return matrix_peak(8192 if on_gpu() else 256)


def step_flops(work: dict, shared: bool) -> float:
    """Model FLOPs of training on all responses of a step, once. shared: a group's prompt counts once."""
    import torch
    from training_throughput import model_flops
    from transformers import AutoConfig, AutoModelForCausalLM

    from cs336_alignment.packing import Example
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work["model"]))
    lengths = map(len, work["tokenizer"](work["prompts"], add_special_tokens=False).input_ids)
    examples = [Example([0] * k, [0] * work["tokens"]) for k in lengths for _ in range(work["group"])]
    again = [Example([*e.prompt_ids, 0], []) for i, e in enumerate(examples) if shared and i % work["group"]]
    return model_flops(model, examples, logits_everywhere=False) - model_flops(model, again, logits_everywhere=False)


def rates(work: dict, step_s: float, update_s: float, share: float, shared: bool = False) -> dict[str, float]:
    """Tokens a second over the step, and the MFU of an update on `share` of the responses (shared: see `step_flops`)."""
    return {"response_tokens_per_s": work["n"] * work["tokens"] / step_s,
            "update_mfu": share * step_flops(work, shared) / update_s / matrix_rate()}


def show_row(row: dict) -> None:
    """Prints a measured row."""
    phases = "  ".join(f"{k} {v:.2f}" for k, v in row["phases_s"].items())
    print(f"{row['variant']:52} {row['step_s']:8.2f} s  ({phases})  {row['response_tokens_per_s']:,.0f} tokens/s  "
          f"MFU {row['update_mfu']:.1%}  trainer {row.get('trainer_peak_gb', 0):.1f} GB, GPU {row.get('gpu_peak_gb', 0):.1f} GB",
          flush=True)


def measure(name: str, step, n: int, work: dict, share: float) -> dict:
    """One warm-up step and `n` timed ones; `step()` returns its seconds by phase. Per phase those of the fastest step."""
    import time

    import torch
    start = time.perf_counter()
    step()
    first, turns = time.perf_counter() - start, []
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    with WholeGPU() as gpu:
        for _ in range(n):
            start = time.perf_counter()
            phases = step()
            turns.append((time.perf_counter() - start, phases))
    best, phases = min(turns, key=lambda turn: turn[0])
    row = {"variant": name, "step_s": best, "phases_s": phases, "first_step_s": first, "step_s_all": [s for s, _ in turns]}
    from cs336_alignment.packing import SHARE_PROMPTS
    shared = name.startswith("ours") and SHARE_PROMPTS
    row |= rates(work, best, phases["update"], share, shared)
    if on_gpu():
        row |= {"trainer_peak_gb": torch.cuda.max_memory_allocated() / 1e9, "gpu_peak_gb": gpu.peak}
    show_row(row)
    return row


# --- the two sides

def literal_steps(config, policy, tokenizer, engine, problems):
    """A function that makes one step of the literal loop and returns its seconds by phase."""
    import time

    from cs336_alignment.grpo import grpo_train_loop
    timed_engine = FullLength(engine)
    rewards = RandomRewards(config.rollout_batch_size, config.group_size, 1.0)
    loop = grpo_train_loop(config, policy, tokenizer, timed_engine, problems, rewards)

    def step() -> dict[str, float]:
        timed_engine.seconds.clear()
        start = time.perf_counter()
        next(loop)
        rollout, sync = timed_engine.seconds["s_rollout"], timed_engine.seconds["s_sync"]
        return {"rollout": rollout, "update": time.perf_counter() - start - rollout - sync, "sync": sync}

    return step


def refined_steps(config, policy, engine, problems, share: float, pass_tokens: int, lean: bool = False):
    """The same for `grpo_step`, with `share` of the responses having an advantage. lean: as E7's lean runs do it."""
    from itertools import count
    from types import SimpleNamespace
    from unittest import mock

    from cs336_alignment import grpo
    from cs336_alignment.grpo_runs import asleep
    from cs336_alignment.packing import make_optimizer
    optimizer = make_optimizer(policy, config.learning_rate, state_bits=8 if lean else 32)
    timed_engine, number, state = FullLength(engine), count(1), SimpleNamespace(engine=engine, lean=lean)
    rewards = RandomRewards(config.rollout_batch_size, config.group_size, share)

    def step() -> dict[str, float]:
        timed_engine.seconds.clear()
        k = next(number)
        completions, truths = grpo.sample_rollouts(config, timed_engine, problems, k)
        with asleep(state, timed_engine.seconds), mock.patch.object(grpo, "reward_fn_of", lambda prompt: rewards):
            line = grpo.grpo_step(config, policy, optimizer, completions, truths, k, pass_tokens=pass_tokens)
        timed_engine.load_weights(policy)
        return {phase: (line | timed_engine.seconds)[f"s_{phase}"] for phase in ("rollout", "reward", "old", "update", "sync")}

    return step


def our_steps(work: dict, engine, share: float):
    """The same of a new policy, its layers compiled on a GPU."""
    import torch

    from cs336_alignment.packing import compile_policy
    policy = work["build"](torch.float32)
    if on_gpu():
        compile_policy(policy)
    return refined_steps(work["config"], policy, engine, work["problems"], share, work["pass_tokens"])


# --- engines

def static_engine(work: dict):
    """The project's own (notebook E2a), in half precision on a GPU."""
    import torch

    from cs336_alignment.vllm_engine import make_engine
    half = torch.bfloat16 if on_gpu() else torch.float32
    return make_engine(work["model"], kind="static", tokenizer=work["tokenizer"], dtype=half, verbose=False)


def start_engine(model_name: str, tokenizer, replicas: int, batch_size: int, options: dict):
    """vLLM's replicas where it can run, else transformers in this process.

    tokenizer: by name, transformers would take Qwen2's for random weights of that shape, whatever lies in their folder."""
    from cs336_alignment.vllm_engine import make_engine, vllm_problem
    if vllm_problem():
        return make_engine(model_name, kind="transformers", tokenizer=tokenizer, batch_size=batch_size)
    return make_engine(model_name, kind="vllm", tokenizer=tokenizer, replicas=replicas, in_process=False, **options)


class one_at_work:
    """Within it only the first of the engine's replicas works."""

    def __init__(self, engine):
        self.backend = getattr(engine, "backend", None)
        self.team = getattr(self.backend, "replicas", None)

    def __enter__(self):
        if self.team:
            self.backend.replicas = self.team[:1]

    def __exit__(self, *exc):
        if self.team:
            self.backend.replicas = self.team


def rollout_seconds(engine, prompts, sampling, repeats: int) -> dict[int, float]:
    """Seconds of one rollout batch with 1, 2, … of the engine's replicas at work; it is left with the fastest number."""
    import time
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


# --- the two settings

def compare(work: dict, replicas: int, options: dict, steps: int, save) -> None:
    """The literal loop, with a vLLM engine; then ours, with 100% and 40% of the responses having an advantage.

    `save` takes the result after each. replicas: if above 1, rollouts with so many vLLM engines, and our side with them."""
    import traceback

    import torch

    from cs336_alignment.inference import SamplingParams
    from cs336_alignment.vllm_engine import vllm_problem
    half, build = torch.bfloat16 if on_gpu() else torch.float32, work["build"]
    config, problems = work["config"], work["problems"]
    prompt_tokens = list(map(len, work["tokenizer"](work["prompts"], add_special_tokens=False).input_ids))
    result = {"rollouts": config.rollout_batch_size, "group_size": config.group_size, "response_tokens": config.max_tokens,
              "prompt_tokens": sum(prompt_tokens) / len(prompt_tokens), "pass_tokens": work["pass_tokens"], "engine_options": options,
              "vllm": vllm_number(),
              "matrix_tflops": matrix_rate() / 1e12, "variants": []}

    def attempt(name: str, make, n: int, share: float, rows=result["variants"]) -> None:  # after an error the others run
        try:
            row = measure(name, make(), n, work, share)
        except Exception as error:
            traceback.print_exc()
            row = {"variant": name, "error": f"{type(error).__name__}: {error}"[:2000]}
        rows.append(row)
        save(result | {"speedups": speedups(result["variants"])})
        free()

    with start_engine(work["model"], work["tokenizer"], replicas, config.rollout_batch_size, options) as e:
        e.load_weights(build(half))  # all the engines, before one works alone: it shares the memory for weights with them
        with one_at_work(e):
            attempt("literal: one engine, padded pairs",
                    lambda: literal_steps(config, build(half), work["tokenizer"], e, problems), max(1, steps - 1), 1.0)
        if replicas > 1 and not vllm_problem():
            sampling = SamplingParams(n=config.group_size, max_tokens=config.max_tokens, stop=(), ignore_eos=True, logprobs=None)
            result["with_vllm"] = {"rollout_s_by_engines": rollout_seconds(e, work["prompts"], sampling, steps - 1), "variants": []}
            for share in (1.0, 0.4):
                attempt(f"ours with vLLM, {share:.0%} with an advantage", lambda: our_steps(work, e, share), steps, share,
                        result["with_vllm"]["variants"])
    free()
    with static_engine(work) as e:
        for share in (1.0, 0.4):
            attempt(f"ours, {share:.0%} with an advantage", lambda: our_steps(work, e, share), steps, share)


def vllm_number() -> str | None:
    """vLLM's version, or None."""
    from cs336_alignment.vllm_engine import vllm_version
    return vllm_version()


def speedups(rows: list[dict]) -> dict[str, float]:
    """How many times faster than the literal loop each of our variants is; {} if that failed."""
    literal = rows[0].get("step_s", math.nan)
    return {r["variant"]: literal / r["step_s"] for r in rows[1:] if "step_s" in r and not math.isnan(literal)}


def settings(small: bool, n: int, group: int, max_tokens: int, prompt: str):
    """The configuration of both sides: no evaluation, so that no step computes log-probabilities that it does not need."""
    from cs336_alignment.grpo_settings import grpo_config
    return grpo_config("pocket", rollout_batch_size=n, train_batch_size=n, group_size=group, max_tokens=max_tokens,
                       gradient_accumulation_steps=n // 2, learning_rate=1e-6, prompt=prompt, min_tokens=0, eval_every=10**6,
                       n_grpo_steps=10**6)


@contextmanager
def workload(name: str, small: bool):
    """What all sides of a setting do: its model, questions and sizes; for as long as the block runs. In all processes the same."""
    import tempfile

    from cs336_alignment.data import fill_prompt, load_prompt
    from cs336_alignment.distributed import on_rank_zero
    with tempfile.TemporaryDirectory(prefix="grpo_step_") as own:
        folder = on_rank_zero(lambda: own)
        work = {"pocket": pocket_work, "course": course_work}[name](small, folder)
        config = settings(small, work["n"], work["group"], work["tokens"], work.pop("prompt"))
        template = load_prompt(config.prompt)
        yield {"gpu_memory_utilization": 0.3} | work | {
            "config": config, "prompts": [fill_prompt(template, p.question) for p in work["problems"]]}


def pocket_work(small: bool, folder: str) -> dict:
    from cs336_alignment.data import load_problems
    from cs336_alignment.models import load_policy, model_dir
    model, data, prompt = ("micro", "micro", "micro") if small else ("smollm2-135m", "gsm_symbolic", "r1_zero")
    n, group, tokens, pass_tokens = (16, 4, 12, 500) if small else (256, 8, 256, 65_536)
    return {"model": str(model_dir(model)), "build": lambda dtype: load_policy(model, dtype=dtype)[0],
            "tokenizer": load_policy(model)[1], "problems": load_problems(data, "train", n=n // group), "prompt": prompt,
            "n": n, "group": group, "tokens": tokens, "pass_tokens": pass_tokens, "context": None if small else 2048}


def course_work(small: bool, folder: str) -> dict:
    import random

    import torch
    from training_throughput import QWEN_1_5B  # the bench beside this one
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from cs336_alignment.data import Problem
    from cs336_alignment.distributed import on_rank_zero
    shape, rng = TINY if small else QWEN_1_5B, random.Random(0)
    n, group, length, tokens, pass_tokens = (16, 4, 10, 16, 500) if small else (256, 8, 150, 1024, 10 * 1173)
    problems = [Problem(" ".join(f"t{i}" for i in rng.choices(range(3, 90), k=length)), "0") for _ in range(n // group)]

    def build(dtype):
        torch.manual_seed(0)
        with torch.device("cuda" if on_gpu() else "cpu"):
            return Qwen2ForCausalLM(Qwen2Config(**shape)).to(dtype)

    on_rank_zero(lambda: save_random_weights(build, shape["vocab_size"], folder))
    return {"model": folder, "build": build, "tokenizer": word_tokenizer(shape["vocab_size"]), "problems": problems, "prompt": f"{folder}/bare.prompt",
            "n": n, "group": group, "tokens": tokens, "pass_tokens": pass_tokens, "context": length + tokens + 106}


def pocket(small: bool, replicas: int, steps: int, vllm: dict, save) -> None:
    """SmolLM2-135M on GSM-Symbolic questions, responses of 256 tokens (--small: the micro model on sums, 12 tokens)."""
    from cs336_alignment.side_by_side import ENGINE
    with workload("pocket", small) as work:
        compare(work, replicas, {"gpu_memory_utilization": 0.2} | ENGINE | vllm, steps, save)


def course(small: bool, replicas: int, steps: int, vllm: dict, save) -> None:
    """The shape of Qwen2.5-Math-1.5B with random weights: prompts of 150 random tokens, responses of 1,024."""
    from cs336_alignment.side_by_side import ENGINE
    with workload("course", small) as work:
        # 29 GB of an H200's 151: room for all 256 sequences, or the literal loop's would queue
        options = {"gpu_memory_utilization": 0.19, "max_model_len": work["context"]} | ENGINE | vllm
        compare(work, replicas, options, min(steps, 2), save)


LEAN_GB = 11.0  # what the lean setting lets its engine take: weights, working memory, keys and values of about 100 responses


def lean(small: bool, replicas: int, steps: int, vllm: dict, save) -> None:
    """The course shape as for a card with 24 GB: the engine asleep during updates, checkpointed, 8-bit states."""
    import torch

    from cs336_alignment.packing import checkpoint_activations, eight_bit_adamw
    eight_bit_adamw()
    gpu_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if on_gpu() else LEAN_GB
    with workload("course", small) as work:
        options = {"gpu_memory_utilization": LEAN_GB / gpu_gb, "max_model_len": work["context"], "max_num_seqs": 112,
                   "enable_sleep": True} | vllm
        result = {"rollouts": work["n"], "group_size": work["group"], "response_tokens": work["tokens"], "variants": [],
                  "pass_tokens": work["context"], "engine_options": options, "vllm": vllm_number()}
        with start_engine(work["model"], work["tokenizer"], 1, work["n"], options) as e:
            for share in (1.0, 0.4):
                policy = work["build"](torch.float32)
                checkpoint_activations(policy, compiled=on_gpu())
                e.load_weights(policy)
                step = refined_steps(work["config"], policy, e, work["problems"], share, 500 if small else work["context"], lean=True)
                name = f"ours, lean, {share:.0%} with an advantage"
                result["variants"].append(measure(name, step, min(steps, 2), work, share))
                save(result)
                del policy, step
                free()


def save_random_weights(build, vocab_size: int, folder: str) -> None:
    """A policy with random weights and a tokenizer, for the engine; and a prompt that is the question."""
    import torch
    build(torch.bfloat16).save_pretrained(folder)
    word_tokenizer(vocab_size).save_pretrained(folder)
    (Path(folder) / "bare.prompt").write_text("{question}")
    free()


def word_tokenizer(vocab_size: int):
    """A tokenizer with a word an id: three special ones, then t3, t4, … (t1 would be cut out of t12)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    special = dict(unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    words = [*special.values(), *(f"t{i}" for i in range(3, vocab_size))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def main(out: Path = STORED, small: bool = False, steps: int = 3,
         replicas: int = typer.Option(1, help="time rollouts with 1 to so many vLLM engines too"),
         only: str = typer.Option("", help="pocket, course or lean; default the first two"),
         trl: bool = typer.Option(False, "--trl", help="TRL's trainer too, after the others (trl_step.py)"),
         vllm: Annotated[dict, typer.Option(parser=json.loads, help="more options for vLLM, as JSON")] = "{}",
         here: bool = typer.Option(False, help="in this process", hidden=True)) -> None:
    """Measures both settings, prints a table, writes JSON after each variant, so that a stopped run leaves those before."""
    if only not in ("", "pocket", "course", "lean"):
        refuse(f"--only is pocket, course or lean, not {only!r}")
    from cs336_alignment.cli import bench_refusal  # here: so that the file is read at once
    problem = bench_refusal(small, out, STORED, on_gpu())
    if not problem and trl:
        from trl_step import trl_problem
        problem = trl_problem()
    if not problem and only == "lean":
        problem = None if importlib.util.find_spec("torchao") else "--only lean needs torchao: pip install torchao"
    if problem:
        refuse(problem)
    if on_gpu() and not here:  # trainer and engines share the GPU
        import subprocess

        from cs336_alignment.vllm_engine import multi_process_service
        with multi_process_service():
            failed = subprocess.call([sys.executable, *sys.argv, "--here"])
    else:
        failed = measure_all(out, small, steps, replicas, only, vllm)
    if trl and not here:  # TRL's engine is in its own process, which has the GPU for itself
        from trl_step import run_apart
        names = [name for name in ("pocket", "course") if name == (only or name)]
        failed = max([failed, *(run_apart(name, out, small) for name in names)])
    sys.exit(failed)


def refuse(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(2)


def measure_all(out: Path, small: bool, steps: int, replicas: int, only: str, vllm: dict) -> int:
    """Runs the settings one after the other; the exit status, 1 if a part of one has failed."""
    import platform
    import time
    import traceback
    from datetime import date

    import torch
    import transformers

    from cs336_alignment.runs import environment
    gpu = torch.cuda.get_device_name() if on_gpu() else f"{platform.machine()} CPU"
    result = json.loads(out.read_text()) if out.exists() else {}  # with --only, the other setting is kept
    result |= {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__, "small": small,
               "rewards": "random: 100% or 40% of the groups are mixed; grading is not part of the step"}
    print(f"{gpu}, torch {torch.__version__}")
    chosen = [only] if only else ["pocket", "course"]
    for name in chosen:
        setting = globals()[name]
        start, when = time.perf_counter(), {"date": f"{date.today()}", "commit": environment()["commit"]}
        kept = {k: v for k, v in result.pop(name, {}).items() if k in ("trl", "with_vllm")}  # measured apart
        print(f"\n{name}: {setting.__doc__}", flush=True)

        def save(measured: dict) -> None:
            result[name] = kept | measured | {"wall_s": time.perf_counter() - start} | when
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
        try:
            setting(small, replicas, steps, vllm, save)
        except Exception as error:
            traceback.print_exc()
            save(result.get(name, {}) | {"error": f"{type(error).__name__}: {error}"})
        print({k: round(v, 2) for k, v in result[name].get("speedups", {}).items()})
    print(f"\nwritten: {out}")
    return int(any("error" in part for name in chosen for part in [result[name], *result[name].get("variants", [])]
                   if isinstance(part, dict)))


if __name__ == "__main__":
    typer.run(main)
