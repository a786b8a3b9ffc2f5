"""Where a decoding step goes, vLLM's and the static engine's (notebook E2a), and what settings of vLLM change, in pairs.

    python bench/decode_profile.py                                  # one GPU, about a quarter of an hour
    python bench/decode_profile.py --shape course --part profile    # the 1.5B shape alone, its profile alone
    python bench/decode_profile.py --model NAME --shape pocket      # another policy, for responses of natural length
    python bench/decode_profile.py --small --out FILE               # a smoke test, with vLLM's CPU build

**profile**: one engine in this process, 64 and 256 sequences. Milliseconds a step: of the clock; of the host's parts
(`PARTS`, timers around vLLM's own methods; what they leave is `rest`); of the GPU's kernels by kind (`KERNELS`, torch's
profiler); and the least that reading weights and cache takes at this GPU's bandwidth. Each is a difference of two calls,
over the tokens that one has more, so prompts and starts cancel. Where kernels fill the clock the GPU is the limit, otherwise
it waits for the host. Once as vLLM comes, once without detokenisation (`late_text` of notebook E2).
**static**: the same of the static engine, and how far its kernels are from their plain forms in float32 (`kernel_checks`).
**pairs**: the engine as the project's runs have it against itself with one setting changed (`CANDIDATES`), in turns; the
ratio of each turn, above 1 where the change is faster. 256 responses of full length, and natural ones (pocket shape).
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import grpo_step as G  # the bench beside this one
import typer

STORED = G.STORED.with_name("decode_profile.json")
PARTS = {  # of llm.llm_engine: where, and the method
    "schedule": ("engine_core.engine_core.scheduler", "schedule"),
    "launch": ("engine_core.engine_core.model_executor", "execute_model"),
    "sample": ("engine_core.engine_core.model_executor", "sample_tokens"),
    "update": ("engine_core.engine_core.scheduler", "update_from_output"),
    "output": ("output_processor", "process_outputs"),
    "step": ("", "step"),
}
KERNELS = {  # the first that fits a kernel's name
    "attention": r"flash|attn|attention|attend|reshape_and_cache|fmha",
    "matrix products": r"gemm|nvjet|cutlass|gemv|splitk|cublas",
    "copies": r"memcpy|memset|copy",
    "sampler": r"draw_kernel|softmax|topk|sort|exponential|distribution|argmax|gumbel|sampl|multinomial|logprob|gather|rank|scatter",
    "norms, rotary, activations": r"norm|rotary|silu|gate_kernel|act_and_mul|triton|mul|add",
}
CANDIDATES = {  # options of VLLMEngine
    "no detokenisation": {"late_text": True},
    "all decoding in CUDA graphs": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    "async scheduling": {"async_scheduling": True},
    "no async scheduling": {"async_scheduling": False},
    "no prefix caching": {"enable_prefix_caching": False},
    "2 engines": {"replicas": 2},
    "4 engines": {"replicas": 4, "gpu_memory_utilization": 0.3},
    "4 engines, no detokenisation": {"replicas": 4, "gpu_memory_utilization": 0.3, "late_text": True},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
}


PARTS_OF_IT = ("profile", "static", "pairs")


# --- the host's parts

@contextmanager
def timed_parts(engine, seconds: dict[str, float]):
    """Within it the seconds of each part of vLLM's steps are added up; a part that this vLLM lacks is left out."""
    with ExitStack() as stack:
        for name, (where, method) in PARTS.items():
            try:
                owner = engine
                for attribute in filter(None, where.split(".")):
                    owner = getattr(owner, attribute)
                call = getattr(owner, method)
            except AttributeError:
                continue
            stack.enter_context(mock.patch.object(owner, method, timed_call(call, name, seconds)))
        yield


def timed_call(call, name: str, seconds: dict[str, float]):
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start
    return wrapper


# --- the GPU's kernels

def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, names in KERNELS.items() if re.search(names, kernel, re.IGNORECASE)), "other")


def kernel_seconds(call) -> dict[str, float]:
    """Seconds of each of the GPU's kernels, by name, while `call()` runs; {} without a GPU."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    if not G.on_gpu():
        call()
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = defaultdict(float)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            found[event.name] += event.time_range.elapsed_us() / 1e6
    return dict(found)


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Sums over the kernels of each kind."""
    sums = defaultdict(float)
    for name, seconds in kernels.items():
        sums[kind_of(name)] += seconds
    return dict(sums)


def bandwidth() -> float:
    """Bytes a second that a copy on the GPU reads and writes; 0 without."""
    import torch
    if not G.on_gpu():
        return 0.0
    a, best = torch.empty(2**30, dtype=torch.uint8, device="cuda"), float("inf")
    b = torch.empty_like(a)
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() / best


def step_bytes(model: str, sequences: int, context: float) -> float:
    """Bytes that a decoding step must read: the weights in bfloat16, and the keys and values of all sequences."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * weights + 2.0 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * sequences * context


# --- profile

def difference(more: dict[str, float], less: dict[str, float], tokens: int) -> dict[str, float]:
    """Milliseconds a token, by name: what the longer call took more than the shorter one."""
    return {name: 1000 * (more[name] - less.get(name, 0.0)) / tokens for name in more}


def profile_step(engine, prompts: list[str], tokens: int, width: float) -> dict:
    """One row: `len(prompts)` sequences, a step of `tokens`. width: the GPU's bandwidth, bytes a second."""
    from cs336_alignment.inference import SamplingParams

    def generate(k: int):
        engine.generate(prompts, SamplingParams(max_tokens=k, stop=(), ignore_eos=True, logprobs=None), progress=False)

    def clock(k: int) -> dict[str, float]:
        turns = []
        for _ in range(3):
            start = time.perf_counter()
            generate(k)
            turns.append(time.perf_counter() - start)
        return {"clock": min(turns)}

    def host(k: int) -> dict[str, float]:
        seconds = defaultdict(float)
        if not hasattr(engine, "backend"):  # the static engine has no parts
            return seconds
        with timed_parts(engine.backend.llm.llm_engine, seconds):
            generate(k)
        return dict(seconds)

    generate(2)
    parts = difference(host(1 + tokens), host(1), tokens)
    long, short = kernel_seconds(lambda: generate(1 + tokens)), kernel_seconds(lambda: generate(1))
    kernels = difference(by_kind(long), by_kind(short), tokens)
    largest = sorted(difference(long, short, tokens).items(), key=lambda item: -item[1])[:12]
    rest = {"rest": parts.get("step", 0.0) - sum(v for k, v in parts.items() if k != "step")} if parts else {}
    row = {"sequences": len(prompts), "clock_ms": difference(clock(1 + tokens), clock(1), tokens)["clock"],
           "host_ms": parts | rest,
           "kernels_ms": kernels, "gpu_ms": sum(kernels.values()), "largest_kernels_ms": dict(largest)}
    mean_prompt = statistics.mean(map(len, engine.tokenizer(prompts, add_special_tokens=False).input_ids))
    read = step_bytes(engine.path, len(prompts), mean_prompt + tokens / 2)
    return row | {"least_ms": 1000 * read / width if width else 0.0, "gpu_busy": row["gpu_ms"] / row["clock_ms"]}


def profile(work: dict, options: dict, tokens: int, sizes: list[int], save) -> None:
    """Rows of one engine in this process, with text and without."""
    from cs336_alignment.vllm_engine import VLLMEngine
    rows, width = [], bandwidth()
    G.free()
    with VLLMEngine(work["model"], work["tokenizer"], in_process=True, **options) as engine:
        engine.path = work["model"]
        config = getattr(engine.backend.llm.llm_engine, "vllm_config", None)
        about = {"async_scheduling": getattr(getattr(config, "scheduler_config", None), "async_scheduling", None),
                 "bytes_per_s": width}
        for late in (False, True):
            engine.backend.late_text = late
            for n in sizes:
                prompts = (work["prompts"] * n)[:n]
                rows.append({"late_text": late} | profile_step(engine, prompts, tokens, width))
                show(rows[-1])
                save(about | {"rows": rows})


def profile_static(work: dict, tokens: int, sizes: list[int], save) -> None:
    """Rows of the static engine; seconds of a rollout batch of `tokens` a response, the engine's start and first batch."""
    from cs336_alignment.inference import SamplingParams
    from cs336_alignment.vllm_engine import make_engine
    rows, width, start = [], bandwidth(), time.perf_counter()
    about = {"bytes_per_s": width, "kernels": kernel_checks() if G.on_gpu() else {}}
    G.free()
    dtype = "bfloat16" if G.on_gpu() else None
    with make_engine(work["model"], kind="static", tokenizer=work["tokenizer"], dtype=dtype, verbose=False) as engine:
        engine.path, about["start_s"], about["batches_s"] = work["model"], time.perf_counter() - start, []
        sampling = SamplingParams(n=work["group"], max_tokens=work["tokens"], stop=(), ignore_eos=True)
        for _ in range(4):
            start = time.perf_counter()
            engine.generate(work["prompts"], sampling, progress=False)
            about["batches_s"].append(time.perf_counter() - start)
        print(f"seconds of rollouts, {work['n']} x {work['tokens']} tokens: {[round(s, 3) for s in about['batches_s']]}", flush=True)
        for n in sizes:
            rows.append({"late_text": None} | profile_step(engine, (work["prompts"] * n)[:n], tokens, width))
            show(rows[-1])
            save(about | {"rows": rows})


def kernel_checks(n: int = 256) -> dict[str, dict[str, float]]:
    """For both shapes: relative differences of the kernels from their plain forms in float32; and of n × 16 draws from
    one distribution chi-squared, its degrees of freedom, and the largest difference of a log-prob."""
    from types import SimpleNamespace as Sizes

    import torch

    from cs336_alignment import static_engine as S
    torch.manual_seed(0)
    new, off = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16), lambda a, b: ((a - b).norm() / b.norm()).item()
    found = {}
    for shape, (heads, kv, d, hidden, inner) in {"pocket": (9, 3, 64, 576, 1536), "course": (12, 2, 128, 1536, 8960)}.items():
        x, residual, weight, both = new(n, hidden), new(n, hidden), new(hidden), new(n, 2 * inner)
        once, twice = residual.clone(), residual.float()
        checks = {"add_norm": off(S.kernel_add_norm(x, once, weight, 1e-5), S.add_norm(x.float(), twice, weight.float(), 1e-5)),
                  "residual": off(once, twice), "gate": off(S.kernel_gate(both), S.gate(both.float()))}
        angles = torch.outer(torch.arange(2048.0), 1e4 ** (-torch.arange(d // 2) / (d // 2))).cuda()
        w, i = Sizes(heads=heads, kv_heads=kv, head_dim=d, cos=angles.cos(), sin=angles.sin()), torch.arange(n)
        table = torch.stack([i * 0, i, i % 50, i % 190, 300 + i * 150, i % 149, i * 0 + 150, i]).cuda()
        keys, values, qkv = new(40_000, kv, d), new(40_000, kv, d), new(n, (heads + 2 * kv) * d)
        k, v = keys.float(), values.float()
        checks["attend"] = off(S.kernel_attend(qkv, table, keys, values, w), S.attend(qkv.float(), table, k, v, w))
        checks["cache"] = max(off(keys, k), off(values, v))
        logits, table = (2 * new(1000)).expand(16 * n, 1000).contiguous(), torch.stack([torch.arange(16 * n, device="cuda")] * 8)
        token, logprob = S.kernel_draw(logits, table, torch.tensor([0.8, 1.0, 0.0], device="cuda"), torch.tensor([5], device="cuda"))
        log_p = (0.8 * logits[0].float()).log_softmax(-1)
        expected = log_p.exp() * 16 * n
        often, counts = expected > 5, torch.bincount(token, minlength=1000)
        checks |= {"logprob": (logprob - log_p[token]).abs().max().item(), "chi-squared's degrees": int(often.sum()) - 1,
                   "chi-squared": ((counts - expected)[often] ** 2 / expected[often]).sum().item()}
        found[shape] = checks
        print(shape, {name: f"{value:.2g}" for name, value in checks.items()}, flush=True)
    return found


def show(row: dict) -> None:
    """Prints a row of the profile."""
    line = lambda part: "  ".join(f"{k} {v:.3f}" for k, v in part.items())
    kind = {None: "static", True: "late text", False: "with text"}[row["late_text"]]
    print(f"{row['sequences']} sequences, {kind}: {row['clock_ms']:.2f} ms a step, GPU "
          f"{row['gpu_ms']:.2f} ms ({row['gpu_busy']:.0%}), at least {row['least_ms']:.2f} ms\n  host: {line(row['host_ms'])}\n"
          f"  GPU: {line(row['kernels_ms'])}", flush=True)


# --- pairs

def with_option(options: dict, change: dict) -> dict:
    """Options of an engine with one changed; what is a dictionary is put together."""
    both = {k: options[k] | v for k, v in change.items() if isinstance(v, dict) and isinstance(options.get(k), dict)}
    return options | change | both


def pair(base, other, prompts: list[str], sampling, turns: int) -> dict:
    """Seconds of both engines in turns, the order changed each time, and the median of the turns' ratios."""
    seconds, tokens = defaultdict(list), {}
    for turn in range(1 + turns):  # the first warms up
        for engine in (base, other) if turn % 2 else (other, base):
            name = "base" if engine is base else "other"
            start = time.perf_counter()
            groups = engine.generate(prompts, sampling, progress=False)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            tokens[name] = sum(len(c.token_ids) for group in groups for c in group)
    ratios = [a / b for a, b in zip(seconds["base"], seconds["other"])]
    return {"base_s": seconds["base"], "other_s": seconds["other"], "ratios": ratios,
            "ratio": statistics.median(ratios), "tokens": tokens}


def pairs(work: dict, options: dict, tokens: int, n: int, turns: int, save, natural: bool, candidates: dict = CANDIDATES,
          together: int = 3) -> None:
    """Each candidate against the engine as it is; `together` candidates are started at the same time, in its memory too."""
    from cs336_alignment.inference import SamplingParams
    from cs336_alignment.vllm_engine import VLLMEngine
    full = SamplingParams(max_tokens=tokens, stop=(), ignore_eos=True, logprobs=None)
    loads = {"full": full} | ({"natural": SamplingParams(max_tokens=tokens, min_tokens=4, logprobs=None)} if natural else {})
    prompts, rows, names = (work["prompts"] * n)[:n], {}, list(candidates)

    def start(change: dict):
        try:
            return VLLMEngine(work["model"], work["tokenizer"], in_process=False, **with_option(options, change))
        except Exception as error:
            return f"did not start: {str(error).splitlines()[-1]}"

    with ExitStack() as stack:
        base = start({})
        if isinstance(base, str):
            raise RuntimeError(f"the engine as it is {base}")
        stack.enter_context(base)
        for k in range(0, len(names), together):
            with ThreadPoolExecutor() as pool:
                started = dict(zip(names[k:k + together], pool.map(start, [candidates[n] for n in names[k:k + together]])))
            for name, other in started.items():
                if isinstance(other, str):
                    rows[name] = {"error": other}
                    continue
                with other:
                    rows[name] = {}
                    for load, sampling in loads.items():
                        rows[name][load] = pair(base, other, prompts, sampling, turns)
                        save({"sequences": n, "rows": rows})
                print(f"{name:32} " + "  ".join(f"{load}: ×{r['ratio']:.2f}" for load, r in rows[name].items()), flush=True)
            save({"sequences": n, "rows": rows})


# --- the command

def engine_options(work: dict, small: bool) -> dict:
    """The engine as the project's runs have it, small enough to stand beside others."""
    from cs336_alignment.side_by_side import ENGINE
    if small:
        return {"gpu_memory_utilization": 0.05, "enforce_eager": True, "max_num_seqs": 16, "dtype": "float32"}
    return ENGINE | {"gpu_memory_utilization": 0.16, "max_model_len": work["context"]}


def run_here(part: str, shape: str, small: bool, tokens: int, turns: int, model: str, save) -> None:
    """One part of one shape, in this process."""
    sizes = [2, 4] if small else [64, 256]
    with G.workload(shape, small) as work:
        if model:
            from cs336_alignment.models import model_dir
            work["model"] = str(model_dir(model))
        options = engine_options(work, small)
        if part == "profile":
            profile(work, options, tokens, sizes, save)
        elif part == "static":
            profile_static(work, tokens, sizes, save)
        else:
            candidates = {k: CANDIDATES[k] for k in ("no detokenisation", "2 engines")} if small else CANDIDATES
            pairs(work, options, tokens, max(sizes), turns, save, natural=shape == "pocket", candidates=candidates)


def main(out: Path = STORED, small: bool = False, part: str = typer.Option("", help="profile, static or pairs; default all"),
         shape: str = typer.Option("", help="pocket or course; default both"), tokens: int = 256, turns: int = 3,
         model: str = typer.Option("", help="another policy of the pocket shape, by name or path"),
         here: bool = typer.Option(False, help="in this process", hidden=True)) -> None:
    """Profiles and compares, each part in a process of its own; a part that fails leaves the others, and exits with 1."""
    for value, choices in ((part, PARTS_OF_IT), (shape, ("pocket", "course"))):
        if value not in ("", *choices):
            G.refuse(f"{value!r} is none of {', '.join(choices)}")
    from cs336_alignment.cli import bench_refusal
    from cs336_alignment.vllm_engine import vllm_problem
    if problem := bench_refusal(small, out, STORED, G.on_gpu()) or (part != "static" and vllm_problem()):
        G.refuse(problem)
    if model and shape != "pocket":
        G.refuse("--model is for --shape pocket: the other shape has random weights")
    if here:
        name = f"{shape}, {model}" if model else shape
        run_here(part, shape, small, tokens, turns, model, lambda found: store(out, name, part, found))
        return
    from cs336_alignment.vllm_engine import multi_process_service
    failed = []
    for s in (shape,) if shape else ("pocket", "course"):
        for p in (part,) if part else PARTS_OF_IT:
            command = [sys.executable, __file__, "--here", "--shape", s, "--part", p, "--out", out, "--tokens", tokens,
                       "--turns", turns, "--model", model]
            with multi_process_service() if p == "pairs" else nullcontext():  # as the project's runs have it
                code = subprocess.call(list(map(str, command)) + ["--small"] * small)
            failed += [f"{s} {p}"] if code else []
    print("failed parts:", ", ".join(failed) or "none")
    sys.exit(bool(failed))


def store(out: Path, shape: str, part: str, found: dict) -> None:
    """Puts what was found into the file; the rest of it stays."""
    import torch
    result = json.loads(out.read_text()) if out.exists() else {}
    result |= {"gpu": torch.cuda.get_device_name() if G.on_gpu() else "CPU", "vllm": G.vllm_number() or result.get("vllm"),
               "torch": torch.__version__}
    result.setdefault(shape, {})[part] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
