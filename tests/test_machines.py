"""Several machines: processes in two network namespaces, joined by a virtual cable, as notebooks E9 and E9a launch them.

A namespace has network cards, addresses and ports of its own: nothing reaches the other but over the cable (gloo; NCCL needs GPUs).
Making one takes root, `unshare` and `ip`; where they are not to be had, these tests are skipped, and say so.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cs336_alignment import runs
from cs336_alignment.data import repo_root
from cs336_alignment.runs import read_metrics

ADDRESSES, CABLE = ["10.77.0.1", "10.77.0.2"], "cable"
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "PYTHONPATH": str(repo_root())}
COMMAND = ["-m", "cs336_alignment.grpo_experiments", "--track", "micro", "--variant", "v"]
SIZES = dict(rollout_batch_size=48, train_batch_size=24, n_eval=16, eval_every=2, checkpoint_every=1, loss_type="grpo_clip")


def namespace() -> subprocess.Popen:
    """A process with a network namespace of its own, which lasts as long as the process: until its standard input ends."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("network namespaces cannot be made here: the commands unshare and ip are needed")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo up; exec cat"], **pipes)
    if holder.stdout.readline() != "up\n":
        pytest.skip(f"network namespaces cannot be made here: {holder.communicate()[1].strip()}")
    return holder


@pytest.fixture
def machines():
    """Starts a command on machine 0 or 1: `start(k, words, **variables)`. All is ended and gone afterwards."""
    with contextlib.ExitStack() as after:
        holders = []
        for k in (0, 1):
            holders.append(namespace())
            after.callback(holders[k].communicate)
        inside = [["nsenter", f"--net=/proc/{holder.pid}/ns/net"] for holder in holders]
        cable = [word for holder in holders for word in ("name", CABLE, "netns", str(holder.pid))]
        made = subprocess.run(["ip", "link", "add", *cable[:4], "type", "veth", "peer", *cable[4:]], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"a cable between network namespaces cannot be made here: {made.stderr.strip()}")
        for words, address in zip(inside, ADDRESSES):
            for change in (f"addr add {address}/24 dev {CABLE}", f"link set {CABLE} up", "link set lo up"):
                subprocess.run([*words, "ip", *change.split()], check=True)

        def start(k, words, **variables):
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            process = subprocess.Popen([*inside[k], sys.executable, *map(str, words)], **pipes, start_new_session=True, env=QUIET | variables)
            after.callback(end, process)
            return process

        yield start


def end(process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def options(root, steps=2, *more) -> list:
    return [*COMMAND, "--steps", steps, "--root", root, *(x for k, v in SIZES.items() for x in ("--set", f"{k}={v}")), *more]


def finished(*processes) -> list[str]:
    """What each has printed, once it has ended well."""
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out for out, _ in said]


def launched(machines, root, steps=2, *more) -> list:
    """The command of E9 on both machines: one process each."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2, "--num_processes", 2, "--main_process_ip",
              ADDRESSES[0], "--main_process_port", 29500, "--mixed_precision", "no", "--dynamo_backend", "no", "--machine_rank"]
    return [machines(k, [*launch, k, *options(root, steps, *more)], GLOO_SOCKET_IFNAME=CABLE) for k in (0, 1)]


def assert_same_run(ours: Path, theirs: Path) -> None:
    ours, theirs = (read_metrics(root / "grpo_micro" / "v_seed0") for root in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        same = {k: v for k, v in a.items() if k.split("/")[-1] in ("reward_mean", "mean_tokens", "loss", "grad_norm", "updates", "answer_accuracy")}
        assert same and {k: b[k] for k in same} == pytest.approx(same, rel=1e-3, abs=5e-6)
    assert ours[1]["train/updates"] > 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process on this machine."""
    root = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, *map(str, options(root))], check=True, capture_output=True, env=QUIET)
    return root


def test_nothing_passes_but_over_the_cable(machines):
    """What the tests below rest on."""
    look = "import socket; s = socket.create_server(('', 5001)); print(s.accept()[1][0])"
    go = "import socket, sys, time; time.sleep(1); socket.create_connection((sys.argv[1], 5001), 3)"
    server = machines(1, ["-c", look])
    lost = machines(0, ["-c", go, "127.0.0.1"])
    assert "refused" in lost.communicate(timeout=30)[1]
    finished(machines(0, ["-c", go, ADDRESSES[1]]))
    assert finished(server) == [ADDRESSES[0] + "\n"]


def test_two_machines_make_the_run_of_one(machines, alone, tmp_path):
    first, second = finished(*launched(machines, tmp_path))
    assert_same_run(tmp_path, alone)
    assert "right answers to 16 problems" in first and "right answers" not in second  # process 0 speaks for all


def test_a_machine_that_is_lost_stops_the_run_which_goes_on(machines, tmp_path):
    jobs, folder = launched(machines, tmp_path, steps=8), tmp_path / "grpo_micro" / "v_seed0"
    until = time.monotonic() + 120
    while len(read_metrics(folder)) < 4 and jobs[0].poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    for process in [*psutil.Process(jobs[1].pid).children(recursive=True), jobs[1]]:
        process.kill()
    error = jobs[0].communicate(timeout=120)[1]
    assert jobs[0].returncode not in (0, None), error
    safe = int(runs.find_checkpoint(folder).name[5:])
    assert 2 <= safe < 8 and not (folder / "summary.json").exists()
    assert f"step {safe}" in finished(machines(0, options(tmp_path, steps=8)))[0].splitlines()[0]  # alone
    assert [line["step"] for line in read_metrics(folder)] == list(range(9))


@pytest.mark.parametrize("trainers", [1, 2])
def test_trainers_and_a_server_on_another_machine(machines, alone, tmp_path, trainers):
    """HTTP to the server and weights over gloo, both over the cable. Of two trainers each asks for its share."""
    server = machines(1, [repo_root() / "tests" / "stand_in_server.py", "micro", ADDRESSES[1]], GLOO_SOCKET_IFNAME=CABLE)
    more = "--server", server.stdout.readline().split()[-1]
    finished(*([machines(0, options(tmp_path, 2, *more), GLOO_SOCKET_IFNAME=CABLE)] if trainers == 1 else launched(machines, tmp_path, 2, *more)))
    assert_same_run(tmp_path, alone)
    assert json.loads((tmp_path / "grpo_micro" / "v_seed0" / "summary.json").read_text())["servers"] == [more[1]]
