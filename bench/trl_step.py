"""TRL's GRPOTrainer, vLLM colocated, as the third side of `grpo_step.py`; and a check that all three have the same loss.

    python bench/grpo_step.py --trl                             # all sides, both settings
    python bench/trl_step.py --only pocket                      # TRL's rows alone, into the same file
    python bench/trl_step.py --small --out small.json  # a smoke test on any machine with TRL (no vLLM there)

TRL gets the same model, questions, group size, response lengths, rewards and optimizer, its own defaults for the rest, and
the best that a short search finds: first micro-batch sizes (`MICRO_BATCHES`), then one option more (`OPTIONS`) at the best
size, then all that helped together. An option that needs a package that is not installed, or for which `--seconds` has run
out, is named in `left_out`. All rows of a setting share one vLLM engine (its start is no part of a step) and sync the
weights as TRL does. Our own step, all responses with an advantage, is timed before them in the same process (`ours`). A step of TRL's is the time from one `on_step_end` to the next. Its phases are TRL's own timers
for vLLM and for the weights; `update` is all the rest: with TRL's pass for the importance weights' log-probabilities, and rewards.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import grpo_step as G  # the bench beside this one
import typer

MICRO_BATCHES = {"pocket": (128, 64, 32), "course": (16, 8)}  # the first is the best that was seen before
OPTIONS = {  # what is added to TRL's defaults, and the package it needs
    "Liger's layers": (dict(use_liger_kernel=True), "liger_kernel"),
    "no importance weights": (dict(vllm_importance_sampling_correction=False), None),
    "no recomputation": (dict(gradient_checkpointing=False), None),
    "bfloat16 weights": (dict(model_init_kwargs={"dtype": "bfloat16"}), None),
    "FlashAttention-2": (dict(model_init_kwargs={"attn_implementation": "flash_attention_2"}), "flash_attn"),
    "compiled": (dict(torch_compile=True), None),
}
SAME_LOSS = {"grpo": "masked_mean", "dr_grpo": "masked_normalize", "dapo": "token"}  # TRL's name, and ours (notebook 12)


def trl_problem() -> str | None:
    """Why TRL cannot run here, in a line; None if it can."""
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install trl==1.16.0, or leave --trl out" if missing else None


def import_trl():
    """The module; with what pyarrow's extension needs on some machines before `datasets` is imported."""
    import builtins
    import warnings

    import pyarrow
    builtins.MonthDayNano = pyarrow.MonthDayNano
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    import trl
    return trl


def merged(*options: dict) -> dict:
    """Options of TRL put together; `model_init_kwargs` too."""
    out = {}
    for o in options:
        both = out.get("model_init_kwargs", {}) | o.get("model_init_kwargs", {})
        out |= o | ({"model_init_kwargs": both} if both else {})
    return out


# --- one row

def trl_arguments(work: dict, size: int, options: dict, steps: int, folder: str) -> dict:
    """What GRPOConfig gets for one row: nothing but the setting's sizes, our optimizer, full-length responses."""
    vllm = dict(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=work["gpu_memory_utilization"],
                vllm_max_model_length=work["context"], generation_kwargs={"ignore_eos": True})
    fixed = dict(output_dir=folder, per_device_train_batch_size=size, gradient_accumulation_steps=work["n"] // size,
                 num_generations=work["group"], max_completion_length=work["tokens"], max_steps=steps, learning_rate=1e-6,
                 adam_beta2=0.95, lr_scheduler_type="constant", loss_type="grpo", shuffle_dataset=False, report_to="none",
                 save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not G.on_gpu(), bf16=G.on_gpu())
    natural = dict(generation_kwargs={"min_new_tokens": work["tokens"]}, vllm_importance_sampling_correction=False)
    return merged(fixed, vllm if G.on_gpu() else natural, options)


@contextmanager
def as_before(*modules):
    """Within it modules may be changed: Liger puts its layers into transformers' modules, and leaves them there."""
    kept = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, kept):
            vars(module).update(names)


def make_clock(times: list[tuple[float, dict]], phases: dict, warm):
    """A callback that notes when each step has ended, and the seconds by phase since the one before.

    `warm()` is called after the first."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if G.on_gpu():
                torch.cuda.synchronize()
            times.append((time.perf_counter(), dict(phases)))
            phases.clear()
            if len(times) == 1:
                warm()

    return Clock()


def trl_row(name: str, work: dict, size: int, options: dict, steps: int) -> dict:
    """One step to warm up and `steps` timed ones of a new trainer; a row like those of `grpo_step.measure`."""
    trl = import_trl()
    from accelerate.state import AcceleratorState, GradientState
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from trl.extras.profiling import ProfilingContext

    from cs336_alignment.vllm_server import free_port
    names = {"vLLM.generate": "rollout", "transformers.generate": "rollout", "sync_weights": "sync"}
    times, phases = [], {}

    def note(context, seconds):
        key = names.get(context.name.partition(".")[2])
        if key:
            phases[key] = phases.get(key, 0.0) + seconds

    rewards = G.RandomRewards(work["n"], work["group"], 1.0)
    reward = lambda prompts, completions, **rest: [rewards(c, "")["reward"] for c in completions]
    AcceleratorState._reset_state(), GradientState._reset_state()  # the row before may have been compiled
    with (tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, MASTER_PORT=str(free_port())), ExitStack() as later,
          mock.patch.object(ProfilingContext, "_log_metrics", note), as_before(modeling_llama, modeling_qwen2)):
        gpu = G.WholeGPU()
        trainer = trl.GRPOTrainer(
            model=work["model"], reward_funcs=reward, processing_class=work["tokenizer"],
            args=trl.GRPOConfig(**trl_arguments(work, size, options, 1 + steps, folder)),
            train_dataset=Dataset.from_dict({"prompt": work["prompts"]}),
            callbacks=[make_clock(times, phases, lambda: later.enter_context(gpu))])
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        dtype = str(next(trainer.model.parameters()).dtype)
    ends = [begin] + [end for end, _ in times]
    seconds = [b - a for a, b in zip(ends, ends[1:])]
    best = min(range(1, len(seconds)), key=seconds.__getitem__)
    measured = times[best][1]
    row = {"variant": name, "step_s": seconds[best], "first_step_s": seconds[0], "step_s_all": seconds[1:],
           "phases_s": measured | {"update": seconds[best] - sum(measured.values())}, "micro_batch": size,
           "options": options, "weights": dtype} | G.rates(work, seconds[best], seconds[best] - sum(measured.values()), 1.0)
    if G.on_gpu():  # of the timed steps; what torch has allocated would be trainer and engine, which are one process
        row["gpu_peak_gb"] = gpu.peak
    G.show_row(row)
    return row


# --- the search

def tidy() -> None:
    """Frees what the last trainer held; torch's compiler keeps what it has compiled for vLLM, in this same process."""
    import gc

    import torch
    gc.collect()
    if G.on_gpu():
        torch.cuda.empty_cache()


def search(sizes: tuple[int, ...], options: dict, row, deadline: float, save) -> dict:
    """Rows of the sizes, of one option more each, and of all that helped; `row(name, size, options)` measures one.

    `save` takes the result after each. A row that fails (memory) is kept with its error."""
    rows, left_out = [], {}

    def attempt(name: str, size: int, extra: dict) -> dict:
        if time.monotonic() > deadline:
            left_out[name] = "time"
            return {}
        try:
            done = row(name, size, extra)
        except Exception as error:
            done = {"variant": name, "micro_batch": size, "options": extra, "error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{name}: {done['error']}", flush=True)
        rows.append(done)
        tidy()
        save(found())
        return done

    def fastest(some: list[dict]) -> dict:
        return min((r for r in some if "step_s" in r), key=lambda r: r["step_s"], default={})

    def found() -> dict:
        return {"rows": rows, "left_out": left_out, "best": fastest(rows).get("variant")}

    for size in sizes:
        attempt(f"TRL, micro-batch {size}", size, {})
    base = fastest(rows)
    size, helped = base.get("micro_batch", sizes[0]), {}
    for name, (extra, package) in options.items():
        if package and importlib.util.find_spec(package) is None:
            left_out[name] = f"{package} is not installed"
            continue
        done = attempt(f"TRL, micro-batch {size}, {name}", size, extra)
        if "error" in done and size > 1:  # memory: the option may pay with a smaller one
            done = attempt(f"TRL, micro-batch {size // 2}, {name}", size // 2, extra)
        if done.get("step_s", float("inf")) < base.get("step_s", 0.0):
            helped[name] = (extra, done["micro_batch"])
    if len(helped) > 1:
        together = merged(*(extra for extra, _ in helped.values()))
        smallest = min(s for _, s in helped.values())
        attempt(f"TRL, micro-batch {smallest}, {' + '.join(helped)}", smallest, together)
    save(found())
    return found()


def one_engine():
    """Within it all trainers of this process share one `vllm.LLM` for equal arguments."""
    if not G.on_gpu():
        return mock.patch.dict({})
    import_trl()
    from trl.generation import vllm_generation
    make, made = vllm_generation.LLM, {}

    def llm(**arguments):
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = make(**arguments)
        return made[key]

    return mock.patch.object(vllm_generation, "LLM", llm)


# --- is it the same loss?

def given_rollouts(work: dict, groups: int, group: int, longest: int) -> tuple[list, list[float]]:
    """Responses of random tokens and uneven lengths to the first prompts, and rewards with a mixed group each."""
    import random

    from cs336_alignment.inference import Completion
    rng, tokenizer = random.Random(0), work["tokenizer"]
    ids = tokenizer(work["prompts"][:groups], add_special_tokens=False).input_ids
    answers = [[rng.randrange(3, min(len(tokenizer), 40_000)) for _ in range(rng.randint(2, longest))] for _ in range(groups * group)]
    completions = [Completion("", a, None, "length", ids[i // group]) for i, a in enumerate(answers)]
    return completions, [float(i % group <= i // group % (group - 1)) for i in range(groups * group)]


def take_gradient(model):
    """All gradients in one float64 vector on the CPU, and none left in the model."""
    import torch
    gradient = torch.cat([p.grad.flatten().double().cpu() for _, p in sorted(dict(model.named_parameters()).items())])
    model.zero_grad(set_to_none=True)
    return gradient


def our_loss(config, model, completions, rewards):
    """(loss, gradient) of the refined step, from advantages to packed rows."""
    from functools import partial

    import torch

    from cs336_alignment import grpo
    from cs336_alignment.packing import accumulate_gradients
    advantages, _ = grpo.compute_advantages(config, torch.tensor(rewards))
    examples = dict(enumerate(grpo.rollout_examples(completions, advantages)))
    examples, _ = grpo.add_log_probs(config, examples, completions, model)
    batch = grpo.weighted(config, examples, completions, range(len(completions)))
    loss = accumulate_gradients(model, batch, partial(grpo.grpo_loss, config), max_tokens=4096)["loss"]
    return loss, take_gradient(model)


def literal_loss(config, model, tokenizer, completions, rewards, micro: int = 2):
    """(loss, gradient) of the handout's loop: padded micro-batches, its own loss function."""
    import torch

    from cs336_alignment import grpo
    from cs336_alignment.grpo_helper import grpo_microbatch_train_step
    from cs336_alignment.sft_helper import get_response_log_probs, pad_id, padded_batch
    b = padded_batch([c.prompt_token_ids for c in completions], [c.token_ids for c in completions], pad_id(tokenizer))
    b, A = {k: v.to(model.device) for k, v in b.items()}, grpo.compute_advantages(config, torch.tensor(rewards))[0]
    A, loss = A[:, None].to(model.device), 0.0
    for k in range(0, len(A), micro):
        m = slice(k, k + micro)
        log_probs = get_response_log_probs(model, b["input_ids"][m], b["labels"][m])["log_probs"]
        loss += grpo_microbatch_train_step(log_probs, b["response_mask"][m], len(A) // micro, config.loss_type, A[m], A[m],
                                           log_probs.detach(), config.cliprange, grpo.length_constant(config))[0].item()
    return loss, take_gradient(model)


def trl_loss(work: dict, name: str, model, completions, rewards, group: int, longest: int):
    """(loss, gradient) of one step of GRPOTrainer in float32, with the rollouts given through its `rollout_func`."""
    trl = import_trl()
    from accelerate.state import AcceleratorState, GradientState
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    n, kept = len(completions), []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept.append(take_gradient(model))

    def rollouts(prompts, trainer):
        return {"prompt_ids": [c.prompt_token_ids for c in completions], "completion_ids": [c.token_ids for c in completions],
                "logprobs": [[0.0] * len(c.token_ids) for c in completions]}

    AcceleratorState._reset_state(), GradientState._reset_state()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        args = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=n // 4, num_generations=group,
            max_completion_length=longest, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, loss_type=name, bf16=False,
            gradient_checkpointing=False, shuffle_dataset=False, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_strategy="no", use_cpu=not G.on_gpu())
        trainer = trl.GRPOTrainer(model=model, reward_funcs=lambda prompts, completions, **rest: rewards, args=args,
                                  processing_class=work["tokenizer"], rollout_func=rollouts, callbacks=[Keep()],
                                  train_dataset=Dataset.from_dict({"prompt": work["prompts"][:n // group]}))
        trainer.remove_callback(PrinterCallback)
        return trainer.train().training_loss, kept[0]


def same_loss(work: dict, build, groups: int = 4, group: int = 4, longest: int = 24) -> dict:
    """Loss and gradient of the three on the same rollouts, by TRL's name of the loss.

    TRL's in float32; the other two in float64, exact enough to be the reference. `reinforce` is the gradient of the loss
    that is timed on our sides, −A·log π, against that of TRL's ratio: on new rollouts they are the same."""
    import torch

    from cs336_alignment.grpo_settings import grpo_config
    completions, rewards = given_rollouts(work, groups, group, longest)
    n, result = len(completions), {}
    off = lambda a, b: ((a - b).norm() / b.norm()).item()
    for name, normalization in SAME_LOSS.items():
        config = grpo_config("micro", rollout_batch_size=n, train_batch_size=n, group_size=group, max_tokens=longest,
                             min_tokens=0, gradient_accumulation_steps=n // 2, loss_type="grpo_clip", advantage_eps=1e-4,
                             length_normalization=normalization)
        exact = build(torch.float64)
        loss, gradient = our_loss(config, exact, completions, rewards)
        plain = replace(config, loss_type="reinforce_with_baseline")
        row = {"loss": {"ours": loss}, "gradient_norm": gradient.norm().item(), "gradient_off": {
            "reinforce": off(our_loss(plain, exact, completions, rewards)[1], gradient)}}
        if normalization != "token":  # which the literal loop does not know
            row["loss"]["literal"], literal = literal_loss(config, exact, work["tokenizer"], completions, rewards)
            row["gradient_off"]["literal"] = off(literal, gradient)
        row["loss"]["TRL"], theirs = trl_loss(work, name, build(torch.float32), completions, rewards, group, longest)
        row["gradient_off"]["TRL"] = off(theirs, gradient)
        result[name] = row
        losses = "  ".join(f"{k} {v:+.7f}" for k, v in row["loss"].items())
        print(f"{name:8} loss: {losses}  gradient, relative difference: "
              + "  ".join(f"{k} {v:.1e}" for k, v in row["gradient_off"].items()), flush=True)
    return result


# --- the settings

def measure(name: str, small: bool, steps: int, seconds: float, save) -> int:
    """TRL's rows of a setting and the check of the losses; `save` takes what is stored under "trl". 1 if no row ran."""
    import torch
    import transformers
    trl = import_trl()
    with G.workload(name, small) as work:
        n = work["n"]
        sizes = (4, 8) if small else MICRO_BATCHES[name]
        options = dict(list(OPTIONS.items())[:2]) if small else OPTIONS
        about = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
                 "vllm": G.vllm_number(), "gpu": torch.cuda.get_device_name() if G.on_gpu() else "CPU", "rollouts": n,
                 "loss": "grpo, on new rollouts: the gradient of reinforce_with_baseline with masked_mean"}
        about["same_loss"] = same_loss(work, work["build"])  # before the rows: Liger's layers do not know float64
        G.free()
        with G.static_engine(work) as engine:  # so that both sides are of one run
            about["ours"] = G.measure("ours, 100% with an advantage", G.our_steps(work, engine, 1.0), 1 + steps, work, 1.0)
        del engine
        G.free()
        save(about | {"rows": []})
        deadline = time.monotonic() + seconds
        with one_engine():
            row = lambda label, size, extra: trl_row(label, work, size, extra, steps)
            return int(search(sizes, options, row, deadline, lambda found: save(about | found))["best"] is None)


def main(out: Path = G.STORED, small: bool = False, steps: int = 2, only: str = "", seconds: float = 420.0,
         here: bool = typer.Option(False, help="in this process", hidden=True)) -> None:
    """Measures TRL's rows of both settings, each in a process of its own, into the file of `grpo_step.py`."""
    if only not in ("", "pocket", "course"):
        G.refuse(f"--only is pocket or course, not {only!r}")
    from cs336_alignment.cli import bench_refusal
    if problem := bench_refusal(small, out, G.STORED, G.on_gpu()) or trl_problem():
        G.refuse(problem)
    if not here:
        names = [name for name in ("pocket", "course") if only in ("", name)]
        sys.exit(max(run_apart(name, out, small, steps, seconds) for name in names))

    def save(part: dict) -> None:
        result = json.loads(out.read_text()) if out.exists() else {}
        result[only] = result.get(only, {}) | {"trl": part}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")

    sys.exit(measure(only, small, steps, seconds, save))


def run_apart(name: str, out: Path, small: bool, steps: int = 2, seconds: float = 420.0) -> int:
    """One setting in a process of its own; its exit status."""
    command = [sys.executable, __file__, "--here", "--only", name, "--out", out, "--steps", steps, "--seconds", seconds]
    return subprocess.call(list(map(str, command)) + ["--small"] * small)


if __name__ == "__main__":
    typer.run(main)
