"""Training throughput: the handout's padded loop (`literal_step`, notebook 06) against `train_step` on packed rows.

    python bench/training_throughput.py                         # one GPU, about three minutes
    python bench/training_throughput.py --small --out FILE      # a smoke test on any machine

Per variant: tokens/s (prompt and response tokens, padding not counted), MFU, peak memory, and the first step's seconds
(compilation, warm-up). MFU = model FLOPs / seconds / the bfloat16 matrix rate measured here, where model FLOPs are
    6 · (parameters of the decoder layers) · tokens                  forward 2, backward 4, per weight and token
  + 6 · vocabulary · hidden · (positions that have logits)         literal loop: all; packed: response tokens
  + 6 · layers · heads · head size · Σ n²                            causal attention over examples of n tokens
with padding and recomputation not counted. At micro-batch 2 the literal loop is timed on a part of the rows (`rows`):
its tokens/s are of that part. A setting that is in the file already is kept unless it is measured again. A variant that
fails is reported, the others still run, and the exit code is 1. Without a GPU nothing is measured: refused, exit code 2.
"""
import argparse
import json
import math
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "bench" / "training_throughput.json"


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=PUBLISHED)
    ap.add_argument("--small", action="store_true", help="tiny models, a few rows: tries the code, measures nothing")
    ap.add_argument("--steps", type=int, default=3, choices=range(1, 101), metavar="1..100", help="timed, a variant")
    ap.add_argument("--only", choices=["pocket", "course"], help="one of the two settings; default both")
    return ap.parse_args(argv)


OPTIONS = parse(sys.argv[1:]) if __name__ == "__main__" else None  # before the slow imports: --help answers at once

sys.path.insert(0, str(ROOT))

import torch

from cs336_alignment.cli import bench_refusal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def refusal(options: argparse.Namespace) -> str | None:
    """Why nothing may be run with these options, in a line; None if it may."""
    return bench_refusal(options.small, options.out, PUBLISHED, DEVICE == "cuda")


if OPTIONS and (problem := refusal(OPTIONS)):  # before more slow imports
    print(problem, file=sys.stderr)
    sys.exit(2)


import transformers
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from cs336_alignment import packing as P, sft_helper as S
from cs336_alignment.data import fill_prompt, load_problems, load_prompt, teacher_response
from cs336_alignment.models import load_policy
from cs336_alignment.runs import environment

QWEN_1_5B = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True)
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def matrix_peak(n: int) -> float:
    """FLOP/s of an n × n × n bfloat16 product on random data: best of 5 rounds of 10."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(6):  # the first round warms up
        synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * n**3 / best


# --- rows

def real_examples(tokenizer, n: int) -> tuple[list[P.Example], str]:
    """The first n training problems of GSM8K (else GSM-Symbolic) in the r1_zero prompt, with their worked solutions."""
    for name in ("gsm8k", "gsm_symbolic"):
        try:
            problems, template = load_problems(name, "train", n=n), load_prompt("r1_zero")
        except (OSError, ValueError):
            continue
        prompts = [fill_prompt(template, p.question) for p in problems]
        return P.make_examples(prompts, [teacher_response(p) for p in problems], tokenizer), name
    return random_examples(n, lambda rng: (rng.randint(110, 220), rng.randint(60, 250)), 512), "random lengths"


def random_examples(n: int, lengths: Callable[[random.Random], tuple[int, int]], vocab: int) -> list[P.Example]:
    """n examples of random tokens; `lengths` draws the tokens of prompt and response."""
    rng = random.Random(0)
    return [P.Example(*(rng.choices(range(vocab), k=k) for k in lengths(rng))) for _ in range(n)]


# --- the two loops

def padded_step(model: PreTrainedModel, optimizer, examples: list[P.Example], micro_batch: int) -> None:
    S.literal_step(model, optimizer, [e.prompt_ids for e in examples], [e.response_ids for e in examples], micro_batch)


def fast_step(model: PreTrainedModel, optimizer, examples: list[P.Example], max_tokens: int, max_logits: int) -> None:
    P.train_step(model, optimizer, P.sft_examples(examples, 1.0), P.sft_loss, max_tokens, max_logits=max_logits)


# --- measuring

def model_flops(model: PreTrainedModel, examples: list[P.Example], logits_everywhere: bool) -> float:
    """See the head of this file."""
    c, tokens = model.config, sum(map(len, examples))
    layers = sum(p.numel() for p in model.base_model.layers.parameters())
    with_logits = tokens if logits_everywhere else sum(len(e.response_ids) for e in examples)
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = c.num_hidden_layers * c.num_attention_heads * head_size * sum(len(e) ** 2 for e in examples)
    return 6 * (layers * tokens + c.vocab_size * c.hidden_size * with_logits + attention)


def measure(name: str, model: PreTrainedModel, step: Callable, examples: list[P.Example], steps: int, peak: float,
            logits_everywhere: bool) -> dict:
    """Runs two warm-up steps and `steps` timed ones; prints and returns a row of the table (the best step)."""
    optimizer = P.make_optimizer(model, 1e-6)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 2):  # two to warm up: the optimizer's state appears at the end of the first
        synchronize()
        start = time.perf_counter()
        step(model, optimizer, examples)
        synchronize()
        seconds.append(time.perf_counter() - start)
    best, tokens = min(seconds[2:]), sum(map(len, examples))
    row = {"variant": name, "tokens_per_s": tokens / best, "step_s": best, "step_s_all": seconds[2:],
           "first_step_s": seconds[0], "tokens_per_step": tokens, "rows": len(examples),
           "mfu": model_flops(model, examples, logits_everywhere) / best / peak}
    if DEVICE == "cuda":
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    print(f"{name:44} {row['tokens_per_s']:10,.0f} tok/s  MFU {row['mfu']:6.1%}  {row.get('peak_gb', 0):6.1f} GB  "
          f"first step {row['first_step_s']:5.1f} s", flush=True)
    return row


def fast_row(name: str, model: PreTrainedModel, examples, steps, peak, max_tokens: int, max_logits: int) -> dict:
    """Measures `train_step`; if memory runs out, again with half the tokens per micro-batch."""
    while True:
        try:
            step = partial(fast_step, max_tokens=max_tokens, max_logits=max_logits)
            row = measure(f"{name}, {max_tokens:,} tokens", model, step, examples, steps, peak, False)
            return row | {"max_tokens": max_tokens}
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at {max_tokens:,} tokens per micro-batch")
            if max_tokens <= 4 * max(map(len, examples)):
                raise
            max_tokens //= 2
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def attempt(rows: list[dict], name: str, run: Callable[[], dict]) -> None:
    """Appends run()'s row, or the error, and frees what it held."""
    try:
        rows.append(run())
    except Exception as e:
        traceback.print_exc()
        rows.append({"variant": name, "error": f"{type(e).__name__}: {e}"})
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def compare(build: Callable[[torch.dtype], PreTrainedModel], examples: list[P.Example],
            budgets: dict[str, tuple[int, int]], micro_batches: dict[int, int], steps: int, peak: float) -> list[dict]:
    """One model: the literal loop at some micro-batch sizes (each on so many rows), then the fast path, eager and (on
    CUDA) with compiled layers.

    Both loops run matrix products in bfloat16. The literal loop holds its weights in bfloat16, as the handout loads
    them; the fast path trains float32 weights.
    """
    rows, half = [], torch.bfloat16 if DEVICE == "cuda" else torch.float32

    def literal(size: int, n: int) -> dict:
        step = partial(padded_step, micro_batch=size)
        return measure(f"literal, micro-batch {size}", build(half), step, examples[:n], steps, peak, True)

    def fast(compiled: bool) -> dict:
        model = build(torch.float32)
        name = "packed, compiled layers" if compiled else "packed"
        if compiled:
            P.compile_policy(model)
        return fast_row(name, model, examples, steps, peak, *budgets["compiled" if compiled else "eager"])

    for size, n in micro_batches.items():
        attempt(rows, f"literal, micro-batch {size}", lambda: literal(size, n))
    for compiled in (False, True) if DEVICE == "cuda" else (False,):
        attempt(rows, "packed" + ", compiled layers" * compiled, lambda: fast(compiled))
    return rows


# --- is it right on this device?

def agreement(build: Callable[[torch.dtype], PreTrainedModel], examples: list[P.Example]) -> dict:
    """Log-probs and gradients of packed rows against single rows in float32, against themselves cut differently, and,
    to tell packing from precision, of single rows in the packed rows' precision against float32."""
    model = build(torch.float32)
    batch, size = P.sft_examples(examples, 1.0), sum(map(len, examples))

    def packed_gradient(max_tokens: int) -> torch.Tensor:
        P.accumulate_gradients(model, batch, P.sft_loss, max_tokens)
        return take_gradient(model)

    def single_rows(precision) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = []
        for e in examples:  # one row at a time: no padding, no packing
            ids = torch.tensor([[*e.prompt_ids, *e.response_ids]], device=DEVICE)
            with precision:
                lp = S.get_response_log_probs(model, ids[:, :-1], ids[:, 1:])["log_probs"][:, -len(e.response_ids):]
            (-lp.sum() / len(examples)).backward()
            log_probs.append(lp[0].detach())
        return torch.cat(log_probs), take_gradient(model)

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    whole, cut = packed_gradient(size), packed_gradient(max(max(map(len, examples)), size // 3))
    packed = torch.cat([lp for lp, _ in P.packed_log_probs(model, examples)])
    reference, exact = single_rows(nullcontext())
    rounded, rounded_gradient = single_rows(P.mixed_precision(model))
    off = (packed - reference).abs()
    return {"log_prob_mean_abs_difference": off.mean().item(), "log_prob_max_abs_difference": off.max().item(),
            "gradient_relative_difference": relative(whole, exact),
            "gradient_relative_difference_between_cuts": relative(cut, whole),
            "single_rows_in_compute_dtype": {"log_prob_mean_abs_difference": (rounded - reference).abs().mean().item(),
                                             "gradient_relative_difference": relative(rounded_gradient, exact)},
            "compute_dtype": str(P.compute_dtype(model))}


def take_gradient(model: PreTrainedModel) -> torch.Tensor:
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return grads


# --- the two settings

def pocket(small: bool, steps: int, peak: float) -> dict:
    """SmolLM2-135M on GSM rows (--small: the micro-sized Llama)."""
    if small:
        examples, data = random_examples(8, lambda rng: (rng.randint(5, 20), rng.randint(5, 40)), 512), "random"

        def build(dtype):
            return transformers.LlamaForCausalLM(LlamaConfig(**TINY)).to(DEVICE, dtype)
        budgets, sizes = {"eager": (100, 10**5), "compiled": (100, 10**5)}, {2: 8}
    else:
        _, tokenizer = load_policy("smollm2-135m", device="cpu")
        examples, data = real_examples(tokenizer, 256)

        def build(dtype):
            return load_policy("smollm2-135m", device=DEVICE, dtype=dtype)[0]
        budgets, sizes = {"eager": (32_768, P.MAX_LOGITS), "compiled": (32_768, P.MAX_LOGITS)}, {2: 32, 32: 256}
    checks = []
    attempt(checks, "agreement", lambda: agreement(build, examples[:16]))
    print("agreement:", checks[0])
    rows = compare(build, examples, budgets, sizes, steps, peak)
    return {"data": data, "rows_per_step": len(examples), "agreement": checks[0], "variants": rows}


def course(small: bool, steps: int, peak: float) -> dict:
    """The shape of Qwen2.5-Math-1.5B with random weights, on rows of 150 prompt and 512 response tokens."""
    config = Qwen2Config(**(TINY if small else QWEN_1_5B))
    examples = random_examples(4 if small else 100, lambda rng: (15, 51) if small else (150, 512), 512)

    def build(dtype):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            return Qwen2ForCausalLM(config).to(dtype)
    budgets = {"eager": (200, 10**5), "compiled": (200, 10**5)} if small else {
        "eager": (8 * 661, P.MAX_LOGITS), "compiled": (20 * 661, 2**30)}
    rows = compare(build, examples, budgets, {2: 4} if small else {2: 16}, steps, peak)
    return {"data": "random tokens", "rows_per_step": len(examples), "variants": rows}


def failures(name: str, setting: dict) -> list[str]:
    """What failed in a setting: the setting itself, its agreement, or variants."""
    variants = {v["variant"]: v for v in setting.get("variants", [])}
    parts = {"": setting, "agreement": setting.get("agreement", {})} | variants
    return [", ".join(filter(None, (name, part))) for part, row in parts.items() if "error" in row]


def main(options: argparse.Namespace) -> int:
    """Measures the settings, prints a table, writes after each, so that a stopped run leaves the first. Returns 1 if a part
    failed, else 0."""
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    peak = matrix_peak(512 if options.small else 8192)
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU"
    machine = {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__,
               "matrix_peak_tflops": peak / 1e12, "commit": environment()["commit"]}
    print(f"{gpu}, torch {torch.__version__}, bfloat16 matrix peak {peak / 1e12:,.1f} TFLOP/s")
    failed = []
    for name, setting in {"pocket": pocket, "course": course}.items():
        if options.only in (None, name):
            start = time.perf_counter()
            print(f"\n{name}: {setting.__doc__}")
            try:
                result[name] = machine | setting(options.small, options.steps, peak)
            except Exception as e:
                traceback.print_exc()
                result[name] = machine | {"error": f"{type(e).__name__}: {e}"}
            result[name]["wall_s"] = time.perf_counter() - start
            failed += failures(name, result[name])
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {options.out}; failed:", "; ".join(failed) or "nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
