"""Runs against the clock: the budget, what a kill leaves, and what is refused before anything is written."""
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_commands import call

from cs336_alignment import grpo_experiments, grpo_runs, leaderboard, side_by_side
from cs336_alignment.leaderboard import Clock, leaderboard_config, leaderboard_runs, run_leaderboard, to_confirm
from cs336_alignment.models import load_policy
from cs336_alignment.runs import publish, read_metrics, read_summary, run_folder, run_table

TINY = {"budget_s": 6.0, "n_eval": 8, "evaluations": 3, "grpo.rollout_batch_size": 16, "grpo.train_batch_size": 16, "pool": 64}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Imports and the micro model come before the first clock starts."""
    load_policy("micro")


class Ticking(Clock):
    """A clock that only steps move, so that a busy machine changes nothing."""

    def now(self):
        return round(self.spent, 6)

    @contextmanager
    def paused(self):
        yield


@pytest.fixture
def ticks(monkeypatch):
    """How long a step takes, by kind, moved by hand: {"sft": 0.4, "grpo": 0.9}; and what a step begins with."""
    clocks, seconds, seen = [], {"sft": 0.4, "grpo": 0.9}, []
    monkeypatch.setattr(leaderboard, "Clock", lambda *args: clocks.append(Ticking(*args)) or clocks[-1])

    def ticking(kind, step_of):
        def turn(s, *rest):
            seen.append({"kind": kind, "at": clocks[-1].now(), "problems": len(s.problems), "weights": weights(s),
                         "updates": grpo_runs.steps_taken(s.optimizer)})
            line = step_of(s, *rest)
            clocks[-1].spent += seconds[kind](clocks[-1].now()) if callable(seconds[kind]) else seconds[kind]
            return line
        return turn

    monkeypatch.setattr(leaderboard, "sft_turn", ticking("sft", leaderboard.sft_turn))
    monkeypatch.setattr(grpo_runs, "run_step", ticking("grpo", grpo_runs.run_step))
    return seconds, seen


def weights(s):
    return [p.detach().clone() for p in s.policy.parameters()]


def test_stages_come_in_order_and_evaluations_at_their_marks(tmp_path, ticks):
    config = leaderboard_config("micro", "sft50_grpo", **TINY | {"budget_s": 10.0})
    summary = run_leaderboard(config, tmp_path)
    lines = read_metrics(run_folder(config, tmp_path))
    trained = [("grpo" if "train/s_rollout" in line else "sft", line["train/clock_s"]) for line in lines if "train/clock_s" in line]
    # finetuning: 12 steps to 4.8 s, as the next would be expected to end at 5.3; then five of 0.9 s to 9.3
    assert trained == [("sft", round(0.4 * k, 6)) for k in range(1, 13)] + [("grpo", round(4.8 + 0.9 * k, 6)) for k in range(1, 6)]
    assert (summary["sft_steps"], summary["grpo_steps"], summary["final"]["clock_s"]) == (12, 5, 9.3)
    evaluated = [line for line in lines if "eval/answer_accuracy" in line]
    assert [line["eval/clock_s"] for line in evaluated] == [3.6, 7.5, 9.3] and {line["eval/n"] for line in evaluated} == {8}
    assert run_leaderboard(config, tmp_path)["final"]["clock_s"] == 9.3  # finished: read, not run
    row, = run_table(publish("leaderboard_search_changed_micro", tmp_path / "leaderboard_search_changed_micro", tmp_path / "out" / "published")).to_dict("records")
    assert (row["clock_s"], row["sft_steps"], row["config"]["stages"]) == (9.3, 12, config.stages)


def test_a_step_that_ends_too_late_is_taken_back(tmp_path, ticks, monkeypatch):
    (seconds, seen), plain, evaluated = ticks, leaderboard.evaluate_at, []
    seconds["sft"] = lambda now: 0.4 if now < 9 else 2.0
    monkeypatch.setattr(leaderboard, "evaluate_at", lambda s, place: (evaluated.append(weights(s)), plain(s, place)))
    summary = run_leaderboard(leaderboard_config("micro", "sft", **TINY | {"budget_s": 10.0, "evaluations": 1}), tmp_path)
    assert (summary["sft_steps"], summary["steps"], summary["final"]["clock_s"]) == (23, 23, 9.2) and seen[-1]["at"] == 9.2
    assert all(torch.equal(before, p) for before, p in zip(seen[-1]["weights"], evaluated[-1], strict=True))
    seconds["sft"] = lambda now: 0.4 if now < 3 else 20.0  # a stall, when nobody could expect it
    summary = run_leaderboard(leaderboard_config("micro", "sft", 1, **TINY | {"budget_s": 10.0, "evaluations": 1}), tmp_path)
    assert (summary["sft_steps"], summary["final"]["clock_s"]) == (8, 3.2) and seen[-1]["at"] == 3.2
    assert all(torch.equal(before, p) for before, p in zip(seen[-1]["weights"], evaluated[-1], strict=True))


def test_on_a_real_clock_no_run_takes_more_than_its_budget(tmp_path):
    config = leaderboard_config("micro", "sft50_grpo", **TINY)
    clock, summary = time.perf_counter(), run_leaderboard(config, tmp_path)
    assert 0 < summary["final"]["clock_s"] <= 6 and summary["final"]["clock_s"] < time.perf_counter() - clock and summary["sft_steps"]


def test_a_budget_without_room_for_a_step_is_refused(tmp_path, monkeypatch):
    fast = leaderboard.sft_turn
    monkeypatch.setattr(leaderboard, "sft_turn", lambda *args: (time.sleep(3.0), fast(*args))[1])
    config = leaderboard_config("micro", "sft", **TINY | {"budget_s": 3.0})
    for spent in (0.0, 4.0):  # the first step is too long; loading was
        with pytest.raises(ValueError, match="a budget of 3 s is too small: .* went into loading"):
            run_leaderboard(config, tmp_path, spent=spent)
    assert read_metrics(run_folder(config, tmp_path)) == [] and not read_summary(run_folder(config, tmp_path))


def test_the_clock_of_a_killed_run_goes_on(tmp_path, ticks, monkeypatch):
    config = leaderboard_config("micro", "filter", **TINY | {"budget_s": 10.0, "filter.of": 16, "filter.tries": 2})
    _, seen = ticks
    save = leaderboard.save_checkpoint

    def die_in_grpo(run, step, parts, place):
        save(run, step, parts, place)
        if place["stage"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(leaderboard, "save_checkpoint", die_in_grpo)
    with pytest.raises(KeyboardInterrupt):
        run_leaderboard(config, tmp_path)
    killed, before = len(read_metrics(run_folder(config, tmp_path))), len(seen)
    monkeypatch.setattr(leaderboard, "save_checkpoint", save)
    summary = run_leaderboard(config, tmp_path, spent=0.3)  # loading again
    assert [(s["kind"], s["at"]) for s in seen[before:]] == [("grpo", 7.8), ("grpo", 8.7)]  # on from 7.5, and loading
    assert len({s["problems"] for s in seen if s["kind"] == "grpo"}) == 1 and seen[-1]["problems"] < 16  # not filtered again
    assert seen[before]["updates"] >= seen[before - 1]["updates"] > 0  # the optimizer has not forgotten
    assert (summary["sft_steps"], summary["grpo_steps"], summary["final"]["clock_s"]) == (12, 5, 9.6)
    assert len(read_metrics(run_folder(config, tmp_path))) > killed


def test_only_problems_solved_sometimes_are_kept(monkeypatch):
    class Engine:
        def generate(self, prompts, sampling, progress):
            right = [0, 1, 2]  # of two tries
            text = lambda answer: type("Completion", (), {"text": f" x </think> <answer> {answer} </answer>"})
            return [[text(1 if k < right[i] else 0) for k in range(sampling.n)] for i in range(len(prompts))]
    config = leaderboard.grpo_config("micro", prompt="r1_zero", max_tokens=8)
    problems = [leaderboard.Problem(f"{i}?", "1") for i in range(3)]
    assert leaderboard.solved_sometimes(type("S", (), {"config": config, "engine": Engine()}), problems, 2) == [1]


def search(root, accuracies: dict, **changes):
    """Finished runs of a search, by hand."""
    for recipe, accuracy in accuracies.items():
        config = leaderboard_config("micro", recipe, **changes)
        with leaderboard.open_run(config, root, mirror=False) as run:
            leaderboard.log_metrics(run, 1, {"eval/answer_accuracy": accuracy})
            leaderboard.finish_run(run)


ALL = {"sft": 0.6, "sft_rate_half": 0.9, "sft_rate_double": 0.1, "grpo": 0.5, "sft50_grpo": 0.8, "sft80_grpo": 0.7}


def test_what_is_confirmed_was_best_on_held_back_problems(tmp_path):
    with pytest.raises(ValueError, match="the search has finished no recipe"):
        to_confirm("micro", {}, tmp_path)
    search(tmp_path, {k: v for k, v in ALL.items() if k != "sft80_grpo"})
    with pytest.raises(ValueError, match="missing: sft80_grpo"):
        leaderboard_runs("micro", True, root=tmp_path)
    search(tmp_path, {"sft80_grpo": 0.7})
    search(tmp_path, ALL | {"sft": 0.95, "grpo": 0.9}, budget_s=9.0)
    runs = leaderboard_runs("micro", True, root=tmp_path)
    assert [(r.variant, r.seed) for r in runs] == [(name, seed) for seed in range(100, 104) for name in ("sft_rate_half", "sft50_grpo")]
    assert {(r.eval_data, r.family) for r in runs} == {("micro", "leaderboard")}
    assert to_confirm("micro", {"budget_s": 9.0}, tmp_path) == ["sft", "grpo"]  # another budget, another search
    changed = leaderboard_runs("micro", True, changes={"budget_s": 9.0}, root=tmp_path)
    assert {(r.family, r.recipe) for r in changed} == {("leaderboard_changed", "sft"), ("leaderboard_changed", "grpo")}  # published apart
    assert {r.eval_data for r in leaderboard_runs("micro")} == {"validation"}


def test_one_entry_is_confirmed(tmp_path):
    search(tmp_path, ALL)
    search(tmp_path, {"sft_rate_half": 0.5, "sft50_grpo": 0.5}, seed=100, confirm=True)
    assert to_confirm("micro", {}, tmp_path) == ["sft_rate_half", "sft50_grpo"]  # the same again: more seeds, or to go on
    search(tmp_path, {"sft80_grpo": 1.0}, seed=1)
    with pytest.raises(ValueError, match="chooses sft_rate_half and sft80_grpo, but the confirmation has runs of sft50_grpo"):
        to_confirm("micro", {}, tmp_path)
    search(tmp_path, {"sft_rate_half": 0.5}, seed=100, confirm=True, budget_s=9.0)  # other settings, a family apart
    assert leaderboard.confirmed("micro", {"budget_s": 9.0}, tmp_path) == {"sft_rate_half"}


def test_a_stage_does_not_change_how_its_run_is_evaluated(tmp_path, ticks, monkeypatch):
    plain, seen = grpo_runs.evaluate_run, []
    monkeypatch.setattr(grpo_runs, "evaluate_run", lambda s, step: seen.append(s.config) or plain(s, step))
    step_of, trained = grpo_runs.run_step, []
    monkeypatch.setattr(grpo_runs, "run_step", lambda s, step: trained.append(s.config) or step_of(s, step))
    config = leaderboard_config("micro", "sft50_grpo", **TINY | {"grpo.temperature": 0.2, "grpo.max_tokens": 32, "grpo.min_tokens": 3})
    run_leaderboard(config, tmp_path)
    assert {(c.temperature, c.max_tokens, c.min_tokens, c.prompt) for c in trained} == {(0.2, 32, 3, config.prompt)}
    rules = leaderboard.evaluation_config(vars(config))
    assert len(seen) > 1 and all(c == rules for c in seen) and (rules.temperature, rules.max_tokens, rules.n_eval) == (1.0, 64, 8)
    assert rules == leaderboard.evaluation_config(vars(leaderboard_config("micro", "sft", **TINY)))


@pytest.mark.parametrize("name", ["model", "data", "train_data", "eval_data", "pool", "n_eval", "family", "variant", "seed", "prompt",
                                  "n_grpo_steps", "eval_every"])
def test_stages_choose_nothing_that_is_the_runs(name):
    for kind in ("sft", "grpo"):
        with pytest.raises(ValueError, match=f"{kind}.{name} is no choice of a stage"):
            leaderboard_config("micro", "sft50_grpo", **{f"{kind}.{name}": 1})
        with pytest.raises(ValueError, match=f"{kind}.{name} is no choice of a stage"):  # nor in a table
            replace(leaderboard_config("micro", "sft"), stages=[{"kind": kind, "until": 1.0, name: 1}])


def test_a_recipe_trains():
    for stages in ([], [{"kind": "filter", "tries": 2, "of": 8}]):
        with pytest.raises(ValueError, match="no stage that trains"):
            replace(leaderboard_config("micro", "sft"), stages=stages)
    with pytest.raises(ValueError, match="until a share of the budget"):
        replace(leaderboard_config("micro", "sft"), stages=[{"kind": "sft", "until": 2.0}])


@pytest.mark.parametrize("changes", [{"n_eval": 8}, {"temperature": 0.5}, {"max_tokens": 8}, {"prompt": "r1_zero"}, {"eval_data": "validation"}])
def test_a_confirmation_keeps_the_rules(changes):
    with pytest.raises(ValueError, match="a confirmation keeps the track's rules"):
        leaderboard_config("micro", "sft", 100, True, **changes)


def test_the_courses_model_may_lie_in_a_folder():
    config = leaderboard_config("course", "sft", model="somewhere")
    assert (config.model, config.variant, config.family) == ("somewhere", "sft", "leaderboard_search")
    with pytest.raises(ValueError, match="no other model"):
        leaderboard_config("pocket", "sft", model="somewhere")


@pytest.mark.parametrize("args, expected", [
    (["--only", "ppo"], "no recipe 'ppo'; there are: sft, sft_rate_half"), (["--confirm"], "the search has finished no recipe"),
    (["--confirm", "--only", "sft"], "--confirm takes no --only"), (["--budget", "-1"], "budget_s = -1.0"),
    (["--set", "eval_data=micro"], "--set eval_data: this command"), (["--set", "grpo.overlap=True"], "overlap would sample on"),
    (["--set", "grpo.nope=1"], "unknown setting nope"), (["--seeds", "101"], "are the confirmation's"), (["--set", "stages=[]"], "stages cannot be set"),
    (["--set", "sft.until=0.5"], "sft.until cannot be set"), (["--budget", "0.01"], "no model is loaded"), (["--track", "nope"], "micro, pocket, course"), (["--set", "nope.x=1"], "nope.x"),
    (["--set", "data=gsm8k"], "no other data"), (["--set", "prompt=nope"], "shipped prompts"), (["--model", "nope"], "no other model"),
    (["--set", "model=nope"], "--set model: this command"), (["--set", "pool=4096"], "the track's training problems are 2,048"),
    (["--dry-run", "--set", "n_eval=100000000"], "cannot be held back"),
    (["--confirm", "--set", "grpo.n_eval=9"], "no choice of a stage"), (["--set", "recipe=sft"], "--set recipe: this command"), (["--set", "confirm=True"], "--set confirm: this command"),
    (["--set", "n_eval=4000"], "cannot be held back"), (["--set", "family=grpo"], "--set family: this command"),
])
def test_refusals_come_at_once_and_leave_nothing(args, expected, tmp_path):
    track = [] if "--track" in args else ["--track", "micro"]
    status, said, imported = call("grpo_experiments", "leaderboard", *args, *track, "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and expected in said and not imported, said
    assert said.startswith("error: ") and list(tmp_path.iterdir()) == []


def test_what_a_run_refuses_is_told_without_its_traceback(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a run failed. x.log ends in\nTraceback (most recent call last):\n  File x\n" + last)
    monkeypatch.setattr(side_by_side, "run_side_by_side", fails)
    runs = leaderboard_runs("micro", only=["sft"])
    for last, shown in [("ValueError: a budget of 2 s is too small", False), ("KeyError: 3", True)]:  # the second is our mistake
        with pytest.raises(RuntimeError, match=last) as told:
            grpo_experiments.race(runs, None, 1)
        assert ("Traceback" in str(told.value)) is shown


def test_dry_run_shows_the_courses_rules(tmp_path):
    status, said, imported = call("grpo_experiments", "leaderboard", "--track", "course", "--dry-run", "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert (status, imported) == (0, set()) and "14,400 s each, from Qwen/Qwen2.5-Math-1.5B" in said and "1,024 tokens" in said
    assert list(tmp_path.iterdir()) == []


def test_each_run_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert side_by_side.with_their_own(2) == 2 and side_by_side.with_their_own(1) == 4
    assert [place["CUDA_VISIBLE_DEVICES"] for place in side_by_side.places(2, 9, 2)] == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="8 GPUs a run, but this process sees 4"):
        side_by_side.with_their_own(8)
    assert leaderboard.other_gpus() == dict(replicas=3, devices=[1, 2, 3], gpu_memory_utilization=0.85)


def test_the_clock_of_a_process_begins_with_it(tmp_path, monkeypatch):
    config = leaderboard_config("micro", "sft", **TINY)
    monkeypatch.setattr(side_by_side, "process_age", lambda: 3.0)
    assert side_by_side.run_job([side_by_side.Job(config)], None, tmp_path, False, False, 16_384)
    clocks = [line["train/clock_s"] for line in read_metrics(run_folder(config, tmp_path)) if "train/clock_s" in line]
    assert 3.0 < clocks[0] and clocks[-1] <= 6.0
    job = side_by_side.Job(config)
    side_by_side.write_jobs(tmp_path / "jobs", [job])
    assert side_by_side.read_jobs(tmp_path / "jobs") == [job]
