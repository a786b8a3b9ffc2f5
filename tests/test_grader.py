"""What a notebook cannot show of the grader: hostile answers, kills, orphans, threads, forks, scripts."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hostile_answers import CANARY, FAMILIES, RESPONSES
from hypothesis import given, settings, strategies as st

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
    code = "import sys, cs336_alignment.drgrpo_grader; print([m for m in ('torch', 'sympy', 'math_verify', 'transformers', 'pint', 'num2words') if m in sys.modules])"
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


SAME = {  # answers and golds that are one answer, by what is written differently
    "tiny numbers": [("10^{-20}", r"\frac{1}{10^{20}}"), (r"6\times10^{-24}", r"6 \cdot 10^{-24}"),
        (r"\frac{1}{2^{99}}", "2^{-99}"), (r"\frac{3}{4^{50}}", r"\frac{3}{2^{100}}"),
        ("(10^{-20}, 1)", r"(\frac{1}{10^{20}}, 1)"), (r"\{x, 10^{-20}\}", r"\{\frac{1}{10^{20}}, x\}"),
        (r"\frac{\pi}{999999}", r"\frac{2\pi}{1999998}"), ("10^{20}", "100^{10}"), ("e^{-50}", r"\frac{1}{e^{50}}"),
        ("[0,10^{-20}]", r"[0,\frac{1}{10^{20}}]"), ("0.1x+0.2x", "0.3x"),
        (r"\{10^{-20},10^{-30}\}", r"\{10^{-30},10^{-20}\}")],
    "words": [("18 eggs", "18"), ("$1,080", "1080"), ("540 meters a week", "540"), ("9 seconds", "9"),
        ("12 couches", "12"), ("5 apples", "5"), ("7 people", "7"), ("3 shirts sold", "3"), ("18 red balloons", "18"),
        ("40 teeth", "40"), ("2 tons", "2"), ("8 weeks", "8")],
    "units": [("5 s", "5 seconds"), ("5 mph", "5 miles per hour"), ("5 gal", "5 gallons"), ("5 L", "5 liters"),
        ("5 mm", "5 millimeters"), ("5 USD", "5 dollars"), ("$5", "5 dollars"), ("5 yd", "5 yards"),
        ("5 oz", "5 ounces"), (r"5\text{ m/s}", "5 meters per second"), ("5 sq ft", r"5\text{ ft}^2"),
        ("5 square inches", r"5\text{ in}^2"), ("5 cubic meters", "5 m^3"),
        (r"45^\circ\text{F}", "45 degrees Fahrenheit"), (r"45^\circ", "45 degrees"), ("5 kg", "5 kilograms"),
        ("5 mL", "5 milliliters"), ("18 feet in total", "18 ft"), ("7 p.m.", "7 PM"),
        ("5 kph", "5 kilometers per hour"), ("5 km/h", "5 kilometers per hour"), ("5 lbs", "5 pounds"),
        (r"45^\circ", r"45^\circ\text{F}"), ("£5", "5 pounds")],
    "spellings": [("no", "No"), ("NO", "no"), ("4:30 p.m.", r"4:30 \text{ p.m.}"), ("4:30 PM", "4:30 p.m."),
        ("10 by 6", r"10 \text{ by } 6"), ("1 hour 15 minutes", r"1 \text{ hour } 15 \text{ minutes}"),
        (r"(\text{A}, \text{B})", "(A,B)"), (r"\{\text{A},\text{C}\}", "{A, C}"),
        (r"1-\frac{1}{e}", r"1-\frac{1}{\mathrm{e}}"), (r"e^{\mathrm{i}x}", "e^{ix}"), ("{5}", "5"),
        (r"{\frac12}", r"\frac12"), ("{{7}}", "7"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\dbinom{n}{3}", r"\frac{n(n-1)(n-2)}{6}"), (r"\frac{m(m+1)}{2}", r"\binom{m+1}{2}"),
        (r"{n \choose 2}", r"\frac{n(n-1)}{2}"), ("½", 0.5), ("⅓", r"\frac13"), ("2¾", "2.75"), ("–5", -5),
        ("—5", "-5"), ("‑5", "-5"), ("－5", "-5"), ("x–1", "x-1"), ("0.3", 0.1 + 0.2), ("1/3", 1 / 3),
        ("4.35", 435 * 0.01), ("1.1", 1.1), ("3", 3.0), ("0.7", 0.1 * 7), ("xy", "yx"), ("AB", "BA")],
}
DIFFERENT = {  # and that are two
    "tiny numbers": [("10^{-20}", "10^{-30}"), (r"6\times10^{-24}", "10^{-25}"),
        (r"\frac{3}{4^{50}}", r"\frac{5}{4^{50}}"), ("0.0000001", r"\frac{1}{2^{99}}"),
        ("(1, 10^{-20})", "(1, 10^{-30})"), (r"\{1, 2^{-90}\}", r"\{1, 3^{-90}\}"), ("[0, 10^{-20}]", "[0, 10^{-21}]"),
        (r"\frac{\pi}{10^{20}}", r"\frac{e}{10^{20}}"), (r"\frac{\pi}{999999}", r"\frac{\pi}{999998}"),
        ("0.00000000001", "1e-12"), ("2^{-100}", "2^{-101}"), (r"\sqrt{10^{-40}}", "10^{-21}"), ("0", "10^{-30}"),
        ("10^{-15}", "0.0000001"),
        (r"\begin{pmatrix} 10^{-20} \\ 1 \end{pmatrix}", r"\begin{pmatrix} 10^{-30} \\ 1 \end{pmatrix}"),
        ("1", "1+10^{-20}"), ("x=10^{-20}", "x=10^{-30}"), (r"\frac{1}{50!}", r"\frac{1}{51!}"),
        ("10^{-20}, 10^{-30}", "10^{-20}, 10^{-40}"), ("0.00000012", r"\frac{1}{2^{23}}"),
        ("x+10^{-20}", "x+10^{-30}"), ("10^{-20}x", "10^{-30}x"), (r"\sqrt{2}+10^{-20}", r"\sqrt{2}"),
        ("10^{-400}", "10^{-500}"), ("1+10^{-20}i", "1+10^{-30}i"), ("x > 10^{-20}", "x > 10^{-30}"),
        ("(0,0.0000001]", r"(0,\frac{1}{2^{99}}]")],
    "words": [("9 dozens", "9"), ("9 thousands", "9"), ("9 tenths", "9"), ("1 fifth", "1"), ("9 lakh", "9"),
        ("5 bn", "5"), ("5 doubled", "5"), ("18 thirteen", "18"), ("18 actually nineteen", "18"), ("9 crores", "9"),
        ("3 halves", "3"), ("5 tripled", "5"), ("5 halved", "5"), ("7 hundredths", "7"), ("18 twenty-one", "18"),
        ("4 fold", "4"), ("6 quintillion", "6"), ("2 twentieths", "2"), ("5 mln", "5"), ("18 zero", "18"),
        ("9 grand", "9"), (r"5\text{ bn}", "5"), ("$5 bn", "5"), ("5bn", "5"), ("3 squared", "3"), ("5 k", "5"),
        ("2 score", "2"), ("5 cr", "5"), ("5 quadruple", "5"), ("(9 dozens, 1)", "(9, 1)"), ("5 twenties", "5"),
        ("3 gazillion", "3"), ("2 dozen eggs", "2"), (r"5\text{ M}", "5")],
    "units": [("50 cents", "$50"), ("$5", "5 cents"), (r"45^\circ\text{F}", r"45^\circ\text{C}"), ("5 cm^3", "5 cm^2"),
        (r"7\text{ p.m.}", r"7\text{ a.m.}"), ("5 m/s", "5 m"), ("60 miles", "60 mph"), ("5 kg", "5 g"),
        (r"5\text{ m/s}", r"5\text{ m/s}^2"), ("5 square feet", "5 feet"), ("$5", "€5"),
        ("5 eggs a day", "5 eggs a week"), ("5 inches", "5 cm"), ("20°C", "20°F"), ("(5 cm, 1)", "(5 m, 1)"),
        ("3 mg", "3 Mg"), ("5 ml", "5 l"), ("5 gallons", "5 quarts"), ("90 degrees", "90 radians")],
    "spellings": [("on", "no"), ("yes", "No"), ("4:30 p.m.", "4:30 a.m."), ("10 by 6", "6 by 10"),
        ("1 hour 15 minutes", "1 hour 51 minutes"), (r"(\text{B}, \text{A})", "(A,B)"), ("½", "2"), ("18½", "18"),
        ("½18", "18"), ("⅓", "0.3"), ("5–6", "5"), ("–5", "5"), ("–5", 5), (r"\binom{5}{2}", "10"),
        (r"\binom{n}{2}", r"\frac{n(n+1)}{2}"), (r"\binom{4}{2}\pi", r"6\pi"), ("0.30001", 0.1 + 0.2), ("{5}", "6"),
        ("36/2", "18"), ("0.3", 0.3001)],
}


def each(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("answer, gold", [pair for pairs in table.values() for pair in pairs])


@each(SAME)
def test_same(answer, gold):
    assert same_answer(answer, gold)


@each(DIFFERENT)
def test_different(answer, gold):
    assert not same_answer(answer, gold)


def test_a_frame_is_no_box():
    assert question_only_reward_fn(r"\boxed{5}, see \fbox{6}", "5")["reward"] == 1.0
    assert question_only_reward_fn(r"\fbox{5}", "5") == {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}
    assert question_only_reward_fn(r"\fbox{6}, so \boxed{5}.", "6")["reward"] == 0.0
    assert question_only_reward_fn(r"\boxed{\fbox{6}}", "5")["reward"] == 0.0
    assert question_only_reward_fn(r"\framebox{5}", "5")["format_reward"] == 0.0


def within_a_second(answer: str, gold, limit: float = 1.0) -> bool:
    start = time.perf_counter()
    verdict = same_answer(answer, gold)
    assert time.perf_counter() - start < limit, (answer[:80], str(gold)[:80])
    return verdict


SHELLS = ["()", "[]", "{}", (r"\{", r"\}"), (r"\left(", r"\right)"), (r"\langle", r"\rangle"), (r"\frac{", "}{2}"), (r"\sqrt{", "}"), ("{(", ")}"),
          ("(1,", ")"), ("(", ",1)"), ("x^{", "}"), (r"\begin{pmatrix}", r"\end{pmatrix}"), ("-(", ")"), (r"\binom{", "}{2}"), (r"\text{", "}")]


@pytest.mark.parametrize("left, right", SHELLS)
@pytest.mark.parametrize("depth", [41, 400, 20_000])
def test_nesting_never_raises(left, right, depth):
    deep = left * depth + "1" + right * depth
    for answer, gold in ((deep, "1"), ("1", deep), (f"({deep}, 2)", "(1, 2)"), (f"({deep}, 2)", f"(2, {deep})"), (left * depth, "1")):
        assert not within_a_second(answer, gold)
    assert within_a_second(deep, f" {deep}")  # the same text


@pytest.mark.parametrize("gold", ["7" * 5_000, 10**5_000, -(10**5_000), Fraction(10**5_000, 3), "x" * 5_000, 1e308, math.inf, math.nan], ids=range(8))
def test_golds_of_any_length(gold):
    assert not within_a_second("1", gold) and not within_a_second(f"({'7' * 5_000}, 1)", gold)
    assert within_a_second(grader.read_golds(gold)[0], gold)


PIECES = [" ", "\n", "\x00", "\ud800", "٣", "9" * 50, "1" * 1_500, *r"""( ) [ ] { } \{ \} \left( \right) \langle \rangle | , ; & \\ \frac
    \frac{ }{ \sqrt \sqrt[ \binom{ \begin{pmatrix} \end{pmatrix} ^ _ ^{ _{ + - * / = < \in \cup \infty \pi \text{ \mathrm{ \circ \overline{ \pm ! %
    $ € . : ' 0 1 7 10 99999 1e9 0.5 ½ – ² √ é x y i e o AB cm ft mdB yottacelsius per square degrees F p.m. dollars tenths dozen and or by \sin \ln
    \boxed{ </answer> <answer>""".split()]
PIECE = st.sampled_from(PIECES)
TEXT = st.one_of(st.text(max_size=300), st.lists(PIECE, max_size=50).map("".join), st.builds(str.__mul__, PIECE, st.integers(1, 5_000)),
                 st.builds(lambda a, b, c, n: a * n + b + c * n, PIECE, PIECE, PIECE, st.integers(1, 2_000)))


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(TEXT, TEXT)
def test_no_text_raises_or_takes_long(answer, gold):
    for pair in ((answer, gold), (answer, "1"), ("1", gold), (f"5 {answer}", f"5 {gold}")):
        start = time.perf_counter()
        verdict, _ = grader.decide(*pair)
        assert verdict in (True, False, None) and time.perf_counter() - start < 1.0
    assert grader.decide(answer, answer)[0] is not False or not grader.normalise(answer)
    for reward_fn in (r1_zero_reward_fn, question_only_reward_fn):
        reward_fn(answer, "no such answer")


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(PIECE, max_size=20).map("".join), st.sampled_from(["1", "x+1", r"\sin x", "(1, x)", r"\{x, 2\}", "5 cm"]))
def test_no_text_raises_in_algebra(answer, gold):
    within_a_second(answer, gold, 1.2)
