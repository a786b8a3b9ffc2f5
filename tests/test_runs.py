"""What notebook E4 cannot show: processes that are killed at any moment, a second writer, a disk that is full.

The training loop below uses the library exactly as the experiments do. It runs in child processes made by fork, so that the
imports are paid for once; they are killed with SIGKILL."""
import contextlib, errno, io, json, os, random, re, shutil, signal, subprocess, sys, time

import numpy as np, pytest, torch
from torch import nn
from tqdm import tqdm

import kills
from cs336_alignment import runs
from cs336_alignment.runs import (DiskFull, RunConflict, batch_indices, finish_run, log_metrics, log_rollouts,
                                  open_run, read_metrics, read_summary, restore_checkpoint, run_folder,
                                  save_checkpoint, seed_everything, training_steps)
from kills import ended_by, in_child, kill_ten_times

CONFIG = {"family": "kill", "track": "toy", "variant": "a", "seed": 3, "n_eval": 64, "temperature": 1.0}
SIZE, POINTS = 16, 100
torch.set_num_threads(1)  # a process with one thread can be forked


@pytest.fixture(scope="module", autouse=True)
def all_is_imported(tmp_path_factory):
    """What the first training imports takes seconds: once here, and not in each of the children."""
    train(tmp_path_factory.mktemp("warm"), 2, every=1)


@pytest.fixture(autouse=True)
def known_environment(monkeypatch):
    """Versions and commit take a second to find out; here runs are opened hundreds of times."""
    monkeypatch.setattr(runs, "environment", lambda: {"gpu": None})


def train(root, steps, every=5, pause=0.0, at_end=lambda parts: None, config=CONFIG, later=False):
    """A small training run with dropout, AdamW, a schedule, all four generators in use, evaluations and rollouts.

    later: its checkpoints are written by a thread while the next steps train."""
    with contextlib.redirect_stdout(io.StringIO()), open_run(config, root, mirror=False) as run:
        if run.summary:
            return
        seed_everything(config["seed"])
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        parts = {"model": model, "optimizer": optimizer,
                 "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)}
        x = torch.randn(POINTS, 4, generator=torch.Generator().manual_seed(0))
        best = (restore_checkpoint(run, parts) or {"best": 1e9})["best"]
        if run.step == 0:
            log_metrics(run, 0, {"eval/answer_accuracy": model(x).mean()})
        for step in training_steps(run, steps, progress=False):
            rows = batch_indices((step - 1) * SIZE, SIZE, POINTS, config["seed"])
            noise = random.gauss(0, 0.1) + np.random.randn() * 0.1
            loss = (model(x[rows]).squeeze(1) - x[rows].sum(1) + noise).pow(2).mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad(), parts["scheduler"].step()
            best = min(best, loss.item())
            log_metrics(run, step, {"train/loss": loss, "train/best": best, "train/odd": float("nan")})
            if step % every == 0:
                log_metrics(run, step, {"eval/answer_accuracy": model(x).mean()})
                log_rollouts(run, step, [{"response": f"√ {step} {i}", "reward": random.random()} for i in range(2)])
                save_checkpoint(run, step, parts, {"best": best}, later=later)
            if pause:
                time.sleep(pause)
        finish_run(run)
        at_end(parts)


def record(root):
    return kills.record(run_folder(CONFIG, root))


def clock_runs_forward(root):
    times = [line["wall_s"] for line in read_metrics(run_folder(CONFIG, root))]
    return times == sorted(times)


@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
def test_ten_random_kills_leave_the_same_run(tmp_path, later):
    steps, pause, begin = 100, 0.005, time.monotonic()
    assert ended_by(in_child(lambda: train(tmp_path / "whole", steps, pause=pause))) == 0
    kill_ten_times(lambda: train(tmp_path / "killed", steps, pause=pause, later=later), run_folder(CONFIG, tmp_path / "killed"),
                   0.3 * (time.monotonic() - begin))
    assert record(tmp_path / "killed") == record(tmp_path / "whole")
    assert clock_runs_forward(tmp_path / "killed")


FILE_CALLS = [(os, "replace"), (os, "fsync"), (os, "truncate"), (os, "rmdir"), (os, "unlink"), (runs, "append_jsonl"),
              (runs, "write_json"), (torch, "save")]


def die_at_call(k):
    """From now on, this process kills itself in its k-th call of FILE_CALLS: before it, or half-way through a write."""
    count = [0]

    def deadly(original, name):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] != k:
                return original(*args, **kwargs)
            if name == "append_jsonl":  # half of the line reaches the disk
                with open(args[0], "a") as file:
                    file.write(json.dumps(args[1])[:20])
            if name == "save":  # as does a part of the checkpoint
                args[1].write(b"PK\x03\x04" * 100), args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return call

    for module, name in FILE_CALLS:
        setattr(module, name, deadly(getattr(module, name), name))
    return count


@pytest.mark.timeout(60)
def test_a_child_that_is_killed_with_the_lock_of_progress_bars_stops_no_later_one():
    tqdm.get_lock()  # made here, so that a fork shares it
    read, write = os.pipe()
    pid = in_child(lambda: (tqdm.get_lock().acquire(), os.write(write, b"!"), time.sleep(60)))
    os.read(read, 1)  # the child has it
    os.kill(pid, signal.SIGKILL)
    assert ended_by(pid) == signal.SIGKILL
    assert ended_by(in_child(lambda: list(tqdm(range(3), file=io.StringIO())))) == 0


@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
def test_a_kill_at_every_single_write(tmp_path, later):
    """Written later, the calls of two threads come in any order, but as many."""
    steps, counted = 4, tmp_path / "count"

    def count_calls():
        count = die_at_call(-1)
        train(tmp_path / "whole", steps, every=2, later=later)
        counted.write_text(str(count[0]))

    assert ended_by(in_child(count_calls)) == 0
    expected, calls = record(tmp_path / "whole"), int(counted.read_text())
    assert calls > 25
    for k in range(1, calls + 1):
        root = tmp_path / str(k)
        assert ended_by(in_child(lambda: (die_at_call(k), train(root, steps, every=2, later=later)))) == signal.SIGKILL, k
        assert ended_by(in_child(lambda: train(root, steps, every=2, later=later))) == 0, f"not resumable after a kill at call {k}"
        assert record(root) == expected, f"another run after a kill at call {k}"
        assert clock_runs_forward(root)


def test_the_weights_are_the_same_too(tmp_path):
    save = lambda name: lambda parts: torch.save(parts["model"].state_dict(), tmp_path / name)
    assert ended_by(in_child(lambda: train(tmp_path / "whole", 15, at_end=save("whole.pt")))) == 0
    assert ended_by(in_child(lambda: (die_at_call(40), train(tmp_path / "killed", 15)))) == signal.SIGKILL
    assert ended_by(in_child(lambda: train(tmp_path / "killed", 15, at_end=save("killed.pt")))) == 0
    whole, killed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)


def test_two_writers_of_one_folder(tmp_path, monkeypatch):
    pid = in_child(lambda: train(tmp_path, 50, pause=1.0))
    try:
        folder = run_folder(CONFIG, tmp_path)
        deadline = time.monotonic() + 20
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        before = (folder / "metrics.jsonl").read_bytes()
        monkeypatch.setattr(runs.only_writer.__wrapped__, "__defaults__", (0.2,))
        with pytest.raises(RunConflict, match="being written by another process"):
            train(tmp_path, 50)
        assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    finally:
        os.kill(pid, signal.SIGKILL)
        ended_by(pid)
    train(tmp_path, 5)  # the lock ended with its process
    assert read_summary(run_folder(CONFIG, tmp_path))["steps"] == 5


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
@pytest.mark.parametrize("broken", ["append_jsonl", "write_json", "sync", "torch.save"])
def test_full_disk_keeps_what_is_written(tmp_path, monkeypatch, broken, later):
    """The disk is full from the third checkpoint on, whatever is being written."""
    train(tmp_path / "whole", 20)
    target = (torch, "save") if broken == "torch.save" else (runs, broken)

    def fill_disk(run, step):
        if step == 10:  # the second checkpoint is there; from now on nothing can be written
            runs.finish_writing(run)
            monkeypatch.setattr(*target, no_space)

    original = runs.save_checkpoint
    monkeypatch.setitem(globals(), "save_checkpoint",
                        lambda run, step, *args, **how: (original(run, step, *args, **how), fill_disk(run, step)))
    with pytest.raises(DiskFull, match="the disk is full: cannot write .* continues after step 10"):
        train(tmp_path / "full", 20, later=later)
    monkeypatch.undo()
    folder = run_folder(CONFIG, tmp_path / "full")
    assert max(line["step"] for line in read_metrics(folder)) >= 10
    assert runs.find_checkpoint(folder).name == "step_00000010"
    train(tmp_path / "full", 20, later=later)
    assert record(tmp_path / "full") == record(tmp_path / "whole")


class InBytes(torch.Tensor):
    """A tensor of two others, as torchao's 8-bit states: `to` copies nothing that is on the device already."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, how, size, stride):
        return cls(**parts)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        return cls(args[0].codes, args[0].scale)


def test_what_is_written_later_is_a_copy():
    """Of tensors of other packages too; those that share their memory do so again."""
    tied, state = torch.zeros(4), InBytes(torch.zeros(4, dtype=torch.uint8), torch.zeros(1))
    copied = runs.on_host({"tied": (tied, tied.detach()), "row": [tied[None, 1:]], "in bytes": state, "step": 3})
    for own in (tied, state.codes, state.scale):
        own += 1
    a, b = copied["tied"]
    assert a.data_ptr() == b.data_ptr() and type(copied["in bytes"]) is InBytes and copied["step"] == 3
    assert not any(t.any() for t in (a, b, copied["row"][0], copied["in bytes"].codes, copied["in bytes"].scale))


class SlowDisk:
    """In place of `write_checkpoint`: notes in `seen` what happens, and lets 0.2 s pass before it writes."""

    def __init__(self, monkeypatch, act=lambda: None):
        self.seen, self.write, self.act = [], runs.write_checkpoint, act
        monkeypatch.setattr(runs, "write_checkpoint", self)

    def __call__(self, folder, state, position):
        self.seen.append(f"begins {position['step']}")
        time.sleep(0.2)
        self.act()
        self.write(folder, state, position)
        self.seen.append(f"done {position['step']}")


def saved_run(root, *steps, finish=False):
    """A run that saves a checkpoint after each of `steps`, to be written later; the lock is free when it returns."""
    with contextlib.redirect_stdout(io.StringIO()), open_run(CONFIG, root, mirror=False) as run:
        for step in steps:
            log_metrics(run, step, {"train/loss": 0.0})
            save_checkpoint(run, step, {"model": nn.Linear(2, 2)}, later=True)
        return finish_run(run) if finish else run


def test_one_checkpoint_is_written_at_a_time_and_the_end_waits_for_it(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    run = saved_run(tmp_path, 1, 2)
    assert disk.seen == ["begins 1", "done 1", "begins 2", "done 2"] and (run.step, run.writing) == (2, None)
    assert runs.find_checkpoint(run.folder).name == "step_00000002"
    saved_run(tmp_path, 3, finish=True)
    assert disk.seen[4:] == ["begins 3", "done 3"] and not (run.folder / "checkpoints").exists()  # nothing is left, or comes later


@pytest.mark.parametrize("finish", [False, True], ids=["open_run ends", "finish_run"])
def test_what_went_wrong_with_the_last_checkpoint_is_told_at_the_end(tmp_path, monkeypatch, finish):
    saved_run(tmp_path, 1)
    SlowDisk(monkeypatch, no_space)
    with pytest.raises(DiskFull, match="the checkpoint of step 2.*continues after step 1"):
        saved_run(tmp_path, 2, finish=finish)
    folder = run_folder(CONFIG, tmp_path)
    assert runs.find_checkpoint(folder).name == "step_00000001" and read_summary(folder) is None
    monkeypatch.undo()
    monkeypatch.setattr(runs, "environment", lambda: {"gpu": None})
    assert saved_run(tmp_path, 2, finish=True)["steps"] == 2


def test_the_lock_is_held_until_the_last_checkpoint_is_written(tmp_path, monkeypatch):
    """Also if nobody waits for it, after a Ctrl-C in the waiting: another writer would remove what is half written."""
    disk, wait = SlowDisk(monkeypatch), runs.finish_writing
    monkeypatch.setattr(runs, "finish_writing", lambda run: run.writing and interrupt())
    with pytest.raises(KeyboardInterrupt):
        saved_run(tmp_path, 1)
    assert "done 1" not in disk.seen
    monkeypatch.setattr(runs, "finish_writing", wait)
    assert saved_run(tmp_path, 2).step == 2  # it was patient
    assert disk.seen == ["begins 1", "done 1", "begins 2", "done 2"]
    assert runs.find_checkpoint(run_folder(CONFIG, tmp_path)).name == "step_00000002"


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KB, where one may be mounted."""
    disk = tmp_path / "tiny"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk],
                                                       capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(tiny_disk, tmp_path):
    """With less and less room: an error that says so, and the run can be finished once there is room again."""
    train(tmp_path / "whole", 30)
    for free_kb in (0, 4, 8, 12, 16, 24, 32, 40, 48):
        ballast, root = tiny_disk / "ballast", tiny_disk / "results"
        ballast.write_bytes(bytes(1024 * (256 - free_kb)))
        with pytest.raises(DiskFull, match="the disk is full: cannot write"):
            train(root, 30)
        ballast.unlink()
        train(root, 30)
        assert record(root) == record(tmp_path / "whole"), f"{free_kb} KB"
        shutil.rmtree(root)


WANDB_RUN = """
import sys
from cs336_alignment.runs import finish_run, log_metrics, open_run
with open_run({"family": "f", "track": "toy", "variant": "v", "seed": 1}, sys.argv[1]) as run:
    for step in range(3):
        log_metrics(run, step, {"train/loss": 1 / (step + 1), "eval/answer_accuracy": step / 4, "train/odd": float("nan")})
    finish_run(run)
"""


def wandb_records(path):
    '''The records of a .wandb file: LevelDB's log format, blocks of 32 KB after a head of 7 bytes that counts as well.'''
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]  # kind: 1 whole, 2 first, 3 middle, 4 last
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def test_wandb_keeps_the_same_numbers_offline(tmp_path):
    """The real wandb, nobody logged in: a run on disk, nothing but our own line on the screen, the numbers as logged."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", WANDB_RUN, str(tmp_path / "runs")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["f_toy/v_seed1: begins", "wandb: offline mirror, project cs336-alignment (`wandb login` for online)"]
    assert done.stderr == ""
    file, = (tmp_path / "runs").glob("wandb/offline-run-*/*.wandb")
    history = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
               for record in wandb_records(file) if record.WhichOneof("record_type") == "history"]
    lines = read_metrics(tmp_path / "runs" / "f_toy" / "v_seed1")
    assert [{k: line[k] for k in ("train/loss", "eval/answer_accuracy")} for line in lines] == [
        {k: step[k] for k in ("train/loss", "eval/answer_accuracy")} for step in history]
    assert [step["_step"] for step in history] == [0, 1, 2] and not any("train/odd" in step for step in history)


def test_disabled_wandb_is_not_even_imported(tmp_path):
    code = WANDB_RUN + "\nassert not [name for name in sys.modules if name.startswith(('wandb', 'pandas'))], 'imported'"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"WANDB_MODE": "disabled"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "f_toy/v_seed1: begins\n", "")


# --- files of a run that hold something else

NO_OBJECT = ["[]", "null", "5", '"text"', "true", "[{}]", "", '{"step": ', "NaN", "[" * 100_000]
OTHER = {"config.json": ["{}", '{"family": "f", "track": "toy", "variant": null, "seed": 0}',
                         '{"family": "f", "track": "toy", "variant": "a", "seed": "0"}'],
         "position.json": ["{}", '{"step": 5}', '{"step": "5", "wall_s": 1, "bytes": {}}', '{"step": 5, "wall_s": 1, "bytes": []}',
                           '{"step": 5, "wall_s": null, "bytes": {}}', '{"step": 5, "wall_s": 1, "bytes": {"metrics.jsonl": "9"}}'],
         "summary.json": ["{}", '{"steps": 5}', '{"steps": 5, "final": []}', '{"steps": "three", "final": {}}'],
         "environment.json": ['{"resumed": 5}', '{"resumed": [5]}', '{"resumed": {"gpu": null}}']}


@pytest.mark.parametrize("name, text", [(name, text) for name, more in OTHER.items() for text in NO_OBJECT + more],
                         ids=lambda text: text[:40])
def test_files_of_another_shape_are_named(tmp_path, name, text):
    folder = run_folder(CONFIG, tmp_path)
    train(tmp_path, 10)
    if name != "summary.json":
        (folder / "summary.json").unlink()
    if name == "position.json":
        runs.write_checkpoint(folder, {}, {"step": 10, "wall_s": 1.0, "bytes": {}})
    place = next(folder.rglob(name)) if name != "summary.json" else folder / name
    place.write_text(text)
    with pytest.raises(ValueError) as error:
        train(tmp_path, 10)
    said = str(error.value)
    assert str(place) in said and "restore it, or run anew with force" in said and "\n" not in said and len(said) < 400
    assert place.read_text() == text


@pytest.mark.parametrize("name, reader", [("config.json", runs.run_table), ("config.json", runs.load_runs),
                                          ("config.json", runs.load_rollouts), ("summary.json", runs.run_table),
                                          ("summary.json", runs.load_runs), ("environment.json", runs.run_table)])
@pytest.mark.parametrize("text", NO_OBJECT, ids=lambda text: text[:20])
def test_readers_of_run_folders_name_them_too(tmp_path, name, reader, text):
    train(tmp_path, 5)
    (place := run_folder(CONFIG, tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(place))):
        reader(tmp_path)


@pytest.mark.parametrize("name, reader", [("metrics.jsonl", runs.load_runs), ("metrics.jsonl", runs.read_metrics),
                                          ("metrics.jsonl", runs.publishable), ("rollouts.jsonl", runs.load_rollouts),
                                          ("rollouts.jsonl", runs.publishable)])
@pytest.mark.parametrize("text", [t for t in NO_OBJECT if t and t != '{"step": '], ids=lambda text: text[:20])
def test_lines_of_logs_that_hold_something_else_are_named(tmp_path, name, reader, text):
    train(tmp_path, 5)
    with (place := run_folder(CONFIG, tmp_path) / name).open("a") as log:
        log.write(text + "\n")
    with pytest.raises(ValueError, match=re.escape(str(place)) + r":\d+: "):
        reader(place.parent)


@pytest.mark.parametrize("text", NO_OBJECT + ['{"f_toy": 5}', '{"f_toy": []}', '{"f_toy": {"question": 5}}'], ids=lambda text: text[:20])
def test_what_is_told_of_families_is_checked(tmp_path, text):
    train(tmp_path / "runs", 5)
    runs.publish("f_toy", tmp_path / "runs", tmp_path / "results" / "f_toy")
    (place := tmp_path / "results" / "families.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(place))):
        runs.write_index(tmp_path / "results")
    for fine in ("{}", '{"f_toy": null}', '{"f_toy": {"question": "?"}}', '{"other": {"question": "?"}}'):
        place.write_text(fine)
        runs.write_index(tmp_path / "results")


def test_runs_moved_aside_in_any_way_are_not_listed(tmp_path):
    names = ["a_seed0", "a_seed0.old1", "a_seed12.old22", "a_seed0.old", "b.old1_seed0", "b.old_seed3", "old_seed1"]
    for name in names + ["old/a_seed0.1", "old/c_seed0"]:
        (tmp_path / "f" / name).mkdir(parents=True)
        (tmp_path / "f" / name / "config.json").write_text("{}")
    kept = ["a_seed0", "b.old1_seed0", "b.old_seed3", "old_seed1"]
    assert [f.name for f in runs.run_folders(tmp_path)] == [f.name for f in runs.run_folders(tmp_path / "f")] == kept
    assert len(runs.run_folders(tmp_path / "f" / "a_seed0.old1")) == 1  # asked for by name
