"""The queue of runs (E6): what its processes share, remember, wait for and survive; without any training."""
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import engine_throughput
import grpo_step
from cs336_alignment import dpo, models, run_queue as runs, side_by_side, vllm_engine
from cs336_alignment.grpo_settings import grpo_config
from cs336_alignment.inference import SamplingParams
from cs336_alignment.instruction_tuning import tuning_config
from cs336_alignment.runs import finish_run, log_metrics, open_run, read_summary

SEEDED = SamplingParams(seed=3, max_tokens=8)


class Counting:
    """An engine that answers with the number of the call."""

    def __init__(self):
        self.calls, self.loaded, self.tokenizer = 0, [], "a tokenizer"

    def load_weights(self, model):
        self.loaded.append(model)

    def generate(self, prompts, sampling, progress=False):
        self.calls += 1
        return [self.calls] * len(prompts)


def worker(root, seed=0, seeds=(0, 1, 2), track="pocket"):
    return runs.Worker(seed, list(seeds), track, root, None, False)


def test_an_evaluation_is_sampled_once_for_the_same_weights_prompts_and_seed():
    engine, model = runs.Remembering(Counting()), torch.nn.Linear(2, 2)
    engine.load_weights(model)
    first = engine.generate(["a", "b"], SEEDED)
    engine.load_weights(model)
    assert engine.generate(["a", "b"], SEEDED) == first
    assert engine.generate(["a", "c"], SEEDED) != first
    assert engine.generate(["a", "b"], SamplingParams(seed=4, max_tokens=8)) != first
    torch.nn.init.constant_(model.weight, 3.0)
    engine.load_weights(model)
    assert engine.generate(["a", "b"], SEEDED) != first
    assert (engine.tokenizer, len(engine.loaded)) == ("a tokenizer", 3)


@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=8), SamplingParams(n=2, seed=3, max_tokens=8)])
def test_rollouts_are_never_remembered(sampling):
    engine = runs.Remembering(Counting())
    assert engine.generate(["a"], sampling) != engine.generate(["a"], sampling)


def test_runs_are_dealt_out_completely(tmp_path):
    shares = [worker(tmp_path, seed).share(list(range(8))) for seed in (0, 1, 2)]
    assert sorted(sum(shares, [])) == list(range(8)) and max(map(len, shares)) == 3


def test_waiting_ends_with_the_file_or_with_another_process_that_failed(tmp_path):
    there = tmp_path / "there"
    threading.Timer(0.3, there.touch).start()
    begin = time.monotonic()
    worker(tmp_path).wait_for([there])
    assert 0.2 < time.monotonic() - begin < 10
    (tmp_path / "stop").touch()
    worker(tmp_path).wait_for([there])  # what is needed is there
    with pytest.raises(RuntimeError, match="another process has failed, and .*missing"):
        worker(tmp_path).wait_for([tmp_path / "missing"])


def test_a_policy_is_trained_again_only_where_it_is_missing(tmp_path, monkeypatch, capsys):
    calls, config = [], runs.sft_config("pocket", 1024, 2)
    monkeypatch.setenv("CS336_CACHE", str(tmp_path))
    monkeypatch.setattr(runs, "sft", lambda config, engine, root, **options: calls.append((config, root, options["keep"])))
    worker(tmp_path / "results", 2).have(config)
    worker(tmp_path / "results", 2).have(config, needed=False)
    folder = tmp_path / "policies" / "sft_experiments_pocket" / "n1024_seed2"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(asdict(config)))
    worker(tmp_path / "results", 2).have(config)
    (again, root, keep), = calls
    assert again == replace(config, evaluations=1) and keep and root == tmp_path / "results" / "logs" / "again"
    worker(tmp_path / "results", 2).have(replace(config, learning_rate=1.0))  # of this name, but another policy
    assert f"was trained with learning_rate={config.learning_rate}, not 1.0: it is trained again" in capsys.readouterr().out
    assert calls.pop()[0].learning_rate == 1.0
    other = replace(config, variant="Db2048")
    worker(tmp_path / "results", 2).have(other, work=lambda config, *args, **options: calls.append((config, options["keep"])))
    assert calls[1:] == [(other, True)]  # by the work that made it, as it was


def keeps(monkeypatch, tmp_path, *names):
    """In place of trainings: run folder and policy as they leave them. Returns what was trained, as (folder, settings)."""
    trained = []

    def work(config, engine, root, force=False, keep=True, **options):
        with open_run(config, root, force, mirror=False) as run:
            if not run.summary:
                trained.append((str(run.folder.relative_to(tmp_path)), config.learning_rate))
                log_metrics(run, 1, {"eval/answer_accuracy": 0.0})
                folder = tmp_path / "policies" / run.folder.parent.name / run.folder.name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "settings.json").write_text(json.dumps(asdict(config)))
                finish_run(run)

    monkeypatch.setenv("CS336_CACHE", str(tmp_path))
    for module, name in names:
        monkeypatch.setattr(module, name, work)
    return trained


@pytest.mark.parametrize("then, unknown", [(lambda file: shutil.rmtree(file.parent), False), (lambda file: file.unlink(), True),
                                           (lambda file: file.write_text('{"seed"'), True)], ids=["gone", "of an older version", "torn"])
def test_a_policy_that_was_trained_again_before_can_be_again(tmp_path, monkeypatch, capsys, then, unknown):
    """Its run in `logs/again` is finished, with these settings or others: it is moved aside."""
    trained, config = keeps(monkeypatch, tmp_path, (runs, "sft")), runs.sft_config("pocket", 1024, 2)
    place = "r/logs/again/sft_experiments_pocket/n1024_seed2"
    for rate in (1.0, 0.5, 0.5):
        worker(tmp_path / "r", 2).have(replace(config, learning_rate=rate))
    then(tmp_path / "policies" / "sft_experiments_pocket" / "n1024_seed2" / "settings.json")
    worker(tmp_path / "r", 2).have(replace(config, learning_rate=0.5))
    assert trained == [(place, 1.0), (place, 0.5), (place, 0.5)]
    assert "was trained with learning_rate=1.0, not 0.5: it is trained again" in (said := capsys.readouterr().out)
    assert ("n1024_seed2 was trained with settings that are not known" in said) == unknown
    assert len(list((tmp_path / "r/logs/again/sft_experiments_pocket/old").iterdir())) == 2


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
def test_a_run_of_other_settings_is_left_where_it_is(tmp_path, monkeypatch, finished):
    trained, config = keeps(monkeypatch, tmp_path, (dpo, "instruct")), tuning_config("micro", 0)
    home, place = tmp_path / "r", "instruction_tuning_micro/default_seed0"
    for root in (home, home / "logs" / "again"):
        with open_run(replace(config, learning_rate=0.5), root, mirror=False) as run:
            log_metrics(run, 1, {"eval/answer_accuracy": 0.0})
            if finished:
                finish_run(run)
    before = (home / place / "config.json").read_text()
    dpo.have_start(dpo.dpo_config("micro"), home)
    side_by_side.have_policy(config, dpo.instruct, None, side_by_side.again(config, home))
    assert trained == [(f"r/logs/again/{place}", config.learning_rate)] and (home / place / "config.json").read_text() == before


def test_policies_are_evaluated_elsewhere_once_and_made_only_if_that_is_missing(tmp_path, monkeypatch):
    made, ran = [], []
    monkeypatch.setattr(runs, "ei_configs", lambda w: [runs.variation_configs("pocket", w.seed)[-1]])
    monkeypatch.setattr(runs.Worker, "tuned", lambda w: {})
    monkeypatch.setattr(runs.Worker, "have", lambda w, config, **options: made.append(runs.policy_name(config)))
    monkeypatch.setattr(runs.Worker, "run", lambda w, work, configs: ran.extend(configs))
    runs.benchmark(worker(tmp_path, 1))
    assert made == ["sft_experiments_pocket/nall_seed1", "ei_pocket/Db2048_seed1"] == list(dict.fromkeys(c.model for c in ran))
    assert [c.variant for c in ran] == ["sft_gsm8k", "sft_heldout", "ei_gsm8k", "ei_heldout"]
    for config in ran:
        folder = runs.run_folder(config, tmp_path)
        folder.mkdir(parents=True)
        (folder / "summary.json").touch()
    runs.benchmark(worker(tmp_path, 1))
    assert len(made) == 2 and len(ran) == 4


def test_the_policy_for_the_benchmark_is_the_one_that_is_kept(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(runs, "ei_configs", lambda w: runs.variation_configs("micro", 0))
    monkeypatch.setattr(runs.Worker, "run", lambda w, work, configs, keep=False: kept.update({c.variant: keep for c in configs}))
    runs.ei_vary(worker(tmp_path))
    names = [c.variant for c in runs.variation_configs("micro", 0)]
    assert set(kept) == set(names[1:]) and [v for v, keep in kept.items() if keep] == names[-1:]


def test_the_fastest_number_of_engines_is_kept():
    engine = SimpleNamespace(backend=SimpleNamespace(replicas=["a", "b", "c"]))
    engine.generate = lambda *args, **options: time.sleep({1: 0.1, 2: 0.02, 3: 0.06}[len(engine.backend.replicas)])
    seconds = grpo_step.rollout_seconds(engine, [], None, 1)
    assert list(seconds) == [1, 2, 3] and engine.backend.replicas == ["a", "b"]


def test_the_literal_loop_has_one_of_the_engines():
    engine = SimpleNamespace(backend=SimpleNamespace(replicas=["a", "b"]))
    with pytest.raises(KeyboardInterrupt), grpo_step.one_at_work(engine):
        assert engine.backend.replicas == ["a"]
        raise KeyboardInterrupt
    assert engine.backend.replicas == ["a", "b"]
    with grpo_step.one_at_work(SimpleNamespace()):  # transformers: has no replicas
        pass


def test_a_step_costs_what_more_tokens_cost_without_the_prompts():
    engine = SimpleNamespace(generate=lambda prompts, sampling, progress: time.sleep(0.2 + 0.01 * sampling.max_tokens))
    assert 0.009 < engine_throughput.step_seconds(engine, ["a"], 10) < 0.013


def test_a_stage_that_fails_leaves_the_others_running_and_is_told(tmp_path, monkeypatch, capsys):
    done = []

    def broken(w):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(vllm_engine, "shared_engine", lambda *args, **options: nullcontext(done.append(options["max_num_seqs"])))
    monkeypatch.setattr(runs, "STAGES", {"first": broken, "second": lambda w: done.append(w.seed)})
    with pytest.raises(SystemExit, match="failed: first"):
        runs.work(1, [0, 1], ["first", "second"], "micro", tmp_path, False, 1, 0.1, {"max_num_seqs": 64})
    assert done == [64, 1] and (tmp_path / "stop").exists()
    assert "broken on purpose" in capsys.readouterr().err


def test_an_unknown_stage_is_named_before_anything_starts(tmp_path):
    done = subprocess.run([sys.executable, Path(runs.__file__), "sfft", "--root", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown stage sfft; there are: tune, sft" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_each_seed_is_a_process_and_the_ones_that_fail_are_told(tmp_path):
    (tmp_path / "logs").mkdir()
    failed = runs.run_seeds([sys.executable, "-c", "import sys; print(sys.argv); sys.exit(int(sys.argv[2]) % 2)"], [1, 2, 3], tmp_path)
    assert failed == {1: 1, 3: 1} and (tmp_path / "stop").exists()
    assert (tmp_path / "logs" / "seed2.log").read_text() == "['-c', '--seed', '2']\n"


def test_by_default_all_stages_of_the_course_line_run(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(runs, "run_seeds", lambda command, seeds, root: commands.append(command) or {})
    with pytest.raises(SystemExit):
        runs.main(root=tmp_path, vllm={})
    assert [word for word in commands[0] if word in runs.STAGES] == [name for name in runs.STAGES if name not in ("instruct", "dpo")]


# --- side by side (E12)

def job(variant="a", seed=0, **changes):
    tiny = dict(n_grpo_steps=2, rollout_batch_size=16, train_batch_size=16, n_eval=8, eval_every=2)
    return side_by_side.Job(grpo_config("micro", family="side", variant=variant, seed=seed, **tiny | changes))


def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    jobs = [job("broken", model=str(tmp_path / "nowhere")), job("whole"), job("more", seed=1)]
    with pytest.raises(RuntimeError, match="a run failed; the others are finished.*(?s:.*)ModelMissing"):
        side_by_side.run_side_by_side(jobs, tmp_path, processes=2, progress=False)
    done = [read_summary(j.folder(tmp_path)) for j in jobs]
    assert done[0] is None and [s["steps"] for s in done[1:]] == [2, 2]
    assert list((tmp_path / "logs" / "claims").glob("*/broken_seed0.failed"))


def test_a_folder_with_another_run_is_refused_before_any_starts(tmp_path, monkeypatch):
    taken, free = job("taken"), job("free")
    folder = taken.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(taken.config) | {"learning_rate": 1.0}))
    (folder / "summary.json").write_text("{}")  # finished: it would be read as the run that was asked for
    monkeypatch.setattr(side_by_side, "start_process", lambda *args: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match="learning_rate .1.0 there"):
        side_by_side.run_side_by_side([free, taken], tmp_path, processes=1, progress=False)
    assert not (tmp_path / "logs").exists()


def test_ctrl_c_lets_the_processes_finish_their_step_and_the_same_call_goes_on(tmp_path):
    code = ("import sys; from pathlib import Path; sys.path.insert(0, 'tests'); from test_queue import job; "
            "from cs336_alignment.side_by_side import run_side_by_side\n"
            "print([s and s['steps'] for s in run_side_by_side([job(n_grpo_steps=400)], Path(sys.argv[1]), 1, progress=False)])")
    root = Path(__file__).resolve().parent.parent
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # behind nohup and & it is ignored
    metrics = job().folder(tmp_path) / "metrics.jsonl"
    until = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.1)
    parent.send_signal(2)
    said = parent.communicate(timeout=300)[0]
    assert "will stop after the steps that are under way" in said and said.strip().endswith("[None]")
    stopped = metrics.read_text().count("\n")
    assert 3 < stopped < 400 and list((metrics.parent / "checkpoints").glob("step_*"))


def test_a_claimed_job_is_left_to_its_process(tmp_path):
    with side_by_side.claimed([job()], tmp_path) as mine, side_by_side.claimed([job()], tmp_path) as others:
        pass  # an error in here would be a failed job's, and be kept
    assert (mine, others) == ([job()], [])
    with side_by_side.claimed([job()], tmp_path):
        raise ZeroDivisionError("broken on purpose")
    with side_by_side.claimed([job()], tmp_path) as mine:
        pass
    assert mine == []  # failed: not tried again by this call's other processes


@pytest.mark.parametrize("gpus, processes, jobs, expected", [(0, None, 9, 1), (0, None, 1, 1), (2, None, 9, 8), (2, 3, 9, 3), (4, None, 5, 5)])
def test_processes_are_spread_over_gpus_or_cores(monkeypatch, gpus, processes, jobs, expected):
    monkeypatch.setattr(side_by_side.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda pid: {0})
    found = side_by_side.places(processes, jobs)
    assert len(found) == expected
    assert [p.get("CUDA_VISIBLE_DEVICES") for p in found] == [str(k % gpus) if gpus else None for k in range(expected)]


def test_only_the_gpus_that_the_user_chose_are_used(monkeypatch, tmp_path):
    """As CUDA_VISIBLE_DEVICES names them, not numbered from 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in side_by_side.places(3, 9)] == ["2", "GPU-5e", "2"]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in side_by_side.places(1, 9, 2)] == ["2,GPU-5e"]
    (tmp_path / "logs").mkdir()
    say = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert runs.run_seeds([sys.executable, "-c", say], [3, 4, 5], tmp_path) == {}
    assert [(tmp_path / "logs" / f"seed{k}.log").read_text().strip() for k in (3, 4, 5)] == ["2", "GPU-5e", "2"]


def test_a_large_model_has_a_gpu_to_itself(monkeypatch):
    from cs336_alignment import grpo_experiments as grpo
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(side_by_side, "run_side_by_side",
                        lambda jobs, root, processes, share=None, **options: seen.append((processes, share)) or [None])
    for track, asked in [("pocket", ()), ("course", ()), ("course", (2, 0.5))]:
        grpo.run_experiment("baselines", grpo.experiment_runs("baselines", track, 1), None, *asked)
    assert seen == [(8, 0.05), (2, 0.35), (2, 0.5)]
