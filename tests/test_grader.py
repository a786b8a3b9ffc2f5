"""What a notebook cannot show of the grader: hostile answers, kills, orphans, threads, forks, scripts."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hostile_answers import CANARY, FAMILIES, RESPONSES

from cs336_alignment import drgrpo_grader as grader, grader_pool
from cs336_alignment.data import DataMissing, load_problems, read_jsonl
from cs336_alignment.drgrpo_grader import (grade_batch, question_only_reward_fn, r1_zero_reward_fn, same_answer,
                                           start_workers)

HARD = (r"\sin 2x", r"2 \sin x \cos x")  # a pair that only algebra can decide
ENDLESS = (r"[1,\infty)", r"[2^{\frac{1}{2^{1000}}},\infty)")  # a pair that algebra does not decide in a second
PAIRS = [pair for pairs in FAMILIES.values() for pair in pairs]


def wrap(answer: str) -> str:
    return f"reasoning </think> <answer>{answer}</answer>"


def hard_pairs(n: int) -> list[tuple[str, str]]:
    return [(rf"\sin {k}x + \ln y", rf"\ln y + \sin({k}x)") for k in range(2, n + 2)]


@pytest.fixture(scope="module", autouse=True)
def workers():
    start_workers(2)
    yield
    grader.close_workers()


def test_hostile_answers_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(PAIRS) >= 300
    accepted, slow = [], []
    for answer, gold in PAIRS:
        start = time.perf_counter()
        if r1_zero_reward_fn(wrap(answer), gold)["reward"]:
            accepted.append((answer[:80], gold))
        if (elapsed := time.perf_counter() - start) > 1.0:
            slow.append((elapsed, answer[:80], gold))
    assert (accepted, slow) == ([], [])
    assert not (tmp_path / CANARY).exists() and not Path("/tmp", CANARY).exists()


def test_hostile_answers_in_a_batch():
    easy = [("18", "18"), HARD] * 20
    answers, golds = zip(*PAIRS, *easy)
    rewards = grade_batch(r1_zero_reward_fn, [wrap(answer) for answer in answers], golds)
    assert not any(r["reward"] for r in rewards[: len(PAIRS)])
    assert all(r["reward"] == 1.0 for r in rewards[len(PAIRS) :])  # the hostile ones do no harm to the others


def test_hostile_boxes_and_tags():
    assert not any(r1_zero_reward_fn(response, gold)["reward"] for response, gold in RESPONSES)
    pairs = [(a, g) for a, g in PAIRS if len(a) < 2_000 and grader.decide(a, g)[0] is not None]
    rewards = grade_batch(question_only_reward_fn, [f"\\boxed{{{a}}}" for a, _ in pairs], [g for _, g in pairs])
    assert not any(r["reward"] for r in rewards)


def test_an_endless_answer_is_bounded_and_harmless():
    start = time.perf_counter()
    assert r1_zero_reward_fn(wrap(ENDLESS[0]), ENDLESS[1]) == {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0.0}
    assert r1_zero_reward_fn(wrap(ENDLESS[0]), [ENDLESS[1]] * 5)["reward"] == 0.0  # five golds share the second
    assert time.perf_counter() - start < 2.2
    assert same_answer(*HARD)


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="RLIMIT_AS is Linux only")
def test_memory_limit():
    assert same_answer(*HARD, memory_mb=768)
    graders = [child for worker in grader_pool._POOL.workers for child in psutil.Process(worker.pid).children()]
    assert 768 * 2**20 in [process.rlimit(psutil.RLIMIT_AS)[0] for process in graders]


def test_killed_workers_are_replaced():
    for victim in ("keeper", "grader"):
        for worker in list(grader_pool._POOL.workers):
            process = psutil.Process(worker.pid)
            for each in [process] if victim == "keeper" else process.children():
                each.send_signal(signal.SIGKILL)
        time.sleep(0.2)
        assert same_answer(*HARD), victim


def test_killed_in_the_middle_of_a_batch():
    pairs = hard_pairs(30)
    stop = threading.Event()

    def assassin():
        while not stop.wait(1.0):
            for worker in list(grader_pool._POOL.workers):
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    psutil.Process(worker.pid).children()[0].kill()

    thread = threading.Thread(target=assassin)
    thread.start()
    rewards = grade_batch(r1_zero_reward_fn, [wrap(a) for a, _ in pairs], [g for _, g in pairs])
    stop.set(), thread.join()
    assert sum(r["reward"] for r in rewards) >= 0.8 * len(pairs)  # an answer killed twice is wrong; nothing hangs
    time.sleep(2.0)  # let the spares warm up for the next test


def test_threads():
    results = []
    pairs = hard_pairs(6) + [("1", "2")]

    def work():
        results.append([same_answer(a, g) for a, g in pairs])

    threads = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in threads], [t.join(60) for t in threads]
    assert results == [[True] * 6 + [False]] * 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_fork():
    assert same_answer(*HARD)
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = 0 if same_answer(*HARD) and not same_answer(r"\sin 2x", r"\sin x + \ln x") else 1
            grader.close_workers()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_answer(*HARD)  # the parent's workers are untouched


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_no_orphans(tmp_path, ending):
    script = tmp_path / "train.py"  # no main guard on purpose
    script.write_text(
        "import os, psutil, sys, threading, time\nfrom cs336_alignment import drgrpo_grader as g\n"
        f"assert g.same_answer({HARD[0]!r}, {HARD[1]!r})\n"
        "print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n"
        f"threading.Thread(target=g.same_answer, args=({ENDLESS[0]!r}, {ENDLESS[1]!r}), daemon=True).start(); time.sleep(0.3)\n"
        + ("" if ending == "exit" else "time.sleep(60)\n"))
    program = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    pids = list(map(int, program.stdout.readline().split()))
    assert len(pids) >= 2
    if ending == "kill":
        time.sleep(0.4), program.kill()
    assert program.wait(30) == (0 if ending == "exit" else -signal.SIGKILL)
    assert gone(pids, 5.0)


def test_importing_is_light():
    code = "import sys, cs336_alignment.drgrpo_grader; print([m for m in ('torch', 'sympy', 'math_verify', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_gsm8k_gold_equals_itself_in_every_form_and_no_other_gold():
    try:
        golds = list({p.ground_truth for split in ("train", "test") for p in load_problems("gsm8k", split)})
    except DataMissing:
        pytest.skip("GSM8K is not here: python -m cs336_alignment.data get gsm8k")
    forms = ["{}", "${}", "{}.00", "{:,}", "{} dollars", "\\boxed{{{} eggs}}"]
    view = lambda text: grader.view(grader.normalise(grader.read_r1_zero(wrap(text))[1]))
    known = {gold: grader.view(grader.normalise(gold)) for gold in golds}
    assert len(golds) > 900
    for gold in golds:
        written = [form.format(int(gold)) for form in forms]
        assert all(r1_zero_reward_fn(wrap(answer), gold)["reward"] == 1.0 for answer in written), written
        others = [other for other in golds if other != gold]
        for answer in map(view, written):
            assert not [other for other in others if grader.compare(answer, known[other]) is not False], (answer, gold)


def test_labelled_pairs_of_public_graders():
    path = Path(os.environ.get("CS336_GRADER_CASES") or Path(__file__).parents[2] / "shared/data/grader/equiv_cases.jsonl")
    if not path.is_file():
        pytest.skip("these pairs are not ours to ship: name the file in CS336_GRADER_CASES")
    result = grader.measure([case for case in read_jsonl(path) if not case["policy"]])
    assert result["wrong_accepts"] <= 8 and result["wrong_refusals"] <= 10, result["errors"]
