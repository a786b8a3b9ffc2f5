"""What notebook E9 cannot show: processes that work together (gloo) make the run of one, and one that dies stops all.

The processes are forked, so that imports are paid for once; one test starts them with `accelerate launch`. The policy is
tiny and in float64: what differs is the order of sums, not a sampled token."""
import contextlib, ctypes, io, json, os, shutil, signal, socket, subprocess, sys, time, traceback
from dataclasses import asdict, replace
from pathlib import Path

import psutil, pytest, torch

import kills
from cs336_alignment import data, grpo, grpo_runs, log, models, runs, sft_math_reasoning, sft_math_reasoning_ei
from cs336_alignment.distributed import (checkpoint_parts, deal, in_shares, is_shard, joined, on_rank_zero, processes,
                                         rank, shard_layers, totals)
from cs336_alignment.grpo_settings import grpo_config
from cs336_alignment.inference import TransformersEngine
from cs336_alignment.packing import (Example, accumulate_gradients, make_optimizer, pack_rows, packed_log_probs,
                                     sft_examples, sft_loss, train_step)
from cs336_alignment.runs import RunConflict, read_metrics, run_folder
from cs336_alignment.sft_math_reasoning import sft_config
from cs336_alignment.sft_math_reasoning_ei import ei_config
from test_grpo_loop import digits_reward, tiny_policy

torch.set_num_threads(1)  # a process with one thread can be forked
CONFIG = grpo_config("micro", model="tiny", n_grpo_steps=4, rollout_batch_size=16, train_batch_size=8, group_size=4,
                     max_tokens=8, n_eval=10, eval_every=2, checkpoint_every=1, learning_rate=1e-2, loss_type="grpo_clip")


def together(n, work, folder):
    """`work()` in n forked processes that are joined; what each returns. Raises AssertionError if one fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(k):
        os.environ.update(RANK=str(k), WORLD_SIZE=str(n), LOCAL_RANK=str(k), LOCAL_WORLD_SIZE=str(n),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            with joined():
                torch.save(work(), folder / f"result_{n}_{k}.pt")
        except BaseException:
            traceback.print_exc()
            raise

    pids = [kills.in_child(lambda k=k: one(k)) for k in range(n)]
    assert [kills.ended_by(pid) for pid in pids] == [0] * n
    return [torch.load(folder / f"result_{n}_{k}.pt", weights_only=False) for k in range(n)]


def double_policy(*args, **kwargs):
    policy, tokenizer = tiny_policy()
    return policy.double(), tokenizer


def rows(lengths, seed=0):
    """Examples with prompts of 3 tokens and responses of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, 90, (n,), generator=draw).tolist()
    return [Example(ids(3), ids(n)) for n in lengths]


# --- the update

def three_updates(batches, max_tokens=60):
    policy, _ = double_policy()
    optimizer, lines = make_optimizer(policy, 1e-2), []
    for batch in batches:
        lines.append(train_step(policy, optimizer, sft_examples(batch), sft_loss, max_tokens))
    return lines, torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


BATCHES = {"even": [rows([10] * 8, k) for k in range(3)],
           "uneven": [rows([50, 1, 2, 3, 1, 40], 1), rows([7], 2), rows([50, 0, 0, 1], 3)],
           "fewer rows than processes": [rows([5], k) for k in range(3)]}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("n", [2, 3])
def test_the_processes_make_the_updates_of_one(tmp_path, name, n):
    lines, weights = three_updates(BATCHES[name])
    for theirs, their_weights in together(n, lambda: three_updates(BATCHES[name]), tmp_path):
        for line, their in zip(lines, theirs, strict=True):
            same = {k: v for k, v in line.items() if k != "micro_batches"}
            assert {k: their[k] for k in same} == pytest.approx(same, rel=1e-6)
        assert torch.allclose(their_weights, weights, rtol=0, atol=1e-7)


def test_the_parts_of_the_gradient_add_up_and_are_not_the_whole(tmp_path):
    def part():
        policy, _ = double_policy()
        accumulate_gradients(policy, sft_examples(rows([9, 3, 8, 2])), sft_loss)
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    whole, parts = part(), together(2, part, tmp_path)
    assert torch.allclose(sum(parts), whole, rtol=0, atol=1e-7)
    assert all((p - whole).norm() > 0.1 * whole.norm() for p in parts)


def test_a_bug_would_show_the_mean_of_each_process_is_not_the_mean_of_all(tmp_path):
    """What DDP makes of a loss that every process divides by its own tokens: the wrong update for uneven batches."""
    def mean(examples):
        policy, _ = double_policy()
        with torch.no_grad():
            logits = [policy(torch.tensor([[*e.prompt_ids, *e.response_ids]])).logits[0, 2:-1] for e in examples]
        chosen = [z.log_softmax(-1).gather(1, torch.tensor(e.response_ids)[:, None]) for z, e in zip(logits, examples)]
        return -torch.cat(chosen).mean().item()

    batch = rows([50, 1, 2, 3])
    means = together(2, lambda: mean([batch[i] for i in deal([1] * 4, 2)[rank()]]), tmp_path)
    assert abs(sum(means) / 2 - mean(batch)) > 1e-3


def test_bins_come_in_multiples_and_about_equal():
    for multiple in (1, 2, 3, 4):
        bins = pack_rows([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], 20, multiple)
        assert len(bins) % multiple == 0 and sorted(sum(bins, [])) == list(range(10))
        hands = [sum(10 - i for b in bins[k::multiple] for i in b) for k in range(multiple)]
        assert max(hands) - min(hands) <= 10
    assert pack_rows([5], 20, 4) == [[0], [], [], []] and pack_rows([], 20, 4) == []


def test_old_log_probs_are_shared_and_the_same(tmp_path):
    def work():
        return packed_log_probs(double_policy()[0], rows([9, 0, 3, 30, 2]), 40)

    whole = work()
    for theirs in together(2, work, tmp_path):
        for (lp, h), (their_lp, their_h) in zip(whole, theirs, strict=True):
            assert torch.allclose(lp, their_lp) and torch.allclose(h, their_h) and len(lp) == len(their_lp)


def test_shares_come_back_in_order_and_errors_of_the_first_reach_all(tmp_path):
    def work():
        mine = []
        result = in_shares(lambda xs, ys: [mine.append(x) or (x, y) for x, y in zip(xs, ys)], list(range(7)), "abcdefg",
                           sizes=[9, 1, 1, 1, 1, 1, 1], together=1)
        def refuse():
            raise RunConflict("no")
        try:
            on_rank_zero(refuse)
        except RunConflict as error:
            caught = str(error)
        return result, mine, caught, totals({"a": 1.0} if rank() else {"b": 2.0}), processes()

    (result, first, *rest), (other, second, *more) = together(2, work, tmp_path)
    assert result == other == list(enumerate("abcdefg")) and sorted(first + second) == list(range(7))
    assert len(first) == 1 and rest == more == ["no", {"b": 2.0, "a": 1.0}, 2]  # the large piece alone


# --- the run

def small_world(root):
    """Tiny policies in float64, easy rewards, in a child process."""
    for module in (grpo, log):
        module.reward_fn_of = lambda prompt: counted(root)
    grpo_runs.load_policy, grpo_runs.vllm_problem = double_policy, lambda: "not here."
    grpo_runs.run_problems = lambda config: (models.micro_problems(50, 0, "train"),
                                             models.micro_problems(50, 0, "test")[:config.n_eval])
    grpo_runs.save_policy = lambda *args: (root / "saved").open("a").write("once\n")
    runs.environment = lambda: {"gpu": None}


def counted(root):
    def reward(response, truth):
        with (root / "graded").open("a") as file:
            file.write("x\n")
        return digits_reward(response, truth)
    return reward


def train(root, config=CONFIG, **options):
    small_world(root)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        summary = grpo_runs.run_grpo(config, root=root, mirror=False, progress=False, **options)
    return summary, out.getvalue()


OTHER = replace(CONFIG, variant="other", epochs_per_rollout_batch=2, kl_coef=0.01, tis_cap=2.0, overlap=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process; another with a KL term, importance weights and rollouts that are sampled ahead."""
    root = tmp_path_factory.mktemp("whole")
    assert kills.ended_by(kills.in_child(lambda: train(root))) == 0
    assert kills.ended_by(kills.in_child(lambda: train(root, OTHER, engine=own_engine()))) == 0
    return root


def own_engine():
    """With weights of its own."""
    return TransformersEngine(*double_policy(), batch_size=64)


def test_old_log_probs_reference_and_sampling_ahead_are_shared_too(tmp_path, whole):
    together(2, lambda: train(tmp_path, OTHER, engine=own_engine()), tmp_path)
    assert_same_run(tmp_path, whole, OTHER)


def assert_same_run(root, whole, config=CONFIG):
    """All lines of the log and all records of rollouts, each once; sums may round."""
    for name in runs.LOGS:
        ours, theirs = (kills.record(run_folder(asdict(config), place))[name] for place in (root, whole))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert a.keys() == b.keys()
            for k in a:
                assert a[k] == (pytest.approx(b[k], rel=1e-5, abs=1e-8) if isinstance(b[k], float) else b[k]) or k == "train/micro_batches"


def test_a_run_of_two_is_the_run_of_one_and_everything_is_done_once(tmp_path, whole):
    (first, said), (second, _) = together(2, lambda: train(tmp_path), tmp_path)
    assert_same_run(tmp_path, whole)
    assert first["final"] == second["final"] and first["steps"] == 4
    lines = lambda name: (tmp_path / name).read_text().split()
    assert lines("saved") == ["once"] and len(lines("graded")) == 4 * 16 + 3 * 10  # steps, evaluations
    folder = run_folder(asdict(CONFIG), tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in run_folder(asdict(CONFIG), whole).iterdir())
    assert [line["step"] for line in read_metrics(folder)] == [0, 1, 2, 3, 4]
    assert read_metrics(folder)[-1]["train/reward_mean"] != read_metrics(folder)[1]["train/reward_mean"]  # it moves


class Interrupted(TransformersEngine):
    """The live policy; process 1 gets a Ctrl-C in its third call (evaluation, step 1, step 2)."""

    def __init__(self):
        super().__init__(*double_policy(), batch_size=64)
        self.calls = 0

    def generate(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3 and rank() == processes() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3), (3, 2)])
def test_a_stop_asked_of_one_stops_all_and_another_number_goes_on(tmp_path, whole, before, after):
    for summary, said in together(before, lambda: train(tmp_path, engine=Interrupted()), tmp_path):
        assert summary is None
    assert runs.find_checkpoint(run_folder(asdict(CONFIG), tmp_path)).name == "step_00000002"
    for summary, said in together(after, lambda: train(tmp_path), tmp_path):
        assert summary["steps"] == 4
    assert_same_run(tmp_path, whole)


def test_machines_that_do_not_share_a_folder_are_told(tmp_path):
    """Else one would go on and the other begin."""
    together(2, lambda: train(tmp_path, engine=Interrupted()), tmp_path)

    def go_on():
        with pytest.raises(ValueError, match="None, step_00000002. Several machines need a --root that they share"):
            train(tmp_path if rank() == 0 else tmp_path / "own")

    together(2, go_on, tmp_path)


class FailsAt(TransformersEngine):
    """The live policy; in process 1 its k-th call fails."""

    def __init__(self, k):
        super().__init__(*double_policy(), batch_size=64)
        self.left = k

    def generate(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and rank() == 1:
            raise RuntimeError("engine replica 0 ended with code -9")
        return super().generate(*args, **kwargs)


def test_an_error_of_one_process_stops_the_others_with_a_safe_step(tmp_path):
    def work():
        try:
            train(tmp_path, replace(CONFIG, checkpoint_every=100), engine=FailsAt(5))
        except grpo_runs.RunStopped as error:  # evaluation, steps 1 and 2, evaluation, step 3
            torch.save(str(error), tmp_path / f"error_{rank()}")
            os._exit(0)  # as a command does: the others do not wait

    with pytest.raises(FileNotFoundError):  # no results
        together(2, work, tmp_path)
    said = [torch.load(tmp_path / f"error_{k}") for k in range(2)]
    assert "step 3 failed" in said[0] and "The run is safe after step 2" in said[0]
    assert "step 3 failed: engine replica 0 ended" in said[1]


# --- sharded layers

def sharded_updates(batches):
    policy, _ = double_policy()
    shard_layers(policy)
    optimizer, lines = make_optimizer(policy, 1e-2), []
    for batch in batches:
        lines.append(train_step(policy, optimizer, sft_examples(batch), sft_loss, 60))
    parts = checkpoint_parts(policy, optimizer)
    return lines, {name: part.state_dict() for name, part in parts.items()}, sum(is_shard(p) for p in policy.parameters())


@pytest.mark.parametrize("name", BATCHES)
def test_sharded_layers_make_the_updates_of_one_process(tmp_path, name):
    lines, weights = three_updates(BATCHES[name])
    (theirs, saved, shards), (also, nothing, _) = together(2, lambda: sharded_updates(BATCHES[name]), tmp_path)
    assert shards == 9 and theirs == also  # of a layer; embeddings and last norm are whole
    for line, their in zip(lines, theirs, strict=True):
        same = {k: v for k, v in line.items() if k != "micro_batches"}
        assert {k: their[k] for k in same} == pytest.approx(same, rel=1e-6)
    policy, _ = double_policy()
    policy.load_state_dict(saved["model"])
    assert torch.allclose(torch.nn.utils.parameters_to_vector(policy.parameters()), weights, rtol=0, atol=1e-7)
    optimizer = make_optimizer(policy, 1e-2)
    optimizer.load_state_dict(saved["optimizer"])  # the form of one process
    assert optimizer.state[next(policy.parameters())]["step"] == 3


def test_sharded_layers_add_up_in_float32_too(tmp_path):
    """The precision of a run, in which FSDP would add up with a factor; gloo cannot."""
    def updates(sharded):
        model, batches = double_policy()[0].float(), next(iter(BATCHES.values()))
        if sharded:
            shard_layers(model)
        optimizer = make_optimizer(model, 1e-2)
        lines = [train_step(model, optimizer, sft_examples(batch), sft_loss, 60) for batch in batches]
        return [line[name] for line in lines for name in ("loss", "grad_norm")]

    alone = updates(False)
    for theirs in together(2, lambda: updates(True), tmp_path):
        assert theirs == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("before, after", [((2, True), (1, False)), ((1, False), (2, True)), ((2, True), (3, True))])
def test_a_sharded_run_goes_on_with_another_number(tmp_path, whole, before, after):
    for (n, shard), engine in ((before, Interrupted), (after, own_engine)):
        results = together(n, lambda: train(tmp_path, engine=engine(), shard=shard), tmp_path)
    assert all(summary["steps"] == 4 for summary, _ in results)
    assert_same_run(tmp_path, whole)


def test_sharding_is_refused_where_it_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="start several processes"):
        shard_layers(double_policy()[0])

    def work():
        try:
            train(tmp_path, shard=True)
        except ValueError as error:
            return str(error)

    assert all("needs an engine with weights of its own" in said for said in together(2, work, tmp_path))


# --- SFT and expert iteration

SFT = sft_config("micro", 24, model="tiny", batch_size=8, epochs=1, n_eval=6, evaluations=2, max_tokens=8, min_steps=0,
                 learning_rate=1e-2)
EI = ei_config("micro", model="tiny", questions=4, group_size=4, n_ei_steps=2, batch_size=4, n_eval=6, max_tokens=8,
               learning_rate=1e-2)


def finetune(root, work, config):
    models.load_policy, models.save_policy = double_policy, lambda *args: (root / "saved").open("a").write("once\n")
    runs.environment, log.reward_fn_of = lambda: {"gpu": None}, lambda prompt: digits_reward
    sft_math_reasoning_ei.reward_fn_of = lambda prompt: digits_reward
    with contextlib.redirect_stdout(io.StringIO()):
        return work(config, root=root, progress=False)


@pytest.mark.parametrize("work, config", [(sft_math_reasoning.sft, SFT), (sft_math_reasoning_ei.expert_iteration, EI)])
def test_finetuning_of_two_is_that_of_one(tmp_path, work, config):
    root = {n: tmp_path / str(n) for n in (1, 2)}
    for n, place in root.items():
        place.mkdir()
        together(n, lambda: finetune(place, work, config), tmp_path)
    assert_same_run(root[2], root[1], config)
    assert (root[2] / "saved").read_text() == "once\n"


# --- the launcher

SETTINGS = {"rollout_batch_size": 16, "train_batch_size": 16, "group_size": 4, "max_tokens": 12, "n_eval": 8,
            "eval_every": 20, "checkpoint_every": 2}


def launch(root):
    """The command of notebook E9 with two processes, eight small steps."""
    options = [x for k, v in SETTINGS.items() for x in ("--set", f"{k}={v}")]
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                             "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
                             "cs336_alignment.grpo_experiments", "--track", "micro", "--variant", "v", "--steps", "8", "--root", root, *options],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=data.repo_root(),
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_a_killed_process_stops_the_job_which_goes_on_alone(tmp_path):
    job, folder = launch(tmp_path), tmp_path / "grpo_micro" / "v_seed0"
    until = time.monotonic() + 120
    while len(read_metrics(folder)) < 4 and job.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    workers = {p.environ().get("RANK"): p for p in psutil.Process(job.pid).children(recursive=True) if "RANK" in p.environ()}
    workers["1"].kill()
    out, error = job.communicate(timeout=120)
    assert job.returncode not in (0, None) and "Signal 9 (SIGKILL)" in error
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers.values())
    assert not (folder / "summary.json").exists() and runs.find_checkpoint(folder)
    config = grpo_config("micro", variant="v", n_grpo_steps=8, **SETTINGS)
    assert kills.ended_by(kills.in_child(lambda: grpo_runs.run_grpo(config, root=tmp_path, mirror=False, keep_policy=False))) == 0
    assert [line["step"] for line in read_metrics(folder)] == list(range(9))
    known = json.loads((folder / "environment.json").read_text())
    assert known["processes"] == 2 and "processes" not in known["resumed"][0]


def test_experiments_refuse_a_launcher():
    done = subprocess.run([sys.executable, "-m", "cs336_alignment.grpo_experiments", "lr-sweep"], capture_output=True, text=True,
                          cwd=data.repo_root(), env=os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert done.returncode == 2 and done.stderr.startswith("error: lr-sweep puts runs side by side") and done.stderr.count("\n") == 1


# --- machines

def leave(flags):
    """Puts this process into new namespaces (CLONE_NEWUSER, CLONE_NEWNET). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def ip(*lines):
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def on_two_machines(work):
    """`work(k)` in two processes, k = 0 and 1, each in a network of its own, with a cable between them."""
    user = os.getuid()
    leave(0x1000_0000 | 0x4000_0000)
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    (there, arrived), (plugged, plug) = os.pipe(), os.pipe()

    def second():
        leave(0x4000_0000)
        os.write(arrived, b"!"), os.read(plugged, 1)
        ip("link set lo up", "addr add 10.77.0.2/24 dev vb", "link set vb up")
        work(1)

    pid = kills.in_child(second)
    os.read(there, 1)
    ip("link add va type veth peer name vb", f"link set vb netns {pid}", "link set lo up", "addr add 10.77.0.1/24 dev va",
       "link set va up")
    os.write(plug, b"!")
    work(0)
    assert kills.ended_by(pid) == 0


def can_have_networks():
    return shutil.which("ip") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_have_networks(), reason="no network namespaces here")
def test_two_machines_make_one_run(tmp_path, whole):
    """As far as two network namespaces are two machines; both see the same folder."""
    def work(k):
        os.environ.update(RANK=str(k), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="10.77.0.1",
                          MASTER_PORT="29500", GLOO_SOCKET_IFNAME="va" if k == 0 else "vb")
        with joined():
            train(tmp_path)

    assert kills.ended_by(kills.in_child(lambda: on_two_machines(work))) == 0
    assert_same_run(tmp_path, whole)


# --- bench/scaling.py

def bench(*arguments):
    return subprocess.run([sys.executable, data.repo_root() / "bench" / "scaling.py", *arguments], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("arguments, message", [([], "no GPU here"), (["--only", "both"], "--only is pocket or course"),
                                                (["--gpus", "1,x"], "--gpus takes numbers"), (["--gpus", "1,"], "--gpus takes numbers")])
def test_the_bench_refuses_in_one_line(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_bench_measures_one_process_and_two(tmp_path):
    """The shape whose weights the first process saves for the others."""
    done = bench("--small", "--only", "course", "--gpus", "1,2", "--steps", "1", "--out", str(tmp_path / "scaling.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(r["processes"], r["mixed_groups"]) for r in rows] == [(1, 1.0), (1, 0.4), (2, 1.0), (2, 0.4)]
    assert all(r["step_s"] > 0 and r["update_mfu"] > 0 and r["efficiency"] > 0 and 0 < r["share_trained"] <= 1 for r in rows)


def test_a_number_of_gpus_measured_later_keeps_the_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(data.repo_root() / "bench"))
    import scaling

    def start(n, arguments):
        row = {"shape": "a", "mixed_groups": 1.0, "processes": n, "step_s": 8.0 / n}
        Path(arguments[arguments.index("--out") + 1]).write_text(json.dumps([row]))
        return int(n == 4)

    monkeypatch.setattr(scaling, "start", start)
    out = tmp_path / "scaling.json"
    codes = [scaling.measure_all(out, True, 1, "static", 1, ["a"], numbers) for numbers in ([1], [2, 4])]
    found = json.loads(out.read_text())
    assert codes == [0, 1] and [(r["processes"], r["efficiency"]) for r in found["rows"]] == [(1, 1.0), (2, 1.0)]
    assert found["failed"] == ["a on 4"] and found["commit"]


def test_efficiency_is_against_one_process_of_the_same_shape(monkeypatch):
    monkeypatch.syspath_prepend(str(data.repo_root() / "bench"))
    import scaling
    row = lambda shape, n, seconds: {"shape": shape, "mixed_groups": 1.0, "processes": n, "step_s": seconds}
    rows = scaling.with_efficiency([row("a", 1, 8.0), row("a", 2, 5.0), row("b", 2, 1.0)])
    assert [r["efficiency"] for r in rows] == [1.0, 0.8, None]
    rewards = scaling.RewardsByText(10, 0.4)
    right = lambda truth: sum(rewards(c, truth)["reward"] for c in "abcdefgh")
    assert 0 < right("3") < 8 and right("4") == 0
