"""The engines on a GPU: speed against bare vLLM, replicas, weight reload, sleep, memory given back, seeds, log-probs.

    python bench/engine_throughput.py                          # one GPU
    python bench/engine_throughput.py --only bare,replicas --replicas 2,4,8 --mps
    python bench/engine_throughput.py --small --out FILE       # a smoke test on any machine with vLLM

Each part runs in a process of its own: if one fails, its traceback is printed and stored, the rest goes on, and the
exit code is 1. Results of a file that exists are kept unless a part replaces them, so that parts can be run in several
calls. Without a GPU nothing is measured: refused with exit code 2.
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results/bench/engine_throughput.json"
PARTS = ["bare", "bare_own_process", "replicas", "reload_and_seeds", "step_cost", "sleep_and_close", "sleep_in_process",
         "transformers_engine"]
SMALL = dict(model="micro", only=["bare", "replicas", "reload_and_seeds", "transformers_engine"], prompts=4, n=2,
             max_tokens=8, repeats=1, replicas=[2], gpu_memory_utilization=0.1)


def parts(names: str) -> list[str]:
    if unknown := set(names.split(",")) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return names.split(",")


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="smollm2-135m")
    ap.add_argument("--out", type=Path, default=PUBLISHED)
    ap.add_argument("--small", action="store_true", help="the micro model, a few tokens, the parts that need no GPU")
    ap.add_argument("--only", type=parts, default=PARTS, help=f"of {','.join(PARTS)}")
    ap.add_argument("--prompts", type=int, default=64)
    ap.add_argument("--n", type=int, default=4)
    ap.add_argument("--max-tokens", type=int, default=256)
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--replicas", type=lambda s: [int(x) for x in s.split(",")], default=[2, 4, 8])
    ap.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    ap.add_argument("--mps", action="store_true", help="NVIDIA's Multi-Process Service for the engines")
    ap.add_argument("--timeout", type=int, default=240, help="seconds for one part")
    ap.add_argument("--here", action="store_true", help="run the one part of --only in this process")
    if "--small" in argv:
        ap.set_defaults(**SMALL)
    return ap.parse_args(argv)


OPTIONS = parse(sys.argv[1:]) if __name__ == "__main__" else None  # before the slow imports: --help answers at once

sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from cs336_alignment.cli import bench_refusal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def refusal(options) -> str | None:
    """Why nothing may be run with these options, in a line; None if it may."""
    return bench_refusal(options.small, options.out, PUBLISHED, DEVICE == "cuda")


if OPTIONS and (problem := refusal(OPTIONS)):  # before more slow imports
    print(f"engine_throughput: {problem}", file=sys.stderr)
    sys.exit(2)

from transformers import AutoConfig

from cs336_alignment.data import fill_prompt, load_prompt, micro_problems
from cs336_alignment.inference import SamplingParams, TransformersEngine, named_weights
from cs336_alignment.models import load_policy, model_dir
from cs336_alignment.runs import write_json
from cs336_alignment.vllm_engine import (VLLMEngine, environment_variables, forget_prefixes, multi_process_service,
                                         vllm_args, vllm_cleanup, vllm_version)


def gpu_used_gib() -> float:
    """Memory in use on the first GPU, by all processes; 0 without a GPU."""
    if DEVICE == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def timed(function, *args, **kwargs):
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    value = function(*args, **kwargs)
    wait()
    return value, time.perf_counter() - start


def make_prompts(n: int, model: str) -> list[str]:
    """The r1_zero prompt over n short questions: about the length of a GSM8K prompt. The micro model has its own."""
    if model == "micro":
        return [fill_prompt(load_prompt("micro"), p.question) for p in micro_problems(n, seed=0)]
    words = "A shop sells {} apples in the morning. How many does it sell in all if the parts of the day add up as {}"
    template = load_prompt("r1_zero")
    return [fill_prompt(template, words.format(i + 2, p.question)) for i, p in enumerate(micro_problems(n, seed=0))]


class Bench:
    def __init__(self, options):
        self.options, self.model = options, str(model_dir(options.model))
        self.prompts = make_prompts(options.prompts, options.model)
        self.fixed = SamplingParams(n=options.n, max_tokens=options.max_tokens, stop=(), ignore_eos=True, logprobs=None)
        self.natural = SamplingParams(n=options.n, max_tokens=options.max_tokens, min_tokens=4, logprobs=None)
        self.seeded = replace(self.natural, seed=0, logprobs=0)
        self.tokens = options.prompts * options.n * options.max_tokens
        self.memory = options.gpu_memory_utilization
        self.summary, self.rates, self.failed = {}, {}, {}

    def save(self):
        write_json(self.options.out, dict(summary=self.summary, tokens_per_s=self.rates, failed=self.failed))

    def engine(self, **options) -> VLLMEngine:
        context = min(2048, AutoConfig.from_pretrained(self.model).max_position_embeddings)
        usual = dict(gpu_memory_utilization=self.memory, max_model_len=context, enforce_eager=DEVICE == "cpu")
        return VLLMEngine(self.options.model, **usual | options)

    def rate(self, name: str, engine, sampling=None) -> float:
        """Best tokens per second of `repeats` calls, after one to warm up."""
        sampling, rates = sampling or self.fixed, []
        engine.generate(self.prompts[:8], sampling, progress=False)
        for _ in range(self.options.repeats):
            groups, seconds = timed(engine.generate, self.prompts, sampling, progress=False)
            rates.append(sum(len(c.token_ids) for group in groups for c in group) / seconds)
        self.rates[name] = max(rates)
        self.save()
        print(f"  {name}: {', '.join(f'{r:,.0f}' for r in rates)} tok/s", flush=True)
        return max(rates)

    def put(self, **values):
        self.summary |= values
        self.save()
        for name, value in values.items():
            print(f"  {name}: {value}", flush=True)


def bare_call(llm, bench, ids, logprobs=None, seeds=False):
    """vLLM's own API used as its documentation does: one request per prompt, n samples, vLLM's defaults otherwise."""
    from vllm import SamplingParams as VLLMSamplingParams
    s = bench.fixed
    params = VLLMSamplingParams(n=s.n, temperature=1.0, max_tokens=s.max_tokens, ignore_eos=True, logprobs=logprobs,
                                seed=0 if seeds else None)
    return llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)


def bare(bench):
    """(1) Bare vLLM and VLLMEngine in turns, on one vLLM engine in this process, with and without log-probs."""
    with bench.engine(in_process=True) as engine:
        llm, ids = engine.backend.llm, engine.tokenizer(bench.prompts, add_special_tokens=False).input_ids
        logprobs = replace(bench.fixed, logprobs=0)
        ways = {
            "bare vLLM": lambda: bare_call(llm, bench, ids),
            "bare vLLM, log-probs": lambda: bare_call(llm, bench, ids, logprobs=0),
            "VLLMEngine": lambda: engine.generate(bench.prompts, bench.fixed, progress=False),
            "VLLMEngine, log-probs": lambda: engine.generate(bench.prompts, logprobs, progress=False),
            "VLLMEngine, a seed per sample": lambda: engine.generate(bench.prompts, replace(bench.fixed, seed=0), progress=False),
            "VLLMEngine, progress bar": lambda: engine.generate(bench.prompts, bench.fixed, progress=True),
        }
        seconds = {name: [] for name in ways}
        bare_call(llm, bench, ids[:8])
        for turn in range(bench.options.repeats + 1):
            for name, way in ways.items():
                forget_prefixes(llm)
                _, t = timed(way)
                if turn:  # the first turn warms up
                    seconds[name].append(t)
        for name, ts in seconds.items():
            bench.rates[name] = bench.tokens / min(ts)
            print(f"  {name}: {', '.join(f'{bench.tokens / t:,.0f}' for t in ts)} tok/s", flush=True)
        for label, ours, theirs in [("", "VLLMEngine", "bare vLLM"),
                                    (", both with log-probs", "VLLMEngine, log-probs", "bare vLLM, log-probs")]:
            bench.put(**{f"VLLMEngine / bare vLLM{label}, best of each": bench.rates[ours] / bench.rates[theirs],
                         f"VLLMEngine / bare vLLM{label}, median of turns": statistics.median(
                             b / a for a, b in zip(seconds[ours], seconds[theirs]))})


def bare_own_process(bench):
    """(1b) vLLM's default: its engine core in a process of its own."""
    from vllm import LLM
    with environment_variables(VLLM_ENABLE_V1_MULTIPROCESSING="1"):
        llm = LLM(**vllm_args(bench.model, gpu_memory_utilization=bench.memory, max_model_len=2048))
    try:
        ids = llm.get_tokenizer()(bench.prompts, add_special_tokens=False).input_ids
        bare_call(llm, bench, ids)
        best = min(timed(bare_call, llm, bench, ids)[1] for _ in range(bench.options.repeats))
        bench.rates["bare vLLM, engine core in its own process"] = bench.tokens / best
        print(f"  {bench.tokens / best:,.0f} tok/s", flush=True)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        vllm_cleanup()


def replicas(bench):
    """(2) Several engines on the GPU; (3b) weights sent to them."""
    model, service = load_policy(bench.options.model, device=DEVICE)[0], ", MPS" if bench.options.mps else ""
    for count in bench.options.replicas:
        torch.cuda.empty_cache()
        engine, seconds = timed(bench.engine, replicas=count)
        team, size = f"{count} replicas{service}", f"{count} replicas{service}, {len(bench.prompts) * bench.options.n} requests"
        bench.put(**{f"{team}: start, s": seconds})
        try:
            bench.rate(f"VLLMEngine, {size}", engine)
            bench.rate(f"VLLMEngine, {size}, natural ends", engine, bench.natural)
            bench.rate(f"VLLMEngine, {size}, natural ends, seeds and log-probs", engine, bench.seeded)
            loads = [timed(engine.load_weights, model)[1] for _ in range(4)]
            bench.put(**{f"{team}: first load_weights, s": loads[0], f"{team}: load_weights, s": min(loads[1:])})
            same = engine.generate(bench.prompts[:16], bench.seeded, progress=False)
            zeroed = {name: torch.zeros_like(w) for name, w in named_weights(model)}
            engine.load_weights(zeroed)
            changed = engine.generate(bench.prompts[:16], bench.seeded, progress=False)
            differ = [g[0].text for g in same] != [g[0].text for g in changed]
            bench.put(**{f"{team}: zeroed weights changed the outputs": differ})
        finally:
            engine.close()
    bench.put(**{"GPU memory after the replicas closed, GiB (with the model)": gpu_used_gib()})


def reload_and_seeds(bench):
    """(3) Weight reload, (6) seeds and (7) log-probs, on one engine."""
    model, tokenizer = load_policy(bench.options.model, device=DEVICE)
    reference = TransformersEngine(model, tokenizer)
    greedy = SamplingParams(temperature=0, max_tokens=48, stop=())
    with bench.engine(in_process=True) as engine:
        first, again = (engine.generate(bench.prompts, bench.seeded, progress=False) for _ in range(2))
        agree(bench, "same seed twice: equal responses, share", first, again, tokens=None)
        few = engine.generate(bench.prompts[:32], bench.seeded, progress=False)
        agree(bench, "same seed, smaller batch: equal responses, share", first, few, tokens=None)
        agree(bench, "same seed, smaller batch: first 16 tokens equal, share", first, few)
        compare_logprobs(bench, model, [c for g in first[:32] for c in g])
        ours, theirs = (e.generate(bench.prompts[:32], greedy, progress=False) for e in (engine, reference))
        agree(bench, "greedy, vLLM and transformers: first 16 tokens equal, share", ours, theirs)
        loads = [timed(engine.load_weights, model)[1] for _ in range(5)]
        bench.put(**{"first load_weights, s": loads[0], "load_weights, s": min(loads[1:])})
        after = engine.generate(bench.prompts[:32], greedy, progress=False)
        agree(bench, "the same weights reloaded: first 16 tokens equal, share", ours, after)
        kept = {name: w.clone() for name, w in named_weights(model)}
        generator = torch.Generator(DEVICE).manual_seed(0)
        for _, w in named_weights(model):  # all of them, the embedding too: a stale copy anywhere must show
            w += 0.1 * w.std() * torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)
        engine.load_weights(model)
        ours, theirs = (e.generate(bench.prompts[:32], greedy, progress=False) for e in (engine, reference))
        agree(bench, "changed weights: outputs still equal, share", ours, after)
        agree(bench, "changed weights, vLLM and transformers: first 16 tokens equal, share", ours, theirs)
        compare_logprobs(bench, model, [c for g in ours for c in g], "changed weights: ")
        engine.load_weights(kept)
        restored = engine.generate(bench.prompts[:32], greedy, progress=False)
        agree(bench, "weights restored: first 16 tokens equal, share", restored, after)
        try:  # vLLM's own way in, for comparison
            weights = {"weights_iterator": iter(kept.items())}
            reload = timed(engine.backend.llm.collective_rpc, "reload_weights", kwargs=weights)[1]
            bench.put(**{"vLLM's reload_weights, s": reload})
        except Exception as e:
            bench.put(**{"vLLM's reload_weights failed": repr(e)})


def agree(bench, name, ours, theirs, tokens=16):
    same = [a.token_ids[:tokens] == b.token_ids[:tokens] for g, h in zip(ours, theirs) for a, b in zip(g, h)]
    bench.put(**{name: sum(same) / len(same)})


@torch.no_grad()
def compare_logprobs(bench, model, completions, label=""):
    """The engine's log-probs against a forward pass in the model's dtype and one in float32."""
    exact, gaps = copy.deepcopy(model).float(), {"bf16 forward": [], "fp32 forward": []}
    for c in completions:
        ids = torch.tensor([c.prompt_token_ids + c.token_ids], device=DEVICE)
        for name, m in [("bf16 forward", model), ("fp32 forward", exact)]:
            logits = m(ids).logits[0, len(c.prompt_token_ids) - 1:-1].float()
            expected = logits.log_softmax(-1).gather(1, ids[0, len(c.prompt_token_ids):, None]).squeeze(1).cpu()
            gaps[name] += (expected - torch.tensor(c.logprobs)).abs().tolist()
    for name, values in gaps.items():
        bench.put(**{f"{label}log-probs against {name}: mean gap, nats": statistics.mean(values),
                     f"{label}log-probs against {name}: largest gap, nats": max(values)})


STEP_OPTIONS = {"vLLM's defaults": {}, "async_scheduling": {"async_scheduling": True}, "no async_scheduling": {"async_scheduling": False},
                "no prefix caching": {"enable_prefix_caching": False},
                "decoding all in graphs": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}}


def step_cost(bench):
    """(8) Milliseconds a decoding step takes, by sequences at once and options of vLLM; one engine at a time is at work."""
    def start(options: dict) -> VLLMEngine | str:
        try:
            return bench.engine(in_process=False, gpu_memory_utilization=0.1, max_num_seqs=256, **options)
        except Exception as e:
            return f"did not start: {str(e).splitlines()[-1]}"

    with ThreadPoolExecutor() as pool:  # starting takes long
        engines = dict(zip(STEP_OPTIONS, pool.map(start, STEP_OPTIONS.values())))
    prompts = (bench.prompts * 256)[:256]
    for name, engine in engines.items():
        if isinstance(engine, str):
            bench.put(**{f"a step, {name}": engine})
            continue
        with engine:
            for n in (1, 64, 128, 256):
                bench.put(**{f"a step, {name}, {n} sequences, ms": 1000 * step_seconds(engine, prompts[:n], bench.options.max_tokens)})


def step_seconds(engine, prompts: list[str], tokens: int) -> float:
    """Seconds of a decoding step: `tokens` tokens more than one, over their number; the best of three."""
    def seconds(k: int) -> float:
        sampling = SamplingParams(max_tokens=k, ignore_eos=True, logprobs=None)
        return min(timed(engine.generate, prompts, sampling, progress=False)[1] for _ in range(3))

    return (seconds(1 + tokens) - seconds(1)) / tokens


def sleep_wake_close(bench, name: str, **options) -> None:
    """One engine's life: the GPU's memory (of all processes) awake, asleep and after closing; the same outputs once awake."""
    torch.cuda.init()
    before, greedy = gpu_used_gib(), SamplingParams(temperature=0, max_tokens=32, stop=())
    few = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}  # speed is not measured here
    engine, seconds = timed(bench.engine, enable_sleep=True, compilation_config=few, gpu_memory_utilization=0.15, **options)
    try:
        bench.put(**{f"{name}: start with few graphs, s": seconds})
        texts = [g[0].text for g in engine.generate(bench.prompts[:16], greedy, progress=False)]
        bench.put(**{f"{name}: GPU memory taken, GiB": gpu_used_gib() - before})
        _, seconds = timed(engine.sleep)
        bench.put(**{f"{name}: sleep, s": seconds, f"{name}: GPU memory taken asleep, GiB": gpu_used_gib() - before})
        _, seconds = timed(engine.wake)
        again = [g[0].text for g in engine.generate(bench.prompts[:16], greedy, progress=False)]
        bench.put(**{f"{name}: wake, s": seconds, f"{name}: outputs after waking equal those before": again == texts})
    finally:
        engine.close()
    bench.put(**{f"{name}: GPU memory taken after close, GiB": gpu_used_gib() - before})


def sleep_and_close(bench):
    """(4) Sleeping and waking, (5) memory given back: two engines in processes of their own."""
    sleep_wake_close(bench, "2 replicas that can sleep", replicas=2)


def sleep_in_process(bench):
    """(4b), (5b) The same for an engine in this process."""
    sleep_wake_close(bench, "engine in this process", in_process=True)


def transformers_engine(bench):
    """The transformers engine, for scale."""
    engine = TransformersEngine(bench.options.model, device=DEVICE)
    prompts, bench.prompts = bench.prompts, bench.prompts[:64]
    try:
        short = replace(bench.fixed, max_tokens=min(64, bench.options.max_tokens))
        bench.rate("TransformersEngine, batch 128", engine, short)
    finally:
        bench.prompts = prompts
        engine.close()


def run_part(options) -> None:
    """One part, in this process."""
    [name], bench, start = options.only, Bench(options), time.perf_counter()
    part = globals()[name]
    print(f"== {name}: {part.__doc__}", flush=True)
    try:
        part(bench)
    except Exception:
        traceback.print_exc()
        bench.failed[name] = traceback.format_exc()[-2000:]
    bench.save()
    print(f"== {name}: {time.perf_counter() - start:.0f} s\n", flush=True)


def run_apart(options, name: str) -> dict:
    """One part in a process of its own; what it stored."""
    stored_at = options.out.with_name(f"part_{name}.json")
    command = [sys.executable, __file__, "--here", "--only", name, "--out", str(stored_at), "--model", options.model,
               "--replicas", ",".join(map(str, options.replicas))]
    command += ["--mps"] * options.mps + ["--small"] * options.small
    for flag in ("prompts", "n", "max_tokens", "repeats", "gpu_memory_utilization"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    try:
        with multi_process_service() if options.mps else nullcontext():
            problem = subprocess.run(command, timeout=options.timeout).returncode
    except subprocess.TimeoutExpired:
        problem = f"no end after {options.timeout} s"
    stored = json.loads(stored_at.read_text()) if stored_at.exists() else dict(summary={}, tokens_per_s={}, failed={})
    stored_at.unlink(missing_ok=True)
    if problem:
        stored["failed"].setdefault(name, f"the process ended with: {problem}")
    return stored


def main(options) -> int:
    """Runs the parts one after the other; the exit code: 1 if one failed."""
    if options.here:
        return run_part(options)
    failed = set()
    result = dict(summary={}, tokens_per_s={}, failed={})
    result |= json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= dict(gpu=torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", vllm=vllm_version(),
                   torch=torch.__version__, model=options.model, requests=options.prompts * options.n,
                   max_tokens=options.max_tokens, repeats=options.repeats)
    for name in options.only:
        result["failed"].pop(name, None)
        for key, value in run_apart(options, name).items():
            result[key] |= value
        failed |= {name} & result["failed"].keys()
        rates = result["tokens_per_s"]
        replicas = {k: v for k, v in rates.items() if "replicas" in k and "natural" not in k}
        result["summary"] |= {"best with replicas, tokens/s": max(replicas.values())} if replicas else {}
        write_json(options.out, result)
    print(json.dumps(result, indent=1))
    print("failed parts:", ", ".join(sorted(failed)) or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
