"""The runs behind the figures of notebooks 08, 09 and 12: one process a seed, side by side, on all GPUs of this machine.

    uv run python bench/runs.py                          # all stages, pocket track
    uv run python bench/runs.py tune sft --seeds 0,1     # some stages, some seeds
    uv run python bench/runs.py sft quality --track micro    # on a CPU

A process has one engine for all its runs, since starting vLLM takes longer than many of them. Finished runs are read and
killed ones go on, so that the script can be stopped and started at will. Where a stage needs what another process makes
(a tuning run, a file of traces), it waits for it.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cs336_alignment import grpo  # noqa: E402
from cs336_alignment.data import load_problems  # noqa: E402
from cs336_alignment.inference import Engine, SamplingParams, make_engine, multi_process_service  # noqa: E402
from cs336_alignment.log import run_folder  # noqa: E402
from cs336_alignment.models import TRACKS, cache_dir, load_policy, trained_policies  # noqa: E402
from cs336_alignment.sft_math_reasoning import (SIZES, best_tuning, filter_traces, make_traces, policy_name,  # noqa: E402
                                                quality_configs, sft, sft_config, shared_engine, tuning_configs, update_count)
from cs336_alignment.sft_math_reasoning_ei import expert_iteration, rate_configs, variation_configs  # noqa: E402

TEACHER = "n1024_seed0"  # its responses are the traces of the stage `quality`
TRACED = {"micro": None, "pocket": 4096, "course": None}  # problems that it solves; None: the track's pool
GRPO_RATES = (1e-5, 2e-5, 4e-5, 8e-5)  # expert iteration loses at a constant 1e-4 (09)
ENGINE = {"max_num_seqs": 512,  # in larger batches vLLM leaves CUDA graphs
          "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, *range(32, 513, 32)]}}  # fewer: starts sooner


class Remembering:
    """An engine that remembers evaluations: the same weights, prompts and seeds give the same responses.

    All runs from one policy begin with the same evaluation, and runs of one seed sample it alike."""

    def __init__(self, engine: Engine):
        self.engine, self.weights, self.known = engine, None, {}

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def load_weights(self, model):
        self.weights = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
        self.engine.load_weights(model)

    def generate(self, prompts, sampling: SamplingParams, progress: bool = False):
        key = (self.weights, tuple(prompts), sampling)
        if sampling.n > 1 or sampling.seed is None:
            return self.engine.generate(prompts, sampling, progress)
        if key not in self.known:
            self.known = dict(list(self.known.items())[-40:]) | {key: self.engine.generate(prompts, sampling, progress)}
        return self.known[key]


@dataclass
class Worker:
    """One process of the queue: its seed among all seeds, and what its runs share."""
    seed: int
    seeds: list[int]
    track: str
    root: Path
    engine: Remembering | None  # None: each run samples from its own policy
    compiled: bool

    @property
    def bare_engine(self) -> Engine | None:
        """For GRPO, which samples an evaluation of its own each time: nothing to remember."""
        return self.engine and self.engine.engine

    def run(self, work, configs: list[dict], keep: bool = False) -> None:
        for config in configs:
            begin = time.perf_counter()
            s = work(config, self.engine, self.root, keep=keep, progress=False, compiled=self.compiled, checkpoint_s=60)
            print(f"{policy_name(config)}: {s['final']['answer_accuracy']:.1%} after {s['steps']} steps, "
                  f"{time.perf_counter() - begin:.0f} s", flush=True)

    def share(self, configs: list[dict]) -> list[dict]:
        """Those of a list of runs that fall to this process."""
        return configs[self.seeds.index(self.seed)::len(self.seeds)]

    def have(self, config: dict, needed: bool = True, work=None) -> None:
        """Trains a policy again that a finished run has left on another machine: weights are not in the repository.

        work: expert_iteration, or by default sft, with one evaluation."""
        if needed and policy_name(config) not in trained_policies():
            config, work = (config, work) if work else (config | {"evaluations": 1}, sft)
            with FileLock(cache_dir() / f"again-{config['variant']}_seed{config['seed']}.lock"):
                work(config, self.engine, self.root / "logs" / "again", keep=True, progress=False, compiled=self.compiled,
                     checkpoint_s=60)

    def wait_for(self, paths: list[Path]) -> None:
        while missing := [path for path in paths if not path.exists()]:
            if (self.root / "stop").exists():
                raise RuntimeError(f"another process has failed, and {missing[0]} will not come")
            time.sleep(0.5)

    def tuned(self) -> dict:
        """The learning rate and batch size that `tune` found best; nothing on a track that was not tuned."""
        if self.track == "micro":
            return {}
        self.wait_for([run_folder(c, self.root) / "summary.json" for c in tuning_configs(self.track)])
        return best_tuning(self.root / f"sft_tuning_{self.track}", "learning_rate", "batch_size")


def tune(w: Worker) -> None:
    """Learning rates and batch sizes on held-back training problems, dealt out to the processes."""
    w.run(sft, w.share(tuning_configs(w.track)), keep=True)
    print("tuned:", w.tuned(), flush=True)


def sizes(w: Worker) -> None:
    """All sizes; the largest first, and 1,024, where expert iteration begins."""
    configs = [sft_config(w.track, n, w.seed, **w.tuned()) for n in reversed(SIZES)]
    w.run(sft, configs[:2], keep=True)
    w.run(sft, configs[2:])


def updates(w: Worker) -> None:
    """Few examples for as many updates as all of them get: is it the data, or the patience?"""
    few = 128 if w.track == "micro" else 1024
    config = sft_config(w.track, None, w.seed, **w.tuned())
    every = update_count(config, config["pool"] or len(load_problems(config["data"], "train")))
    w.run(sft, [sft_config(w.track, few, w.seed, variant=f"n{few}_long", min_steps=every, **w.tuned())])


def gsm8k_config(w: Worker) -> dict:
    return sft_config(w.track, None, w.seed, variant="gsm8k", data="gsm8k", eval_data="gsm8k", n_eval=1319, epochs=3, evaluations=2,
                      **w.tuned())


def gsm8k(w: Worker) -> None:
    """GSM8K's own 7,473 worked solutions, evaluated on its test set."""
    w.run(sft, [gsm8k_config(w)], keep=True)


def trace_files(w: Worker) -> list[Path]:
    raw = Path("data") / "traces" / f"{w.track}.jsonl"
    return [raw, raw.with_name(f"{raw.stem}_filtered.jsonl")]


def traces(w: Worker) -> None:
    """The first process has the teacher solve training problems, and keeps what is right in a second file."""
    raw, filtered = trace_files(w)
    if w.seed != w.seeds[0] or filtered.exists():
        return
    config = sft_config(w.track)
    w.have(sft_config(w.track, 1024, 0, **w.tuned()))
    problems = load_problems(config["data"], "train", TRACED[w.track] or config["pool"])
    model, tokenizer = load_policy(f"sft_experiments_{w.track}/{TEACHER}")
    engine = w.engine or make_engine(model, tokenizer=tokenizer)
    engine.load_weights(model)
    print("traces:", make_traces(engine, problems, config["prompt"], raw, config["max_tokens"], progress=False))
    print("filtered:", filter_traces(raw, filtered), flush=True)


def quality(w: Worker) -> None:
    """Raw traces of a trained teacher, as many of them as are right, and those that are right."""
    w.wait_for(trace_files(w))
    fewer = {} if w.track == "micro" else {"epochs": 3, "evaluations": 1}
    w.run(sft, quality_configs(w.track, *trace_files(w), w.seed, **w.tuned() | fewer))


def ei_tune(w: Worker) -> None:
    """Learning rates of expert iteration on held-back problems; on the micro track also without a schedule, all seeds."""
    if w.track == "micro":
        w.run(expert_iteration, rate_configs(w.track, seed=w.seed, schedules=("linear", "constant")))
    else:
        best = w.tuned()
        start = tuning_configs(w.track, [best["learning_rate"]], [best["batch_size"]])[0]
        mine = w.share(rate_configs(w.track, policy_name(start)))
        w.have(start, needed=bool(mine))
        w.run(expert_iteration, mine)


def ei_configs(w: Worker) -> list[dict]:
    """The base and its variations, at the rate that `ei_tune` found best."""
    if w.track != "micro":
        w.wait_for([run_folder(c, w.root) / "summary.json" for c in rate_configs(w.track, "")])
    best = best_tuning(w.root / f"ei_tuning_{w.track}", "learning_rate") if w.track != "micro" else {}
    w.have(sft_config(w.track, 1024, w.seed, **w.tuned()), needed=w.track != "micro")
    return variation_configs(w.track, w.seed, **best)


def ei(w: Worker) -> None:
    """Five steps of expert iteration."""
    w.run(expert_iteration, ei_configs(w)[:1])


def ei_vary(w: Worker) -> None:
    """G, the epochs and |D_b|, one at a time, those with the fewest rollouts first; the last policy is for `benchmark`."""
    *others, largest = sorted(ei_configs(w)[1:], key=lambda c: c["questions"] * c["group_size"])
    w.run(expert_iteration, others)
    w.run(expert_iteration, [largest], keep=True)


def benchmark(w: Worker) -> None:
    """Policies trained on GSM-Symbolic, all of it or by expert iteration with the most questions, evaluated without more
    training on GSM8K and on templates never seen."""
    train = {"sft": (f"sft_experiments_{w.track}/nall", lambda: w.have(sft_config(w.track, None, w.seed, **w.tuned()))),
             "ei": (f"ei_{w.track}/Db2048", lambda: w.have(ei_configs(w)[-1], work=expert_iteration))}
    for name, (policy, make) in train.items():
        configs = [sft_config(w.track, None, w.seed, family="benchmark", variant=f"{name}_{Path(data).stem}",
                              model=f"{policy}_seed{w.seed}", eval_data=data, n_eval=n, epochs=0, min_steps=0)
                   for data, n in [("gsm8k", 1319), ("data/gsm_symbolic/heldout.jsonl", 500)]]
        if missing := [c for c in configs if not (run_folder(c, w.root) / "summary.json").exists()]:
            make()
            w.run(sft, missing)


def grpo_starts(w: Worker, seed: int) -> dict[str, dict]:
    """The finetuning runs that GRPO starts from: of 1,024 examples, since all would be known by heart; of all of GSM8K."""
    return {"gsm_symbolic": sft_config(w.track, 1024, seed, **w.tuned()), "gsm8k": gsm8k_config(w) | {"seed": seed}}


def grpo_rates(w: Worker) -> list[grpo.GRPOConfig]:
    start = grpo_starts(w, w.seeds[0])["gsm_symbolic"]
    return [grpo.grpo_config(w.track, family="grpo_lr_sweep", variant=f"lr{rate:g}", seed=w.seeds[0], learning_rate=rate,
                             n_grpo_steps=100, eval_every=25, eval_data="validation", model=policy_name(start)) for rate in GRPO_RATES]


def grpo_lr(w: Worker) -> None:
    """Learning rates of GRPO on held-back training problems, one seed each, dealt out to the processes."""
    w.have(grpo_starts(w, w.seeds[0])["gsm_symbolic"])
    for config in w.share(grpo_rates(w)):
        grpo.train(config, w.bare_engine, w.root, progress=False, compiled=w.compiled, keep_policy=False)


def grpo_run(w: Worker, data: str, family: str = "grpo") -> None:
    """200 steps from the policy finetuned on the same data set, at the best rate of the sweep.

    In the family grpo_alone for its time, with the GPU for itself: `runs.py grpo_alone --seeds 0 --replicas 3`."""
    if family == "grpo_alone" and len(w.seeds) > 1:
        raise ValueError("grpo_alone is timed, and has to be the only run on this machine: give it one seed, --seeds 0")
    w.wait_for([run_folder(asdict(config), w.root) / "summary.json" for config in grpo_rates(w)])
    best = best_tuning(w.root / f"grpo_lr_sweep_{w.track}", "learning_rate")
    w.have(start := grpo_starts(w, w.seed)[data])
    whole_test = {"n_eval": 1319, "eval_every": 25} if data == "gsm8k" else {}
    config = grpo.grpo_config(w.track, family=family, variant=data, seed=w.seed, train_data=data, eval_data=data,
                              model=policy_name(start), **best, **whole_test)
    begin = time.perf_counter()
    summary = grpo.train(config, w.bare_engine, w.root, progress=False, compiled=w.compiled, pass_tokens=65_536 // len(w.seeds))
    print(f"{policy_name(start)}: {summary['final']['answer_accuracy']:.1%} after GRPO, {time.perf_counter() - begin:.0f} s", flush=True)


STAGES = {"tune": tune, "sft": sizes, "traces": traces, "ei_tune": ei_tune, "ei": ei, "ei_vary": ei_vary, "benchmark": benchmark, "gsm8k": gsm8k,
          "quality": quality, "updates": updates, "grpo_lr": grpo_lr, "grpo": partial(grpo_run, data="gsm_symbolic"),
          "grpo_gsm8k": partial(grpo_run, data="gsm8k"), "grpo_alone": partial(grpo_run, data="gsm_symbolic", family="grpo_alone")}


def work(seed: int, seeds: list[int], stages: list[str], track: str, root: Path, compiled: bool, replicas: int, share: float,
         vllm: dict) -> None:
    """The stages of one seed, in this process."""
    failed = []
    with shared_engine(TRACKS[track].model, replicas, replicas * share, **ENGINE | vllm) as engine:
        worker = Worker(seed, seeds, track, root, engine and Remembering(engine), compiled)
        for stage in stages:
            begin = time.perf_counter()
            try:
                STAGES[stage](worker)
            except Exception:  # the other stages may still run
                traceback.print_exc()
                failed.append(stage)
                (root / "stop").touch()
            print(f"== {stage}: {time.perf_counter() - begin:.0f} s", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run_seeds(command: list[str], seeds: list[int], root: Path) -> dict[int, int]:
    """A process for each seed, dealt out to the GPUs; the exit codes of those that failed. The first to fail stops those that wait."""
    gpus, processes, failed = torch.cuda.device_count(), {}, {}
    for k in seeds:
        home = {"CUDA_VISIBLE_DEVICES": str(seeds.index(k) % gpus)} if gpus else {}
        with open(root / "logs" / f"seed{k}.log", "a") as log:
            processes[k] = subprocess.Popen([*command, "--seed", str(k)], stdout=log, stderr=log, env=os.environ | home)
    while len(failed) + sum(p.poll() == 0 for p in processes.values()) < len(processes):
        failed |= {k: p.poll() for k, p in processes.items() if p.poll()}
        if failed:
            (root / "stop").touch()
        time.sleep(1)
    return failed


def main(stages: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(STAGES)}; default: all but grpo_alone")] = None,
         track: str = "pocket", seeds: str = "0,1,2,3", root: Path = Path("results"), compiled: bool = torch.cuda.is_available(),
         replicas: Annotated[int, typer.Option(help="vLLM engines of each process")] = 1,
         share: Annotated[float, typer.Option(help="of a GPU's memory, for each engine")] = 0.05,
         vllm: Annotated[dict, typer.Option(parser=json.loads, help="more options for vLLM, as JSON")] = "{}",
         seed: Annotated[int | None, typer.Option(help="only this one, in this process", hidden=True)] = None) -> None:
    """Runs the stages; the output of each process goes to ROOT/logs/seed<k>.log."""
    stages, numbers = stages or [s for s in STAGES if s != "grpo_alone"], [int(s) for s in seeds.split(",")]
    if unknown := set(stages) - set(STAGES):
        sys.exit(f"unknown stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    if seed is not None:
        return work(seed, numbers, stages, track, root, compiled, replicas, share, vllm)
    (root / "logs").mkdir(parents=True, exist_ok=True)
    (root / "stop").unlink(missing_ok=True)
    options = ["--track", track, "--seeds", seeds, "--root", str(root), "--replicas", str(replicas), "--share", str(share),
               "--vllm", json.dumps(vllm), "--compiled" if compiled else "--no-compiled"]
    with multi_process_service():
        failed = run_seeds([sys.executable, __file__, *stages, *options], numbers, root)
    for k in failed:
        print(f"seed {k} failed:", *(root / "logs" / f"seed{k}.log").read_text().splitlines()[-15:], sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
