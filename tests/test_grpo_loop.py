"""What notebook 12 cannot show: GRPO runs that are killed, interrupted, or lose their engine, grader or numbers.

Runs that are killed happen in child processes made by fork, so that the imports are paid for once. The policy is a
tiny Llama with the micro model's tokenizer; its reward is one that it can get by chance (a digit in the answer), so
that there is something to learn."""
import contextlib, io, json, math, os, queue, random, signal, statistics, subprocess, sys, threading, time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from jupyter_client import KernelManager
from transformers import LlamaConfig, LlamaForCausalLM

import kills
from cs336_alignment import data, drgrpo_grader, grpo, grpo_runs, log, models, packing, runs, stacked
from cs336_alignment.grpo_runs import RunStopped, run_grpo
from cs336_alignment.grpo_settings import NAMED, GRPOConfig, grpo_config
from cs336_alignment.grpo_helper import grpo_microbatch_train_step
from cs336_alignment.inference import Completion, SamplingParams, TransformersEngine
from cs336_alignment.packing import accumulate_gradients, make_optimizer
from cs336_alignment.runs import read_metrics, run_folder
from cs336_alignment.sft_helper import get_response_log_probs
from kills import ended_by, in_child, kill_ten_times

torch.set_num_threads(1)  # a process with one thread can be forked
CONFIG = grpo_config("micro", model="tiny", n_grpo_steps=12, rollout_batch_size=16, train_batch_size=16, group_size=4,
                     max_tokens=8, n_eval=8, eval_every=4, checkpoint_every=3, learning_rate=1e-2)
OFF_POLICY = replace(CONFIG, variant="off", loss_type="grpo_clip", epochs_per_rollout_batch=2, train_batch_size=8,
                     kl_coef=0.01, tis_cap=2.0)


def tiny_policy(*args, width=16, **kwargs):
    """In place of `load_policy`: random weights, the same each time, and the character tokenizer."""
    tokenizer = models.character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    return model.eval(), tokenizer


def digits_reward(response, ground_truth):
    """1 for an answer with a digit."""
    right = float(any(c.isdigit() for c in response))
    return {"format_reward": 1.0, "answer_reward": right, "reward": right}


def rewarded_by(monkeypatch, reward_fn):
    """In place of the prompt's reward function, in training and evaluation."""
    for module in (grpo, log, stacked):
        monkeypatch.setattr(module, "reward_fn_of", lambda prompt: reward_fn)


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """Policies are tiny, rewards easy; nothing is written outside the run's folder."""
    monkeypatch.setattr(runs, "environment", lambda: {"gpu": None})
    for module in (grpo_runs, stacked):
        monkeypatch.setattr(module, "load_policy", tiny_policy)
        monkeypatch.setattr(module, "run_problems", lambda config: (grpo_problems("train")[:50], grpo_problems("test")[:config.n_eval]))
    rewarded_by(monkeypatch, digits_reward)
    monkeypatch.setattr(grpo_runs, "save_policy", lambda *args: None)
    monkeypatch.setattr(grpo_runs, "vllm_problem", lambda: "not here.")


def grpo_problems(split, cache={}):
    if split not in cache:
        cache[split] = models.micro_problems(50, 0, split)
    return cache[split]


def quiet_train(root, config=CONFIG, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        summary = run_grpo(config, root=root, mirror=False, progress=False, **kwargs)
    return summary, out.getvalue()


def record(root, config=CONFIG):
    return kills.record(run_folder(asdict(config), root))


def metrics_of(root, config=CONFIG):
    return read_metrics(run_folder(asdict(config), root))


# --- kills

def test_ten_random_kills_draw_the_same_curve(tmp_path):
    """Off-policy updates, a KL term and importance weights, so that everything a run holds takes part."""
    config, begin = replace(OFF_POLICY, n_grpo_steps=20, checkpoint_every=2), time.monotonic()
    assert ended_by(in_child(lambda: quiet_train(tmp_path / "whole", config))) == 0
    kill_ten_times(lambda: quiet_train(tmp_path / "killed", config), run_folder(asdict(config), tmp_path / "killed"),
                   0.25 * (time.monotonic() - begin))
    assert record(tmp_path / "killed", config) == record(tmp_path / "whole", config)
    whole = metrics_of(tmp_path / "whole", config)
    assert [line["step"] for line in whole] == list(range(config.n_grpo_steps + 1))
    assert whole[-1]["train/reward_mean"] > whole[1]["train/reward_mean"]  # it learns, so the curve is no constant


# --- stopped by hand

class CallsAt(TransformersEngine):
    """An engine over a policy of its own that calls `act()` in its k-th `generate`."""

    def __init__(self, k, act):
        super().__init__(*tiny_policy(), batch_size=64)
        self.left, self.act = k, act

    def generate(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().generate(*args, **kwargs)


def test_ctrl_c_finishes_the_step_saves_and_goes_on(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    engine = CallsAt(6, lambda: os.kill(os.getpid(), signal.SIGINT))  # evaluation at 0, steps 1 … 4, evaluation at 4
    summary, said = quiet_train(tmp_path / "stopped", engine=engine)
    assert summary is None and "stopped by hand, safe after step 4" in said
    assert metrics_of(tmp_path / "stopped")[-1]["step"] == 4 and signal.getsignal(signal.SIGINT) is before
    assert runs.find_checkpoint(run_folder(asdict(CONFIG), tmp_path / "stopped")).name == "step_00000004"
    assert not engine.closed  # it is the caller's
    checkpoint = runs.find_checkpoint(run_folder(asdict(CONFIG), tmp_path / "stopped")) / "state.pt"
    safe, seen = torch.load(checkpoint, weights_only=True)["parts"]["model"], []
    fresh = CallsAt(1, lambda: seen.append({k: v.clone() for k, v in fresh.model.state_dict().items()}))
    quiet_train(tmp_path / "stopped", engine=fresh)
    assert all(safe[name].equal(w) for name, w in seen[0].items()), "it sampled before it was given the weights"
    quiet_train(tmp_path / "whole")
    stopped, whole = record(tmp_path / "stopped"), record(tmp_path / "whole")
    assert without_rounding(stopped) == without_rounding(whole)


@pytest.mark.parametrize("overlap, k, last", [(False, 6, 6), (True, 2, 2)], ids=["in an evaluation", "in the first rollouts"])
def test_nothing_is_sampled_ahead_once_a_stop_is_asked_for(tmp_path, overlap, k, last):
    engine = CallsAt(k, ctrl_c)
    assert quiet_train(tmp_path, replace(CONFIG, overlap=overlap), engine=engine)[0] is None
    assert k - engine.left == last


def test_ctrl_c_in_the_last_step_finishes_the_run(tmp_path):
    summary, said = quiet_train(tmp_path, engine=CallsAt(15, ctrl_c))  # evaluations at 0, 4, 8 and steps 1 … 12
    assert summary["steps"] == 12 and "will stop after this step" in said and "stopped by hand" not in said


def without_rounding(records):
    """Two engines may sum in another order; rewards and lengths must still be the same."""
    keys = ("step", "train/reward_mean", "train/mean_tokens", "eval/answer_accuracy", "eval/mean_tokens")
    return [{k: line[k] for k in keys if k in line} for line in records["metrics.jsonl"]]


@pytest.fixture
def python_handles_ctrl_c():
    """As in a terminal. A shell that starts tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once(tmp_path, python_handles_ctrl_c):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        quiet_train(tmp_path, engine=CallsAt(6, twice))
    assert signal.getsignal(signal.SIGINT) is before
    assert runs.find_checkpoint(run_folder(asdict(CONFIG), tmp_path)).name == "step_00000003"


# --- checkpoints that are written while the next step runs

def on_slow_disk(monkeypatch, wait):
    """Checkpoints are written once `wait()` returns; the list of their steps, as they begin."""
    write, begun = runs.write_checkpoint, []

    def slow(folder, state, position):
        begun.append(position["step"])
        wait()
        write(folder, state, position)

    monkeypatch.setattr(runs, "write_checkpoint", slow)
    return begun


def test_a_step_does_not_wait_for_the_checkpoint_of_the_one_before(tmp_path, monkeypatch):
    """The checkpoint of step 3 is written when step 4 samples; and the run is the one on a fast disk."""
    quiet_train(tmp_path / "whole", engine=CallsAt(0, None))
    sampled, waited = threading.Event(), []
    begun = on_slow_disk(monkeypatch, lambda: waited.append(sampled.wait(20)))
    quiet_train(tmp_path / "slow", engine=CallsAt(5, sampled.set))  # the evaluation at 0, steps 1 … 4
    assert begun == [3, 6, 9, 12] and all(waited)
    assert record(tmp_path / "slow") == record(tmp_path / "whole")


@pytest.mark.parametrize("act, way_out", [(lambda: fail(), pytest.raises(RunStopped, match="step 4 failed(.|\n)*safe after step 3")),
                                          (lambda: (ctrl_c(), ctrl_c()), pytest.raises(KeyboardInterrupt, match="safe after step 3"))],
                         ids=["failed", "Ctrl-C twice"])
def test_what_ends_a_run_waits_for_the_checkpoint(tmp_path, monkeypatch, python_handles_ctrl_c, act, way_out):
    begun = on_slow_disk(monkeypatch, lambda: time.sleep(0.5))
    with way_out:
        quiet_train(tmp_path, engine=CallsAt(5, act))
    assert begun == [3] and runs.find_checkpoint(run_folder(asdict(CONFIG), tmp_path)).name == "step_00000003"


def test_where_a_stopped_run_is_safe_is_on_disk_when_it_is_said(tmp_path, monkeypatch):
    on_slow_disk(monkeypatch, lambda: time.sleep(0.3))
    there = {}
    monkeypatch.setattr(grpo_runs, "say", lambda run, what: there.update({what: runs.find_checkpoint(run.folder)}))
    quiet_train(tmp_path, engine=CallsAt(5, ctrl_c))
    (what, checkpoint), = there.items()
    assert "safe after step 4" in what and checkpoint.name == "step_00000004"


# --- stopped by hand in a notebook

LIVE_SETUP = """
from types import SimpleNamespace
from cs336_alignment import grpo_runs
from cs336_alignment.grpo_runs import run_grpo
from cs336_alignment.grpo_settings import grpo_config
from cs336_alignment.runs import load_runs
grpo_runs.torch.set_num_threads(1)
grpo_runs.save_policy = lambda *args: None
live = grpo_config("micro", variant="live", n_grpo_steps=6, eval_every=3, n_eval=16, checkpoint_every=100)
"""


@pytest.fixture(scope="module")
def notebook():
    """`run(code, watch)` in a kernel: (what was printed, the error's lines or []). watch(printed) is called meanwhile."""
    manager = KernelManager()
    manager.start_kernel(env=os.environ | {"PYTHONPATH": str(data.repo_root())})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code, watch=lambda printed: None):
        asked, printed, error, until = client.execute(code), "", [], time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                message = client.get_iopub_msg(timeout=0.02)
                kind, content = message["msg_type"], message["content"]
                printed += content.get("text", "")
                error += [content["ename"], *content["traceback"]] if kind == "error" else []
                ours = message["parent_header"].get("msg_id") == asked
                if ours and kind == "status" and content["execution_state"] == "idle":
                    return printed, error
            watch(printed)
        raise TimeoutError(printed)

    run.interrupt = manager.interrupt_kernel
    assert run(LIVE_SETUP)[1] == []
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def live_cell():
    cells = json.loads((data.repo_root() / "nbs" / "E7_loop_in_earnest.ipynb").read_text("utf-8"))["cells"]
    return next(text for c in cells if (text := "".join(c["source"])).startswith("summary = run_grpo(live"))


def presses(run, folder, times):
    """A `watch` that presses ■ when step 2 is logged, and again once the first press was answered, `times` in all."""
    def watch(printed):
        lines = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
        if len(watch.done) < times and (lines >= 3 if not watch.done else "will stop after this step" in printed):
            watch.done.append(run.interrupt())
    watch.done = []
    return watch


@pytest.mark.parametrize("times", [1, 2])
def test_the_live_cell_goes_on_after_it_was_interrupted(notebook, tmp_path, times):
    place = {n: run_folder(asdict(grpo_config("micro", variant="live")), tmp_path / n) for n in ("stopped", "whole")}
    notebook(f"home = SimpleNamespace(name={str(tmp_path / 'stopped')!r})")
    watch = presses(notebook, place["stopped"], times)
    printed, error = notebook(live_cell(), watch)
    assert len(watch.done) == times and "will stop after this step" in printed
    if times == 1:
        assert error[0] == "SystemExit" and "stopped by hand, safe after step 3" in printed
        assert runs.find_checkpoint(place["stopped"]).name == "step_00000003"
    else:
        assert error[0] == "KeyboardInterrupt" and "stopped at once; the run is safe after step 0" in error[-1]
        assert sum(len(part.splitlines()) for part in error) < 80  # not the hundred frames of sampling
    printed, error = notebook(live_cell())
    assert error == [] and "answer_accuracy  before" in printed and ("goes on after step 3" in printed) == (times == 1)
    notebook(f"home = SimpleNamespace(name={str(tmp_path / 'whole')!r})")
    assert notebook(live_cell())[1] == []
    assert kills.record(place["stopped"]) == kills.record(place["whole"])


def fail():
    raise RuntimeError("engine replica 1 ended with code -9")


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("act, way_out", [
    (lambda: None, contextlib.nullcontext()), (ctrl_c, contextlib.nullcontext()),
    (lambda: (ctrl_c(), ctrl_c()), pytest.raises(KeyboardInterrupt)),
    (fail, pytest.raises(RunStopped, match="replica 1"))],
    ids=["finished", "Ctrl-C", "Ctrl-C twice", "failed"])
def test_the_loops_own_engine_is_closed_on_every_way_out(tmp_path, monkeypatch, python_handles_ctrl_c, act, way_out):
    made = []

    def make(model, kind, tokenizer, **options):
        made.append(CallsAt(4, act))
        return made[-1]

    monkeypatch.setattr(grpo_runs, "make_engine", make)
    before = signal.getsignal(signal.SIGINT)
    with way_out:
        quiet_train(tmp_path)
    assert made[0].closed and len(made) == 1 and signal.getsignal(signal.SIGINT) is before


# --- what goes wrong in a step

def test_an_engine_that_dies_leaves_the_run_saved(tmp_path):
    def die():
        raise RuntimeError("engine replica 0 ended with code -9; its log ends:\n…")

    with pytest.raises(RunStopped, match=r"step 5 failed: engine replica 0 ended(.|\n)*safe after step 4"):
        quiet_train(tmp_path / "died", engine=CallsAt(7, die))  # evaluations at 0 and 4, steps 1 … 5
    quiet_train(tmp_path / "died")
    quiet_train(tmp_path / "whole")
    assert without_rounding(record(tmp_path / "died")) == without_rounding(record(tmp_path / "whole"))


def test_an_engine_that_dies_before_the_first_step(tmp_path):
    def die():
        raise RuntimeError("engine replica 0 ended with code -9")

    with pytest.raises(RunStopped, match="step 0 failed: engine replica 0(.|\n)*safe after step 0"):
        quiet_train(tmp_path, engine=CallsAt(1, die))


@pytest.mark.parametrize("config", [CONFIG, OFF_POLICY], ids=["first update", "in the middle of a step"])
def test_a_loss_that_is_nan_stops_saved(tmp_path, monkeypatch, config):
    """The loss is NaN at step 6; the weights that are saved are finite, and those of a whole number of steps."""
    real, calls = grpo.grpo_loss, [0]
    per_step = config.epochs_per_rollout_batch * config.rollout_batch_size // config.train_batch_size
    fatal = 5 * per_step + (3 if per_step > 1 else 1)  # in step 6: its first and only update, or its third of four

    def poisoned(cfg, log_probs, *args):
        losses, logged = real(cfg, log_probs, *args)
        calls[0] += 1
        return losses * (float("nan") if calls[0] >= fatal else 1.0), logged

    monkeypatch.setattr(grpo, "grpo_loss", poisoned)
    safe = 5 if per_step == 1 else 3  # in the middle of a step the weights have moved: the older checkpoint counts
    with pytest.raises(RunStopped, match=rf"step 6 failed: gradient norm is nan(.|\n)*safe after step {safe}"):
        quiet_train(tmp_path, config)
    folder = run_folder(asdict(config), tmp_path)
    state = torch.load(runs.find_checkpoint(folder) / "state.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["parts"]["model"].values())
    monkeypatch.setattr(grpo, "grpo_loss", real)
    assert quiet_train(tmp_path, config)[0]["steps"] == config.n_grpo_steps


def test_batches_that_are_all_wrong_change_nothing_and_say_so(tmp_path, monkeypatch):
    rewarded_by(monkeypatch, lambda r, t: dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0))
    engine = TransformersEngine(*tiny_policy())
    summary, said = quiet_train(tmp_path, engine=engine)
    lines = metrics_of(tmp_path)
    assert summary["steps"] == 12 and len(lines) == 13
    assert said.count("no response has an advantage, nothing is learned") == 12
    for line in lines[1:]:
        assert line["train/share_equal_groups"] == 1 and line["train/share_trained"] == 0
        assert line["train/skipped_updates"] == 1 and line["train/updates"] == 0 and "train/loss" not in line
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), tiny_policy()[0].parameters()))


def test_a_grader_worker_that_dies_does_not_stop_the_run(tmp_path, monkeypatch):
    """Answers that only a worker process can grade; all workers are killed after the first step."""
    truth, text, killed = "\\frac{\\sqrt{8}}{2}", "</think> <answer> \\frac{2\\sqrt{2}}{2} + 0*\\sin(1) </answer>", []
    rewarded_by(monkeypatch, drgrpo_grader.r1_zero_reward_fn)
    real, calls = grpo.grade_batch, []

    def grade(reward_fn, responses, truths):
        calls.append(real(reward_fn, [text] * len(responses), [truth + " + 0" * len(calls)] * len(truths)))
        if not killed:
            killed.extend(workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return calls[-1]

    monkeypatch.setattr(grpo, "grade_batch", grade)
    summary, _ = quiet_train(tmp_path, replace(CONFIG, n_grpo_steps=2, eval_every=2))
    assert killed, "no worker was at work: choose an answer that needs one"
    assert summary["steps"] == 2 and len(metrics_of(tmp_path)) == 3
    assert calls[0] == calls[1] and calls[0][0]["format_reward"] == 1
    drgrpo_grader.close_workers()


def workers():
    """Process ids of this process's grading workers."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{entry}/stat") as file:
                    if int(file.read().rsplit(")", 1)[1].split()[1]) == os.getpid():
                        found.append(int(entry))
    return found


# --- weights on their way to the engine

class Watched(TransformersEngine):
    """An engine with weights of its own that notes in `events` what it is asked: "train" and "eval", with the number of
    weights it was given before; in `given`, a fingerprint of each of these."""

    def __init__(self):
        super().__init__(*tiny_policy(), batch_size=64)
        self.events, self.given = [], []

    def load_weights(self, source):
        super().load_weights(source)
        self.given.append(sum(p.double().abs().sum().item() for p in self.model.parameters()))

    def generate(self, prompts, sampling, progress=True):
        before, kind = len(self.given), "train" if sampling.n > 1 else "eval"
        time.sleep(0.01)  # so that a trainer that does not wait would be seen to push weights in between
        out = super().generate(prompts, sampling, progress)
        self.events.append((kind, before))
        assert len(self.given) == before, "new weights in the middle of an answer"
        return out


@pytest.mark.parametrize("overlap", [False, True])
def test_which_weights_sample_which_step(tmp_path, overlap):
    """On-policy: step k is sampled with the weights after k − 1 updates. With overlap, after k − 2: one step off."""
    config, engine = replace(CONFIG, variant="ahead", overlap=overlap, n_grpo_steps=6, eval_every=3), Watched()
    quiet_train(tmp_path, config, engine=engine)
    late = 1 if overlap else 0
    assert [n for kind, n in engine.events if kind == "train"] == [max(1, k - late) for k in range(1, 7)]
    assert [n for kind, n in engine.events if kind == "eval"] == [1, 4, 7]  # the newest: before, after 3, after 6
    moved = [line["train/updates"] > 0 for line in metrics_of(tmp_path, config)[1:]]
    assert [a != b for a, b in zip(engine.given, engine.given[1:])] == moved and any(moved)


class Meeting(Watched):
    """Meets the trainer in `meet` when it samples one of `steps`: each waits for the other, for 20 s at most."""

    def __init__(self, steps=()):
        super().__init__()
        self.meet, self.steps, self.threads = threading.Barrier(2, timeout=20), steps, set()

    def generate(self, prompts, sampling, progress=True):
        self.threads.add(threading.current_thread())
        if sampling.n > 1 and 1 + sum(kind == "train" for kind, _ in self.events) in self.steps:
            self.meet.wait()
        return super().generate(prompts, sampling, progress)


def test_the_next_rollouts_are_sampled_while_an_evaluation_is_graded(tmp_path, monkeypatch):
    """With the weights that were evaluated; and the run is the one in which one thing comes after the other."""
    config, engines, grade = replace(CONFIG, n_grpo_steps=6, eval_every=3), [Meeting([1, 4]), Meeting()], grpo_runs.evaluate_policy

    def graded(responses, *args):
        if args[-1] < 6 and engines[0].steps:  # after the last step nothing is sampled
            engines[0].meet.wait()
        return grade(responses, *args)

    monkeypatch.setattr(grpo_runs, "evaluate_policy", graded)
    quiet_train(tmp_path / "meanwhile", config, engine=engines[0])
    waits = grpo_runs.State
    monkeypatch.setattr(grpo_runs, "State", lambda *args, **more: waits(*args, **more | {"own_weights": False}))
    engines[0].steps = ()
    quiet_train(tmp_path / "after", config, engine=engines[1])
    assert engines[0].events == engines[1].events and [n for kind, n in engines[0].events if kind == "train"] == list(range(1, 7))
    assert len(engines[0].threads) == 2 and engines[1].threads == {threading.main_thread()}
    assert record(tmp_path / "meanwhile", config) == record(tmp_path / "after", config)


def test_a_live_policy_samples_nothing_while_it_grades(tmp_path, monkeypatch):
    threads, sample = set(), TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, "generate",
                        lambda *args, **more: (threads.add(threading.current_thread()), sample(*args, **more))[1])
    quiet_train(tmp_path, replace(CONFIG, n_grpo_steps=2, eval_every=1))
    assert threads == {threading.main_thread()}


def test_overlap_needs_an_engine_of_its_own(tmp_path):
    ahead = replace(CONFIG, variant="ahead", overlap=True)
    with pytest.raises(ValueError, match="overlap needs an engine with weights of its own"):
        quiet_train(tmp_path, ahead)
    summary, _ = quiet_train(tmp_path, ahead, engine=TransformersEngine(*tiny_policy()))
    lines = metrics_of(tmp_path, ahead)
    assert summary["steps"] == 12 and lines[-1]["train/reward_mean"] > lines[1]["train/reward_mean"]


def test_a_group_answers_one_question_and_has_its_truth():
    problems, engine = grpo_problems("train"), CallsAt(0, None)
    config = replace(CONFIG, min_tokens=0)
    asked = []
    for step in range(1, 13):  # 48 of 50 questions
        completions, truths = grpo.sample_rollouts(config, engine, problems, step)
        assert len(completions) == len(truths) == 16
        for i, (c, truth) in enumerate(zip(completions, truths)):
            problem, = (p for p in problems if engine.tokenizer.decode(c.prompt_token_ids)
                        == grpo.fill_prompt(grpo.load_prompt("micro"), p.question))
            assert truth == problem.ground_truth
            asked += [problem.question] * (i % 4 == 0)
            assert problem.question == asked[-1]
        assert len({c.text for c in completions[:4]}) > 1  # a group's answers have dice of their own
    assert len(set(asked)) == 48  # none comes twice before all have come


def test_every_run_step_and_purpose_has_its_dice():
    seeds = [grpo.sampling_params(replace(CONFIG, seed=seed), step, 1, purpose).seed
             for seed in (0, 1) for step in (1, 2) for purpose in (0, 1)]
    assert len(set(seeds)) == 8 and None not in seeds
    asked = grpo.sampling_params(replace(CONFIG, seeded_rollouts=False, temperature=0.7), 1, 5, 0)
    assert (asked.seed, asked.temperature, asked.n) == (None, 0.7, 5)
    assert (asked.min_tokens, asked.max_tokens) == (CONFIG.min_tokens, CONFIG.max_tokens)


def test_train_batches_are_fresh_permutations():
    config = replace(OFF_POLICY, train_batch_size=4)
    orders = [list(grpo.train_batches(replace(config, seed=seed), step)) for seed in (0, 1) for step in (1, 2)]
    for batches in orders:
        assert [len(b) for b in batches] == [4] * 8  # two epochs of four
        assert sorted(sum(batches[:4], [])) == sorted(sum(batches[4:], [])) == list(range(16))
    flat = [tuple(sum(half, [])) for batches in orders for half in (batches[:4], batches[4:])]
    assert len(set(flat)) == 8  # seed, step and epoch all matter
    assert orders[0] == list(grpo.train_batches(config, 1))


def test_momentum_does_not_move_weights_in_a_step_without_advantages(tmp_path, monkeypatch):
    """From step 4 on all answers are right: AdamW would go on with a gradient of zero."""
    engine = Watched()
    right = lambda response, truth: dict.fromkeys(("format_reward", "answer_reward", "reward"), 1.0)
    rewarded_by(monkeypatch, lambda r, t: (right if len(engine.given) > 3 else digits_reward)(r, t))
    quiet_train(tmp_path, engine=engine)
    assert engine.given[0] != engine.given[3] and len(set(engine.given[3:])) == 1


# --- the loss

def eight(**changes):
    """A configuration for one batch of eight answers in two groups."""
    return GRPOConfig(rollout_batch_size=8, train_batch_size=8, group_size=4, gradient_accumulation_steps=1, **changes)


def random_rollouts(n=8, seed=0):
    """Completions of random tokens and lengths; a mixed group of four, and one that is all right."""
    rng = random.Random(seed)
    tokens = lambda k: [rng.randrange(3, 90) for _ in range(k)]
    completions = [Completion("", tokens(rng.randint(1, 9)), None, "stop", tokens(rng.randint(2, 6))) for _ in range(n)]
    return completions, torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("constant", [None, 9.0], ids=["masked_mean", "masked_normalize"])
@pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"])
def test_the_same_gradient_as_the_handouts_loop(loss_type, constant):
    """Packed, in slices, without the answers that have no gradient; against padded rows and the handout's functions."""
    policy, _ = tiny_policy()
    completions, rewards = random_rollouts()
    config = eight(loss_type=loss_type, max_tokens=9,
                   length_normalization="masked_mean" if constant is None else "masked_normalize")
    advantages, _ = grpo.compute_advantages(config, rewards)
    examples = {i: e for i, e in enumerate(grpo.rollout_examples(completions, advantages))
                if grpo.has_gradient(config, completions[i], e.side["advantage"])}
    draw = torch.Generator().manual_seed(0)
    old = [torch.randn(len(c.token_ids), generator=draw) * 0.3 - 4.5 for c in completions]
    with_old = {i: replace(e, side=e.side | {"old": old[i]}) for i, e in examples.items()}
    batch = grpo.weighted(config, with_old, completions, list(range(8)))
    for budget in ({}, {"max_tokens": 15, "max_logits": 100}):
        ours = accumulate_gradients(policy, batch, partial(grpo.grpo_loss, config), **budget)["loss"]
        gradient = [p.grad.clone() for p in policy.parameters()]
        policy.zero_grad()
        loss = literal_gradient(policy, completions, rewards, advantages, old, loss_type, constant)
        assert math.isclose(ours, loss, abs_tol=1e-5)
        for a, b in zip(gradient, [p.grad for p in policy.parameters()]):
            assert torch.allclose(a, b, atol=1e-6), (loss_type, budget)
        policy.zero_grad()


def literal_gradient(policy, completions, rewards, advantages, old, loss_type, constant):
    """The handout's loop: padded micro-batches of two with logits everywhere."""
    width, total = max(len(c.prompt_token_ids) + len(c.token_ids) for c in completions), 0.0
    for rows in ([0, 1], [2, 3], [4, 5], [6, 7]):
        ids, mask, olds = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width), torch.zeros(2, width)
        for k, i in enumerate(rows):
            c = completions[i]
            both, start = [*c.prompt_token_ids, *c.token_ids], len(c.prompt_token_ids)
            ids[k, :len(both)] = torch.tensor(both)
            mask[k, start:len(both)], olds[k, start:len(both)] = 1, old[i]
        lp = get_response_log_probs(policy, ids[:, :-1], ids[:, 1:])["log_probs"]
        loss, _ = grpo_microbatch_train_step(lp, mask[:, 1:].bool(), 4, loss_type, rewards[rows, None],
                                             advantages[rows, None], olds[:, 1:], 0.2, constant)
        total += loss.item()
    return total


EXTRAS = {name: settings for name, settings in NAMED.items()} | {
    "kl": dict(kl_coef=0.1), "tis": dict(tis_cap=1.1), "no baseline, kl": dict(loss_type="no_baseline", kl_coef=0.2),
    "clip higher": dict(loss_type="grpo_clip", cliprange=0.1, clip_high=0.3),
    "wide gspo": dict(loss_type="grpo_clip", ratio_level="sequence", cliprange=0.05, clip_high=0.1),
    "no clip, token": dict(loss_type="grpo_no_clip", length_normalization="token"),
    "all": dict(loss_type="grpo_clip", cliprange=0.1, clip_high=0.3, kl_coef=0.05, tis_cap=1.2, mask_overlong=True,
                length_normalization="token", advantage="maxrl", use_std_normalization=False)}
AT_TEMPERATURES = {"all, cold": EXTRAS["all"] | dict(temperature=0.5), "all, hot": EXTRAS["all"] | dict(temperature=1.7, min_tokens=0)}



def moved_copy(policy, seed, by=3.0):
    """A copy with random numbers added to its weights."""
    copy = type(policy)(policy.config).double()
    copy.load_state_dict(policy.state_dict())
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in copy.parameters():
            p += by * p.std() * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return copy.eval()


@pytest.mark.parametrize("changes", (EXTRAS | AT_TEMPERATURES).values(), ids=EXTRAS | AT_TEMPERATURES)
def test_extras_agree_with_their_formulas(changes):
    """The whole way from rewards to the gradient, in float64, against loops over answers and tokens."""
    config = eight(**{"max_tokens": 9, **changes})
    old_policy = tiny_policy()[0].double()
    policy, reference = moved_copy(old_policy, 4), moved_copy(old_policy, 2)
    completions, _ = random_rollouts(seed=3)
    rng, rewards = random.Random(0), [1.0, 0, 0, 1, 0, 0, 1, 0]
    for i, c in enumerate(completions):
        logprobs = [x + rng.gauss(0, 0.3) for x in answer_log_probs(old_policy, c, config.temperature).tolist()]
        completions[i] = replace(c, logprobs=logprobs, finish_reason="length" if i in (1, 6) else "stop")
    completions[2] = replace(completions[2], token_ids=[], logprobs=[])
    advantages, _ = grpo.compute_advantages(config, torch.tensor(rewards, dtype=torch.float64))
    examples = {i: e for i, e in enumerate(grpo.rollout_examples(completions, advantages))
                if grpo.has_gradient(config, completions[i], e.side["advantage"])}
    examples, _ = grpo.add_log_probs(config, examples, completions, old_policy, reference, pass_tokens=40)
    batch = grpo.weighted(config, examples, completions, list(range(8)))
    metrics = accumulate_gradients(policy, batch, partial(grpo.grpo_loss, config), max_tokens=30,
                                   temperature=config.temperature)
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    loss, clipped, kl = by_their_formulas(config, policy, old_policy, reference, completions, rewards)
    loss.backward()
    assert math.isclose(metrics["loss"], loss.item(), rel_tol=1e-6, abs_tol=1e-8)  # clip_high is a float32 number
    for a, p in zip(ours, policy.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-6, atol=1e-9)
    if config.loss_type == "grpo_clip":
        assert math.isclose(metrics["clipped"], clipped) and 0 < clipped < 1
    if config.kl_coef:
        assert math.isclose(metrics["kl"], kl, rel_tol=1e-9)


def answer_log_probs(model, c, temperature=1.0):
    """Log-probs (tokens,) of one answer, by one plain forward pass."""
    if not c.token_ids:
        return torch.zeros(0, dtype=torch.float64)
    logits = model(torch.tensor([[*c.prompt_token_ids, *c.token_ids]])).logits[0, len(c.prompt_token_ids) - 1:-1]
    return (logits / temperature).log_softmax(-1)[range(len(c.token_ids)), c.token_ids]


def paper_advantage(config, rewards, i):
    """Of answer i: GRPO, Dr. GRPO (no std) or MaxRL (group mean below)."""
    start = i // config.group_size * config.group_size
    group = rewards[start:start + config.group_size]
    if config.loss_type == "no_baseline":
        return rewards[i]
    A = rewards[i] - statistics.fmean(group)
    if config.use_std_normalization:
        A /= statistics.stdev(group) + config.advantage_eps
    return A / (statistics.fmean(group) + config.advantage_eps) if config.advantage == "maxrl" else A


def by_their_formulas(config, policy, old_policy, reference, completions, rewards):
    """(loss, clip fraction, mean k3) of a batch, token by token."""
    counted = [c for c in completions if not (config.mask_overlong and c.finish_reason == "length")]
    n, all_tokens = len(counted), sum(len(c.token_ids) for c in counted)
    low, high = 1 - config.cliprange, 1 + (config.cliprange if config.clip_high is None else config.clip_high)
    loss, clipped, kls = 0.0, [], []
    for i, c in enumerate(completions):
        if config.mask_overlong and c.finish_reason == "length":
            continue
        A, length, T = paper_advantage(config, rewards, i), len(c.token_ids), config.temperature
        lp = answer_log_probs(policy, c, T)
        with torch.no_grad():
            old, ref = answer_log_probs(old_policy, c, T), answer_log_probs(reference, c, T)
        divisor = {"masked_mean": n * length, "masked_normalize": n * config.max_tokens, "token": all_tokens}
        for t in range(length):
            rho = (lp - old).mean().exp() if config.ratio_level == "sequence" else (lp[t] - old[t]).exp()
            capped = min(max(rho, low), high) if config.loss_type == "grpo_clip" else rho
            term = -min(rho * A, capped * A) if "grpo" in config.loss_type else -A * lp[t]
            clipped.append(float(A > 0 and rho > high or A < 0 and rho < low))
            k3 = (ref[t] - lp[t]).exp() - (ref[t] - lp[t]) - 1
            kls.append(k3.item())
            term = term + config.kl_coef * k3
            if config.tis_cap is not None and t >= config.min_tokens:
                term = term * min(math.exp(old[t] - c.logprobs[t]), config.tis_cap)
            loss = loss + term / divisor[config.length_normalization]
    return loss, statistics.fmean(clipped), statistics.fmean(kls)


def test_ratio_is_one_on_the_first_update_and_equal_groups_add_nothing():
    policy, _ = tiny_policy()
    completions, rewards = random_rollouts()
    config = eight(loss_type="grpo_clip")
    advantages, _ = grpo.compute_advantages(config, rewards)
    every = dict(enumerate(grpo.rollout_examples(completions, advantages)))
    every, _ = grpo.add_log_probs(config, every, completions, policy, pass_tokens=40)
    batch, loss = grpo.weighted(config, every, completions, list(range(8))), partial(grpo.grpo_loss, config)
    metrics = accumulate_gradients(policy, batch, loss)
    assert abs(metrics["ratio"] - 1) < 1e-5 and metrics["clipped"] == 0
    policy.zero_grad()
    equal = grpo.weighted(config, every, completions, [4, 5, 6, 7])  # all right
    accumulate_gradients(policy, equal, partial(grpo.grpo_loss, config))
    assert all((p.grad == 0).all() for p in policy.parameters())


# --- the run's record

def test_what_is_logged(tmp_path):
    quiet_train(tmp_path, OFF_POLICY)
    lines = metrics_of(tmp_path, OFF_POLICY)
    wanted = {"loss", "grad_norm", "token_entropy", "clip_fraction", "reward_mean", "format_rate", "answer_accuracy",
              "mean_tokens", "truncated", "share_equal_groups", "share_trained", "engine_gap", "kl", "samples",
              "tokens_per_s", "updates", "s_rollout", "s_reward", "s_old", "s_update", "s_sync", "s_eval", "s_log"}
    assert wanted <= {k.removeprefix("train/") for k in lines[4]}
    assert lines[4]["train/updates"] == 4 and lines[4]["train/engine_gap"] < 1e-4 and lines[4]["train/samples"] == 64
    assert [line["step"] for line in lines if "eval/answer_accuracy" in line] == [0, 4, 8, 12]
    rollouts = runs.read_jsonl(run_folder(asdict(OFF_POLICY), tmp_path) / "rollouts.jsonl")
    assert [r["step"] for r in rollouts] == [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4
    unseen = [grpo.fill_prompt(grpo.load_prompt("micro"), p.question) for p in grpo_problems("test")[:4]]
    assert [r["prompt"] for r in rollouts] == unseen * 4  # the same questions each time, of the test split
    known = ["train/engine_gap" in line for line in lines]  # at evaluations only, but with tis_cap always
    assert known == [line["step"] > 0 for line in lines]


def test_the_kl_term_is_to_the_starting_policy(tmp_path):
    config = replace(CONFIG, variant="kl", kl_coef=0.01, n_grpo_steps=6)  # on-policy: to itself it would be zero
    quiet_train(tmp_path, config)
    kl = [line["train/kl"] for line in metrics_of(tmp_path, config)[1:]]
    assert abs(kl[0]) < 1e-9 and kl[-1] > 1e-4


def test_the_learning_rate_is_the_configurations(tmp_path):
    engine = Watched()
    quiet_train(tmp_path, replace(CONFIG, learning_rate=0.0, n_grpo_steps=3), engine=engine)
    assert len(engine.given) == 4 and len(set(engine.given)) == 1


def test_numbers_of_a_batch():
    ends = [(3, "stop"), (8, "length"), (4, "stop"), (1, "stop")]
    made = [Completion("", [5] * n, None, reason, [4]) for n, reason in ends]
    rewards = [dict(format_reward=f, answer_reward=a, reward=f * a) for f, a in [(1, 1), (0, 1), (1, 0), (1, 0)]]
    assert grpo.rollout_metrics(made, rewards) == dict(
        reward_mean=0.25, format_rate=0.75, answer_accuracy=0.5, mean_tokens=4, truncated=0.25)
    gap = grpo.engine_gap([torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])], [[-1.5, -2.0], [-0.25]])
    d = np.array([0.5, 0.0, -0.25])
    expected = dict(engine_gap=abs(d).mean(), engine_gap_max=0.5, engine_kl=(np.exp(d) - d - 1).mean())
    assert gap == pytest.approx(expected, abs=1e-6)


def test_the_gap_is_measured_at_evaluations(tmp_path):
    quiet_train(tmp_path, replace(CONFIG, n_grpo_steps=5))
    lines = metrics_of(tmp_path, CONFIG)
    assert [line["step"] for line in lines if "train/engine_gap" in line] == [4, 5]
    for line in lines[1:]:
        assert line["train/share_trained"] == pytest.approx(1 - line["train/share_equal_groups"])
        seconds = sum(line[f"train/s_{phase}"] for phase in ("rollout", "reward", "old", "update", "sync"))
        prompt = line["train/tokens_per_s"] * seconds / 16 - line["train/mean_tokens"]
        assert 29 < prompt < 45  # tokens: a prompt is a line of characters


def test_a_finished_run_is_not_run_again(tmp_path):
    short = replace(CONFIG, n_grpo_steps=2)
    first, _ = quiet_train(tmp_path, short)
    assert quiet_train(tmp_path, short, engine=CallsAt(1, lambda: pytest.fail("it sampled")))[0] == first
    with pytest.raises(runs.RunConflict, match="learning_rate"):
        quiet_train(tmp_path, replace(short, learning_rate=1.0))


def test_the_command_stops_at_ctrl_c_and_keeps_its_settings(tmp_path, python_handles_ctrl_c):
    """As a script, on the micro model."""
    script = str(Path(grpo.__file__))
    sizes = "rollout_batch_size=16 train_batch_size=16 n_eval=8 max_tokens=16 eval_every=2 checkpoint_every=100"
    command = [sys.executable, script, "--track", "micro", "--variant", "cli", "--root", str(tmp_path),
               *(word for size in sizes.split() for word in ("--set", size))]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    log_file = tmp_path / "grpo_micro" / "cli_seed0" / "metrics.jsonl"
    process = subprocess.Popen([*command, "--steps", "400"], env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while process.poll() is None and (not log_file.exists() or log_file.read_text().count("\n") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by hand, safe after step" in said, said
    assert "Traceback" not in said and not (log_file.parent / "summary.json").exists()
    again = subprocess.run([*command, "--steps", "4"], env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "n_grpo_steps (400 there, 4 now)" in again.stderr, again.stderr


# --- stacked runs (E11)

def stack_of(configs, policies=None):
    """Runs on one stack of tiny policies, without folders."""
    policies = policies or [tiny_policy()[0] for _ in configs]
    stack = stacked.stack_policies(policies, tiny_policy()[1])
    return stacked.StackedRuns(configs, [], stack, [grpo_problems("train")] * len(configs), [])


def weights_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


LOSSES = EXTRAS | {name: dict(loss_type=name) for name in ("no_baseline", "grpo_clip", "grpo_no_clip")} | {
    "default": {}, "masked_normalize": dict(length_normalization="masked_normalize"), "rate": dict(learning_rate=1e-4)}


@pytest.mark.parametrize("dtype, exact", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_a_stacked_step_is_the_step_of_each_run(dtype, exact, monkeypatch):
    """All losses in one stack, two epochs of two train batches, three steps; with momentum, which a batch without a
    gradient must not let move. In float32 AdamW makes steps of the rounding of gradients that are nearly zero."""
    monkeypatch.setattr(packing, "SHARE_PROMPTS", False)  # a stack repeats prompts, and rounds as rows that do
    configs = [replace(OFF_POLICY, kl_coef=0.0, tis_cap=None, loss_type="reinforce_with_baseline", learning_rate=1e-3,
                       seed=k) for k in range(len(LOSSES))]
    configs = [replace(c, variant=name, **changes) for c, (name, changes) in zip(configs, LOSSES.items())]
    start = tiny_policy()[0].to(dtype)
    s = stack_of(configs, [moved_copy(start, 1, 0.0).to(dtype) for _ in configs])
    alone = [moved_copy(start, 1, 0.0).to(dtype) for _ in configs]
    optimizers, idle = [make_optimizer(p, c.learning_rate) for p, c in zip(alone, configs)], 0
    for step in (4, 5, 6):  # evaluations at 4: the engine's gap is known
        rollouts = stacked.stacked_rollouts(s, step)
        before = [weights_of(p) for p in s.stack.policies]
        lines = stacked.stacked_grpo_step(s, rollouts, step)
        for k, config in enumerate(configs):
            expected = grpo.grpo_step(config, alone[k], optimizers[k], *rollouts[k], step, start if config.kl_coef else None)
            torch.testing.assert_close(weights_of(s.stack.policies[k]), weights_of(alone[k]), rtol=0, atol=exact)
            assert set(lines[k]) == set(expected)
            for name in expected:
                assert name.startswith("s_") or math.isclose(lines[k][name], expected[name], rel_tol=100 * exact, abs_tol=exact), name
            assert (weights_of(s.stack.policies[k]) == before[k]).all() == (expected["updates"] == 0)
            idle += expected["skipped_updates"] > 0
    assert idle, "no batch was without a gradient: choose another seed"


def test_stacked_passes_of_any_size_are_the_same(monkeypatch):
    configs = [replace(CONFIG, seed=k, kl_coef=k / 10) for k in range(3)]
    after = []
    for budget in (2**14, 150):  # one row of each run a pass
        monkeypatch.setattr(stacked, "pass_tokens", lambda stack: budget)
        s = stack_of(configs, [tiny_policy()[0].double() for _ in configs])
        stacked.stacked_grpo_step(s, stacked.stacked_rollouts(s, 1), 1)
        after.append([weights_of(p) for p in s.stack.policies])
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-6)  # RMSNorm rounds to float32 inside


@pytest.mark.parametrize("sampling", [
    SamplingParams(0.0, max_tokens=12), SamplingParams(0.0, max_tokens=12, stop=("x", "</answer>"), min_tokens=3),
    SamplingParams(0.0, max_tokens=90, stop=())], ids=["answer", "letters", "to the end of the context"])
def test_a_stacks_responses_end_where_an_engines_end(sampling):
    """Three policies that say other things, of which the third says a stop string's characters and eos in turn."""
    policies = [moved_copy(tiny_policy()[0], k).float() for k in range(2)] + [tiny_policy()[0]]
    tokenizer = tiny_policy()[1]
    letters = list(dict.fromkeys(chr(c) for c in range(32, 127)))
    sampling = replace(sampling, stop=tuple(sampling.stop) + (tuple("aeiou0123") if "x" in sampling.stop else ()))
    prompts = [[letter * n for letter, n in zip(letters[k:k + 40], range(1, 41))] for k in range(3)]
    responses, entropies = stacked.stacked_generate(stacked.stack_policies(policies, tokenizer), prompts, [sampling] * 3)
    reasons = set()
    for policy, of_run, asked, h in zip(policies, responses, prompts, entropies):
        expected = [c for c, in TransformersEngine(policy, tokenizer).generate(asked, sampling, progress=False)]
        for ours, theirs, row in zip(of_run, expected, h):
            assert replace(ours, logprobs=None) == replace(theirs, logprobs=None)
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            logits = policy(torch.tensor([[*ours.prompt_token_ids, *ours.token_ids]])).logits[0, len(ours.prompt_token_ids) - 1:-1]
            assert row[:len(ours.token_ids)].tolist() == pytest.approx(stacked.compute_entropy(logits).tolist(), abs=1e-4)
            reasons.add(ours.finish_reason)
    assert reasons >= ({"stop", "length"} if "x" in sampling.stop else {"length"})


def test_a_written_stop_string_and_eos_end_a_stacks_responses():
    """Tokens that come one after the other, whatever the policy: where the loop on the device ends, and the cut."""
    eos, stop = torch.tensor([1]), torch.tensor([5, 6, 5])
    rows = torch.tensor([[7, 5, 6, 5, 9], [5, 6, 5, 5, 5], [7, 7, 7, 7, 1]])
    ended = [stacked.newly_ended([rows[None, :, k] for k in range(t + 1)], eos, [stop], 3)[0].tolist() for t in range(5)]
    assert ended == [[False] * 3, [False] * 3, [False] * 3, [True, False, False], [False, False, True]]


def test_a_stack_samples_from_its_policies():
    """4,000 first tokens at temperature 0.7 against each policy's probabilities; no eos before `min_tokens`."""
    policies, tokenizer = [moved_copy(tiny_policy()[0], k).float() for k in (1, 2)], tiny_policy()[1]
    sampling, n = SamplingParams(0.7, max_tokens=1, min_tokens=1, seed=5), 4000
    stack = stacked.stack_policies(policies, tokenizer)
    responses, _ = stacked.stacked_generate(stack, [["12+7="] * n, ["12+7="] * n], [sampling, replace(sampling, seed=6)])
    for policy, of_run in zip(policies, responses):
        logits = policy(torch.tensor([tokenizer("12+7=").input_ids])).logits[0, -1].detach()
        logits[1] = -math.inf
        p = (logits / 0.7).softmax(-1).numpy()
        seen = np.bincount([c.token_ids[0] for c in of_run], minlength=len(p))
        chi2, likely = ((seen - n * p) ** 2)[p > 0] / (n * p)[p > 0], p > 5 / n
        assert seen[1] == 0 and chi2[likely[p > 0]].sum() < likely.sum() + 5 * math.sqrt(2 * likely.sum())
    again, _ = stacked.stacked_generate(stack, [["12+7="] * n] * 2, [sampling, sampling])
    assert again[0] == responses[0] and [c.token_ids for c in again[1]] != [c.token_ids for c in responses[1]]


def run_stack(root, configs, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return stacked.run_stacked(configs, root, progress=False, **kwargs), out.getvalue()


def test_stacked_runs_have_the_records_of_ordinary_ones(tmp_path):
    configs = [replace(OFF_POLICY, seed=0), replace(OFF_POLICY, seed=1), replace(OFF_POLICY, variant="slow", learning_rate=1e-4)]
    summaries, _ = run_stack(tmp_path / "stacked", configs)
    quiet_train(tmp_path / "plain", configs[0])
    lines, plain = metrics_of(tmp_path / "stacked", configs[0]), metrics_of(tmp_path / "plain", configs[0])
    own = {"train/s_sync", "train/s_log"}  # there is no engine to bring weights to
    assert [set(line) for line in lines] == [set(line) - own for line in plain]
    assert lines[-1]["train/samples"] == plain[-1]["train/samples"] and lines[-1]["train/engine_gap"] < 1e-4
    assert lines[-1]["train/reward_mean"] > lines[1]["train/reward_mean"]  # it learns
    assert [(s["seed"], s["variant"], s["engine"], s["stacked"]) for s in summaries] == [
        (0, "off", "stacked", 3), (1, "off", "stacked", 3), (0, "slow", "stacked", 3)]
    folders = [run_folder(asdict(c), tmp_path / "stacked") for c in configs]
    assert [(f / "rollouts.jsonl").exists() for f in folders] == [True, False, True]  # the lowest seed of each variant
    rollouts = [runs.read_jsonl(run_folder(asdict(configs[0]), tmp_path / kind) / "rollouts.jsonl") for kind in ("stacked", "plain")]
    assert [(r["step"], r["prompt"], set(r)) for r in rollouts[0]] == [(r["step"], r["prompt"], set(r)) for r in rollouts[1]]
    table = runs.read_table(runs.publish("x", tmp_path / "stacked" / "grpo_micro", tmp_path / "out") / "runs.csv")
    assert [row["engine"] for row in table] == ["stacked"] * 3
    assert repr(run_stack(tmp_path / "stacked", configs)[0]) == repr(summaries)  # read
    with pytest.raises(runs.RunConflict, match="learning_rate"):
        run_stack(tmp_path / "stacked", [replace(configs[0], learning_rate=0.5)])


def test_a_run_does_not_depend_on_its_company(tmp_path):
    one, other = replace(CONFIG, n_grpo_steps=4), replace(CONFIG, variant="other", seed=7, n_grpo_steps=4, loss_type="no_baseline",
                                                         group_size=8)
    run_stack(tmp_path / "alone", [one])
    run_stack(tmp_path / "together", [other, one])
    assert without_rounding(record(tmp_path / "alone", one)) == without_rounding(record(tmp_path / "together", one))


def test_a_killed_stack_begins_anew_and_a_half_done_run_is_left_alone(tmp_path, monkeypatch):
    short = replace(CONFIG, n_grpo_steps=4)
    real = stacked.stacked_step
    monkeypatch.setattr(stacked, "stacked_step", lambda s, step: real(s, step) if step < 3 else fail())
    with pytest.raises(RuntimeError, match="replica"):
        run_stack(tmp_path, [short])
    assert [line["step"] for line in metrics_of(tmp_path, short)] == [0, 1, 2]
    monkeypatch.setattr(stacked, "stacked_step", real)
    run_stack(tmp_path, [short])
    assert [line["step"] for line in metrics_of(tmp_path, short)] == [0, 1, 2, 3, 4]
    run_stack(tmp_path / "whole", [short])
    assert without_rounding(record(tmp_path, short)) == without_rounding(record(tmp_path / "whole", short))
    with pytest.raises(RunStopped):
        quiet_train(tmp_path / "half", engine=CallsAt(6, fail))
    with pytest.raises(runs.RunConflict, match="begun by run_grpo"):
        run_stack(tmp_path / "half", [CONFIG])


def test_a_run_of_a_stack_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    good, bad = replace(CONFIG, n_grpo_steps=4), replace(CONFIG, n_grpo_steps=4, variant="bad", seed=1)
    run_stack(tmp_path / "alone", [good])
    real, calls = stacked.grpo_loss, []

    def poisoned(config, log_probs, *args):
        losses, logged = real(config, log_probs, *args)
        calls.extend([0] * (config is bad))
        return losses * (math.nan if config is bad and len(calls) > 1 else 1), logged

    monkeypatch.setattr(stacked, "grpo_loss", poisoned)
    summaries, said = run_stack(tmp_path / "together", [bad, good])
    assert summaries[0] is None and "bad_seed1: step" in said and "others go on" in said
    assert without_rounding(record(tmp_path / "alone", good)) == without_rounding(record(tmp_path / "together", good))
    lines = metrics_of(tmp_path / "together", bad)
    assert 1 < len(lines) < 5 and not (run_folder(asdict(bad), tmp_path / "together") / "summary.json").exists()


@pytest.mark.parametrize("name, value", [("max_tokens", 4), ("rollout_batch_size", 32), ("temperature", 0.5), ("n_eval", 4),
                                         ("eval_every", 2), ("prompt", "r1_zero"), ("overlap", True), ("variant", CONFIG.variant)])
def test_runs_that_cannot_be_stacked(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        run_stack(tmp_path, [CONFIG, replace(CONFIG, **{"variant": "other", name: value})])
    assert not list(tmp_path.iterdir())


# --- log-probs of the engine

def added_log_probs(config, engine_policy, policy, tokenizer, n=8, stack=False):
    """Completions of the engine's policy, the trainer's side data for each, and the gap."""
    prompts = [grpo.fill_prompt(grpo.load_prompt("micro"), p.question) for p in grpo_problems("train")[:n]]
    sampling = replace(grpo.sampling_params(config, config.eval_every, 1, 0), stop=())
    if stack:
        groups = stacked.stacked_generate(stacked.stack_policies([engine_policy], tokenizer), [prompts], [sampling])[0][0]
    else:
        groups = [c for c, in TransformersEngine(engine_policy, tokenizer).generate(prompts, sampling, progress=False)]
    examples = dict(enumerate(grpo.rollout_examples(groups, torch.ones(n))))
    examples, gap = grpo.add_log_probs(config, examples, groups, policy)
    return groups, [e.side for e in examples.values()], gap


@pytest.mark.parametrize("stack", [False, True], ids=["engine", "stack"])
@pytest.mark.parametrize("min_tokens", [0, 4])
@pytest.mark.parametrize("temperature", [0.3, 0.5, 0.7, 1.0, 2.0])
def test_an_engine_that_agrees_has_weight_one_and_no_gap_at_any_temperature(temperature, min_tokens, stack):
    """Micro, and a random policy, which draws the end of a response as often as any token: also before `min_tokens`."""
    config = replace(CONFIG, temperature=temperature, tis_cap=2.0, min_tokens=min_tokens, max_tokens=32)
    for policy, tokenizer in (models.load_policy("micro", device="cpu"), tiny_policy()):
        completions, sides, gap = added_log_probs(config, policy, policy, tokenizer, stack=stack)
        importance = torch.cat([side["importance"] for side in sides])
        assert importance.numel() == sum(len(c.token_ids) for c in completions) > 8
        torch.testing.assert_close(importance, torch.ones_like(importance), rtol=0, atol=1e-4)
        assert gap["engine_gap"] < 1e-5 and gap["engine_gap_max"] < 1e-4 and abs(gap["engine_kl"]) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_an_engine_with_other_weights_has_the_ratio_at_the_temperature_that_sampled(temperature):
    config = replace(CONFIG, temperature=temperature, tis_cap=3.0, min_tokens=0)
    policy, tokenizer = tiny_policy()
    policy, other = policy.double(), moved_copy(policy.double(), 4, by=1.0)
    completions, sides, gap = added_log_probs(config, other, policy, tokenizer)
    with torch.no_grad():
        d = [answer_log_probs(policy, c, temperature) - answer_log_probs(other, c, temperature) for c in completions]
    for side, expected in zip(sides, d):
        torch.testing.assert_close(side["importance"], expected.exp().clamp(max=3.0), rtol=1e-4, atol=1e-6)
    assert math.isclose(gap["engine_gap"], torch.cat(d).abs().mean().item(), rel_tol=1e-4) and gap["engine_gap"] > 1e-2


def test_responses_no_longer_than_min_tokens_have_no_gap():
    policy, tokenizer = tiny_policy()
    _, sides, gap = added_log_probs(replace(CONFIG, tis_cap=2.0, min_tokens=4, max_tokens=4), policy, policy, tokenizer)
    assert gap == {} and all((side["importance"] == 1).all() for side in sides)


def test_a_cold_run_logs_no_gap(tmp_path):
    cold = replace(OFF_POLICY, variant="cold", temperature=0.5, n_grpo_steps=4)
    quiet_train(tmp_path, cold)
    assert all(line["train/engine_gap_max"] < 1e-4 for line in metrics_of(tmp_path, cold) if line["step"])


def note_sleep(monkeypatch, noted):
    """A live engine that notes when it samples, sleeps, wakes and gets weights; and updates that note themselves."""
    for name in ("generate", "sleep", "wake", "load_weights"):
        def call(self, *args, name=name, before=getattr(TransformersEngine, name), **kwargs):
            noted.append(name)
            return before(self, *args, **kwargs)
        monkeypatch.setattr(TransformersEngine, name, call)
    step = grpo_runs.grpo_step
    monkeypatch.setattr(grpo_runs, "grpo_step", lambda *args: (noted.append("update"), step(*args))[1])


def test_a_lean_runs_engine_sleeps_during_updates_and_learns_the_same(tmp_path, monkeypatch):
    whole, noted = quiet_train(tmp_path / "whole")[0], []
    monkeypatch.setattr(grpo_runs, "eight_bit_adamw", lambda: None)
    monkeypatch.setattr(grpo_runs, "make_optimizer", lambda *args, state_bits: (noted.append(state_bits), make_optimizer(*args))[1])
    note_sleep(monkeypatch, noted)
    lean, _ = quiet_train(tmp_path / "lean", lean=True)
    turn = ["generate", "sleep", "update", "wake", "load_weights"]
    assert noted[:13] == [8, "load_weights", "generate", *turn, *turn]  # the first is the evaluation before
    assert lean["final"]["answer_accuracy"] == whole["final"]["answer_accuracy"]
    losses = [[line["train/loss"] for line in read_metrics(run_folder(asdict(CONFIG), tmp_path / name)) if "train/loss" in line]
              for name in ("whole", "lean")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # activations computed twice are the same


def test_a_lean_runs_engine_does_not_sleep_while_it_samples_ahead(tmp_path, monkeypatch):
    class Sleeper(Watched):
        asleep = False

        def sleep(self): self.asleep = True

        def wake(self): self.asleep = False

        def generate(self, *args, **kwargs):
            out = super().generate(*args, **kwargs)
            assert not self.asleep
            return out

    monkeypatch.setattr(grpo_runs, "eight_bit_adamw", lambda: None)
    monkeypatch.setattr(grpo_runs, "make_optimizer", lambda *args, state_bits: make_optimizer(*args))
    assert quiet_train(tmp_path, replace(CONFIG, n_grpo_steps=4, eval_every=1), lean=True, engine=Sleeper())[0]["steps"] == 4


def test_a_lean_runs_engine_is_awake_after_a_step_that_failed(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no memory")

    noted = []
    monkeypatch.setattr(grpo_runs, "eight_bit_adamw", lambda: None)
    monkeypatch.setattr(grpo_runs, "make_optimizer", lambda *args, state_bits: make_optimizer(*args))
    note_sleep(monkeypatch, noted)
    monkeypatch.setattr(grpo_runs, "grpo_step", fails)
    with pytest.raises(RunStopped, match="no memory"):
        quiet_train(tmp_path, lean=True)
    assert noted[-2:] == ["sleep", "wake"]


@pytest.mark.parametrize("changes, message", [({"overlap": True}, "cannot sample ahead"), ({}, "pip install torchao")])
def test_what_a_lean_run_lacks_is_said_before_it_begins(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises((ValueError, ImportError), match=message):
        quiet_train(tmp_path, replace(CONFIG, **changes), lean=True)
    assert not list(tmp_path.iterdir())


def test_a_lean_run_with_torchao_goes_on_after_it_was_ended(tmp_path, monkeypatch):
    """8-bit states go through a checkpoint: the run that was ended at step 5 draws the curve of the one that was not."""
    pytest.importorskip("torchao")
    short, step = replace(CONFIG, n_grpo_steps=6), grpo_runs.grpo_step

    def ended(*args):
        if args[5] == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(grpo_runs, "load_policy", partial(tiny_policy, width=64))  # torchao leaves tensors under 4,096 as they are
    quiet_train(tmp_path / "whole", short, lean=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="safe after step 3"):
        patch.setattr(grpo_runs, "grpo_step", ended)
        quiet_train(tmp_path / "parts", short, lean=True)
    saved = runs.read_state(runs.find_checkpoint(run_folder(asdict(short), tmp_path / "parts")) / "state.pt")
    assert "8bit" in str({type(x) for part in saved["parts"]["optimizer"]["state"].values() for x in part.values()})
    quiet_train(tmp_path / "parts", short, lean=True)
    whole, parts = ([[line[key] for key in ("train/loss", "train/grad_norm")] for line in
                     read_metrics(run_folder(asdict(short), tmp_path / name)) if "train/loss" in line] for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 6
