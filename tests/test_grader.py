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
    code = "import sys, cs336_alignment.drgrpo_grader; print([m for m in ('torch', 'sympy', 'math_verify', 'transformers', 'pint', 'num2words', 'mpmath') if m in sys.modules])"
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
    assert result["wrong_accepts"] == 0 and result["wrong_refusals"] <= 6, result["errors"]


SAME = {  # answers and golds that are one answer, by what is written differently
    "tiny numbers": [("10^{-20}", r"\frac{1}{10^{20}}"), (r"6\times10^{-24}", r"6 \cdot 10^{-24}"),
        (r"\frac{1}{2^{99}}", "2^{-99}"), (r"\frac{3}{4^{50}}", r"\frac{3}{2^{100}}"),
        ("(10^{-20}, 1)", r"(\frac{1}{10^{20}}, 1)"), (r"\{x, 10^{-20}\}", r"\{\frac{1}{10^{20}}, x\}"),
        (r"\frac{\pi}{999999}", r"\frac{2\pi}{1999998}"), ("10^{20}", "100^{10}"), ("e^{-50}", r"\frac{1}{e^{50}}"),
        ("[0,10^{-20}]", r"[0,\frac{1}{10^{20}}]"), ("0.1x+0.2x", "0.3x"),
        (r"\{10^{-20},10^{-30}\}", r"\{10^{-30},10^{-20}\}"),
        ("10^{-6}", "0.000001"), ("2^{-10}", r"\frac{1}{1024}"),
        ("(10^{-20}, 10^{-30})", r"(\frac{1}{10^{20}}, \frac{1}{10^{30}})"), (r"\{10^{-20}, 2\}", r"\{2, 10^{-20}\}"),
        ("[10^{-20}, 1)", r"[\frac{1}{10^{20}}, 1)"), ("1e-20", "10^{-20}"), (r"1 \times 10^{-20}", "10^{-20}"),
        ("0.00001", "10^{-5}"), ("10^{6}", "1000000"), ("10^6", "1,000,000"), ("-10^{-3}", "-0.001"),
        ("x+10^{-20}", "10^{-20}+x"), (r"\frac{1}{3^{4}}", "3^{-4}"), ("2^{-3}", "0.125"), ("2^{-3}", r"\frac18"),
        (r"\sqrt{10^{-40}}", "10^{-20}"), (r"\ln(1+10^{-15})", r"\ln(10^{-15}+1)"), ("3.1415926536", r"\pi"),
        ("0.8660254038", r"\frac{\sqrt3}{2}"), (r"\{10^{-6}, 1\}", r"\{1, 0.000001\}"),
        ("(2^{-10}, 0)", r"(\frac{1}{1024}, 0)"), ("x = 10^{-6}", "x = 0.000001"), ("10^{3}", "1000"),
        ("(-2)^{-1}x", r"-\frac{x}{2}"), ("2^x2^y", "2^{x+y}"),
        (r"\frac1{10^{20}}", "10^{-20}"), (r"10^{-20}\pi", r"\frac{\pi}{10^{20}}"), ("1+10^{-20}", "10^{-20}+1"),
        (r"\sqrt{2}+10^{-25}", r"10^{-25}+\sqrt2"), ("x^{100}", "(x^{50})^2"), ("2^{100}x", "4^{50}x"),
        (r"\frac{x}{10^{9}}", "10^{-9}x"), (r"\ln 10^{-20}", r"-20\ln 10"),
        (r"\sin(10^{-20})", r"\sin(\frac{1}{10^{20}})"), (r"\{10^{-20}, \sqrt2\}", r"\{\sqrt2, 10^{-20}\}"),
        (r"(0, 10^{-20}) \cup (1,2)", r"(1,2)\cup(0,10^{-20})"), ("2^(n+1)", "2^{n+1}")],
    "words": [("18 eggs", "18"), ("$1,080", "1080"), ("540 meters a week", "540"), ("9 seconds", "9"),
        ("12 couches", "12"), ("5 apples", "5"), ("7 people", "7"), ("3 shirts sold", "3"), ("18 red balloons", "18"),
        ("40 teeth", "40"), ("2 tons", "2"), ("8 weeks", "8"),
        ("4 pairs of shoes", "4"), ("11 sets of cards", "11"), ("20 third graders", "20"), ("4 fifth graders", "4"),
        ("14 fourth-grade students", "14"), ("10 first-class tickets", "10"), ("3 one-dollar bills", "3"),
        ("12 hundred-dollar bills", "12"), ("6 two-liter bottles", "6"), ("16 half-dollar coins", "16"),
        ("4 triple-scoop cones", "4"), ("20 double rooms", "20"), ("4 score sheets", "4"), ("7 doubles matches", "7"),
        ("5 thousand", "5000"), ("2.5 million", "2500000"), ("$3 million", "3000000"), ("3 dozen", "36"),
        ("1 lakh", "100000"), ("2 crore", "20000000"), ("2 hundred", "200"), ("5 hundred thousand", "500000"),
        ("3 dozens of eggs", "36"), ("20 first graders", "20"), ("5 second graders", "5"),
        ("12 third-grade boys", "12"), ("7 tenth graders", "7"), ("3 fifth-grade classes", "3"),
        ("6 three-pointers", "6"), ("8 six-packs", "8"), ("4 two-story houses", "4"), ("5 ten-year-olds", "5"),
        ("9 double-sided pages", "9"), ("2 triple beds", "2"), ("3 quadruple bypasses", "3"), ("15 t-shirts", "15"),
        ("10 x-rays", "10"), ("4 half-hour sessions", "4"), ("2 half-gallon jugs", "2"), ("5 cups of flour", "5"),
        ("12 bags of rice", "12"), ("3 boxes of chocolates", "3"), ("1 pair of socks", "1"),
        ("10 bottles of water each day", "10"), ("3 groups of friends", "3"), ("12 third grade children", "12"),
        ("7 women", "7"), ("7 grand prizes", "7"), ("9 score cards", "9"), ("2 couples", "2"), ("14 scaffolds", "14"),
        ("1 one-way ticket", "1"), ("5 couple of days", "5"), ("18 DVDs", "18"), ("3 TVs", "3"),
        ("5 kg of flour", "5"), ("20 years old", "20"), ("$12 each", "12"), ("8 nickels", "8"), ("7 pennies", "7"),
        ("5 people per table", "5"), ("5 students", "5"), ("5 eleventh graders", "5"), ("3 first cousins", "3"),
        ("8 one-way flights", "8"), ("5 four-leaf clovers", "5"), ("6 half-full glasses", "6"),
        ("2 one-pound bags", "2"), ("4 five-dollar bills", "4"), ("2 five-pound bags of sugar", "2"),
        ("10 first-place ribbons", "10"), ("3 second-hand books", "3"), ("5 double espressos", "5"),
        ("7 triple jumps", "7"), ("12 single rooms", "12"), ("4 twin beds", "4"), ("0.5 million", "500000"),
        ("6 score sheets", "6"),
        ("1.5 dozen", "18"), ("3 hundred students", "300"), ("30 fifth-graders", "30"),
        ("8 seventh graders in total", "8"), ("6 two-person tents", "6"), ("10 twenty-dollar bills", "10"),
        ("7 three-digit numbers", "7"), ("5 zero-waste bags", "5"), ("3 halfbacks", "3"), ("4 quarterbacks", "4"),
        ("9 quarterly reports", "9"), ("2 twin sisters", "2"), ("6 triplets", "6"), ("8 doublets", "8"),
        ("12 thousandaires", "12"), ("5 pounds of apples", "5"), ("11 sets", "11"), ("4 pairs", "4"),
        ("3 trios", "3"), ("5 square units", "5"), ("5 units", "5"), ("$5 bills", "5"),
        ("7 points", "7"), ("7 logs", "7"), ("7 notes", "7"), ("7 toes", "7"), ("7 red roses", "7"),
        ("7 small ones", "7"), ("7 red", "7"), ("7 shared", "7"), ("7 points scored", "7"), ("7 bonus points", "7"),
        ("7 two-point baskets", "7"), ("7 t-shirts and hats", "7"), ("7 mild curries", "7"), ("7 on Tuesday", "7"),
        ("7 he sold", "7"), ("7 so far", "7"), ("7 so that", "7"), ("7 PE classes", "7"), ("7 data points", "7"),
        ("7 five-dollar bills", "7"), ("7 third-graders", "7"), ("7 three-hour classes", "7"),
        ("7 four-legged pets", "7"), ("7 ad breaks", "7"), ("7 pairs of pants", "7"), ("7 percent of them", "7"),
        ("7 members of the team", "7"),
        ("$20 bills", "20"), ("5 more apples", "5")],
    "units": [("5 s", "5 seconds"), ("5 mph", "5 miles per hour"), ("5 gal", "5 gallons"), ("5 L", "5 liters"),
        ("5 mm", "5 millimeters"), ("5 USD", "5 dollars"), ("$5", "5 dollars"), ("5 yd", "5 yards"),
        ("5 oz", "5 ounces"), (r"5\text{ m/s}", "5 meters per second"), ("5 sq ft", r"5\text{ ft}^2"),
        ("5 square inches", r"5\text{ in}^2"), ("5 cubic meters", "5 m^3"),
        (r"45^\circ\text{F}", "45 degrees Fahrenheit"), (r"45^\circ", "45 degrees"), ("5 kg", "5 kilograms"),
        ("5 mL", "5 milliliters"), ("18 feet in total", "18 ft"), ("7 p.m.", "7 PM"),
        ("5 kph", "5 kilometers per hour"), ("5 km/h", "5 kilometers per hour"), ("5 lbs", "5 pounds"),
        (r"45^\circ", r"45^\circ\text{F}"), ("£5", "5 pounds"),
        ("2 grand pianos", "2"), ("6 dozens", "6 dozen"), ("5 N", "5 newtons"), ("5 J", "5 joules"),
        ("5 W", "5 watts"), ("25 mpg", "25 miles per gallon"), ("USD 5", "$5"), ("5 bucks", "$5"), ("3 d", "3 days"),
        ("5 kilos", "5 kg"), ("8 fl oz", "8 fluid ounces"), ("50 cents", "$0.50"),
        ("$3 million", "3 million dollars"), ("6 pieces of cake", "6"), ("5 kilograms", "5 kg"), ("5 kgs", "5 kg"),
        ("60 minutes", "1 hour"), ("1 km", "1000 m"), ("12 inches", "1 foot"), ("1 ft", "12 in"),
        ("2 weeks", "14 days"), ("1000 mL", "1 L"), ("3 yards", "9 feet"), ("90 km/h", "25 m/s"),
        ("$1.50", "150 cents"), ("150¢", "$1.50"), ("25 cents", "25¢"), ("€5", "5 euros"), ("5 EUR", "€5"),
        ("EUR 5", "€5"), ("¥500", "500 yen"), ("₹500", "500 rupees"), ("GBP 5", "£5"), ("$5 USD", "$5"),
        ("US$ 5", "$5"), ("$5 per hour", "5 dollars an hour"), ("$5/hour", "5 dollars per hour"),
        ("30 mi/gal", "30 mpg"), ("5 sq. ft.", "5 square feet"), ("5 sq cm", "5 cm^2"), ("5 cc", "5 mL"),
        ("5 fl. oz.", "5 fluid ounces"), ("2 light years", "2 light-years"), ("3 hrs", "3 hours"), ("3 h", "3 hours"),
        ("45 mins", "45 minutes"), ("10 secs", "10 s"), ("5 kWh", "5 kilowatt hours"),
        ("100 kcal", "100 kilocalories"), ("5 A", "5 amperes"), ("5 V", "5 volts"), ("5 Hz", "5 hertz"),
        ("5 Pa", "5 pascals"), ("5 kN", "5 kilonewtons"), (r"5\ \mu\text{m}", "5 micrometers"),
        (r"5\text{ }\mu m", "5 micrometers"), ("5 tbsp", "5 tablespoons"), ("5 tsp", "5 teaspoons"),
        ("5 pt", "5 pints"), ("5 qt", "5 quarts"), ("5 lb", "5 pounds"), ("5 mi", "5 miles"), ("5 acres", "5 acre"),
        ("5 yrs", "5 years"), ("5 a.m.", "5 AM"), ("12:30 PM", "12:30 pm"), ("12:30 pm", r"12:30 \text{ P.M.}"),
        ("1 hr 30 min", "1 hour 30 minutes"), ("2 ft 3 in", "2 feet 3 inches"), ("x^1", "x"),
        ("No solution", "no solution"), ("YES", "yes"), ("(5 km, 3 h)", "(5 kilometers, 3 hours)"),
        ("(1 km, 2)", "(1000 m, 2)"), ("5 km and 3 km", "5 kilometers and 3 kilometers"),
        ("1 hour 30 min", "1 hour, 30 minutes"), ("5 thousand dollars", "$5000"), ("$5 thousand", "$5,000"),
        ("5%", "5 percent"), ("5 pct", "5%"), ("50%", "0.5"),
        ("12 third graders and 5 fourth graders", "12 third graders and 5 fourth graders"),
        ("The answer is 5 kg", "5 kilograms"), ("5 kilograms of flour", "5 kg"), ("3 cups of sugar", "3 cups"),
        ("15 feet long", "15 feet"), ("15 ft", "15 feet long"), ("20 years old", "20 years"),
        ("3 hours and 20 minutes", "3 hours 20 minutes"), ("2.5 hours", "2.5 hrs"), ("9:05 a.m.", "9:05 AM"),
        ("$12 per ticket", "$12"), ("12 dollars per ticket", "$12 per ticket"), ("30 miles/hour", "30 mph"),
        ("30 mi/h", "30 mph"), ("30 miles an hour", "30 mph"), ("9.8 m/s^2", "9.8 meters per second squared"),
        (r"9.8\ \text{m/s}^2", "9.8 m/s^2"), ("3 in.", "3 inches"), ("5 ft.", "5 feet"), ("12 sq in", "12 in^2"),
        ("12 cubic ft", "12 ft^3"), ("144 sq in", "1 sq ft"), ("8 quarts", "2 gallons"), ("16 oz", "1 lb"),
        ("1 kWh", "3600000 J"), ("100 cm", "1 m"), ("5 nm", "5 nanometers"), ("5 MHz", "5 megahertz"),
        ("2 GB", "2 gigabytes"), ("3 mL", "3 milliliters"), ("5 rad", "5 radians"), ("5 cents", "5¢"),
        ("$0.05", "5 cents"), ("4 Euros", "€4"), ("₹100", "100 Rupees"), ("5 US dollars", "$5"), ("$ 5", "$5"),
        ("-$5", "-5"), ("a third grader", "a third grader"), ("3 dozen", "3 dozens"), ("6 hundreds", "6 hundred"),
        ("6 millions", "6 million"), ("1/2 dozen", "6"),
        ("4 dozen cookies", "48 cookies"), ("12 thousand people", "12,000 people"),
        ("2 million dollars", "$2,000,000"), ("5 thirds graders", "5 thirds graders"),
        ("3 slices of pizza left", "3"), ("10 gallons of milk", "10 gallons"), ("2 feet of snow", "2 ft"),
        ("100 square feet of tile", "100 ft^2"), ("$5.00", "5 dollars"), ("USD 1,000", "$1000"),
        ("1000 USD", "$1,000"), ("5 GBP", "£5"), ("75¢", "$0.75"), ("$0.75", "75 cents"), ("100 cents", "$1"),
        ("0.5 km", "500 m"), ("30 seconds", "0.5 minutes"), ("1.5 hours", "90 minutes"), ("36 inches", "1 yard"),
        ("2000 lb", "1 ton"), ("1 m^2", "10000 cm^2"), ("1 L", "1000 cm^3"), ("1 mL", "1 cm^3"),
        ("4 cups", "1 quart"), ("60 mph", "88 ft/s"), ("5 m/s", "5 m s^{-1}"), ("5 m^{-1}", "5 per meter"),
        ("sqrt2", r"\sqrt2"),
        (r"\begin{pmatrix}10^{-20}\\1\end{pmatrix}", r"\begin{pmatrix}\frac{1}{10^{20}}\\1\end{pmatrix}"),
        ("sin(x)", r"\sin x"), ("ln(2)", r"\ln 2"), ("2pi", r"2\pi"), ("pi/2", r"\frac{\pi}{2}"),
        ("2*pi*r", r"2\pi r"), ("sin^2(x)", r"\sin^2 x"), ("cos(2x)", r"\cos 2x"), ("e^(pi i)x", "-x"),
        ("7 pies", "7"), ("7 apple pies", "7"),
        ("6 eggs per week", "6 eggs a week"), ("7 feet 2 inches", "7 ft 2 in"), ("3.5 hours", "3 1/2 hours"),
        ("$3,000 per month", "3000"), ("1/4 cup", "0.25 cup"), ("half", "half"), ("0.5%", "0.005"),
        ("50 km/hr", "50 km/h"), ("5 meters/second", "5 m/s"), ("5 m per s", "5 m/s"), ("5 degrees", r"5^\circ"),
        ("1:30 PM", "1:30 pm"), ("7:00 AM", "7:00 a.m."), ("5 in", "5 inches"), ("72 in.", "6 feet"),
        ("Rs 5", "Rs 5"), ("5 lbs 3 oz", "5 pounds 3 ounces"), ("3 out of 4", "3 out of 4"),
        (r"\frac{1}{2}\text{ cup}", "0.5"), (r"20\%", "20 percent"), (r"\$4.50", "450 cents"),
        (r"5\,\text{kg}", "5000 g"), (r"\text{5 m}", "500 cm"), ("5~km", "5000 m")],
    "spellings": [("no", "No"), ("NO", "no"), ("4:30 p.m.", r"4:30 \text{ p.m.}"), ("4:30 PM", "4:30 p.m."),
        ("10 by 6", r"10 \text{ by } 6"), ("1 hour 15 minutes", r"1 \text{ hour } 15 \text{ minutes}"),
        (r"(\text{A}, \text{B})", "(A,B)"), (r"\{\text{A},\text{C}\}", "{A, C}"),
        (r"1-\frac{1}{e}", r"1-\frac{1}{\mathrm{e}}"), (r"e^{\mathrm{i}x}", "e^{ix}"), ("{5}", "5"),
        (r"{\frac12}", r"\frac12"), ("{{7}}", "7"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\dbinom{n}{3}", r"\frac{n(n-1)(n-2)}{6}"), (r"\frac{m(m+1)}{2}", r"\binom{m+1}{2}"),
        (r"{n \choose 2}", r"\frac{n(n-1)}{2}"), ("½", 0.5), ("⅓", r"\frac13"), ("2¾", "2.75"), ("–5", -5),
        ("—5", "-5"), ("‑5", "-5"), ("－5", "-5"), ("x–1", "x-1"), ("0.3", 0.1 + 0.2), ("1/3", 1 / 3),
        ("4.35", 435 * 0.01), ("1.1", 1.1), ("3", 3.0), ("0.7", 0.1 * 7), ("xy", "yx"), ("AB", "BA"),
        ("5 µm", "5 micrometers"), ("5 μm", "5 micrometers"), ("x÷2", "x/2"), ("√(x+1)", r"\sqrt{x+1}"),
        ("½x", "x/2"), ("x⁻¹", "1/x"), ("x⁴", "x^4"), ("x¹²", "x^{12}"), (r"\binom{n}{1}", "n"), ("３", "3"),
        ("5 cm²", "5 square centimeters"), ("5 m³", "5 cubic meters"), ("5 N·m", "5 newton meters"),
        ("5 Ω", "5 ohms"), ("20°C", "20 degrees Celsius"), ("20 °C", r"20^\circ\text{C}"), ("20 C", "20°C"),
        ("68 °F", "68 degrees Fahrenheit"), ("20℃", "20°C"), ("5 µg", "5 micrograms"), ("x³", "x^3"),
        ("x₁+x₂", "x_1+x_2"), ("2ⁿ", "2^n"), ("x²y³", "x^2y^3"), ("a⁻²", r"\frac{1}{a^2}"), ("¾", "0.75"),
        ("1½", "1.5"), ("3½", r"\frac{7}{2}"), ("¼x²", r"\frac{x^2}{4}"), ("２５", "25"), ("（1，2）", "(1,2)"),
        ("x＋1", "x+1"), ("π", r"\pi"), ("2π", r"2\pi"), ("θ/2", r"\frac{\theta}{2}"), ("α+β", r"\alpha+\beta"),
        ("√2", r"\sqrt{2}"), ("√12", r"2\sqrt{3}"), ("2√3", r"\sqrt{12}"), ("√(2)/2", r"\frac{\sqrt{2}}{2}"),
        ("sqrt(3)", r"\sqrt{3}"), (r"\sqrt(3)", r"\sqrt{3}"), ("2*sqrt(3)", r"2\sqrt{3}"),
        ("sqrt(x+1)", r"\sqrt{x+1}"), ("√(x²+1)", r"\sqrt{x^2+1}"), ("∛8x", "2x"), ("x≥2", r"x \ge 2"),
        ("x≠0", r"x \ne 0"), ("6÷x", r"\frac{6}{x}"), ("x·y", "xy"), ("a×b", "ab"), ("[0,∞)", r"[0,\infty)"),
        ("(−∞, 3]", r"(-\infty, 3]"), ("−5", "-5"), ("1–2x", "1-2x"), (r"\binom{n}{0}x", "x"),
        (r"\binom{n}{n-1}", "n"), (r"\frac{2x}{2}", "x"), ("𝑥+1", "x+1"), ("5 × 10³", "5000"), ("5×10^3", "5000"),
        ("10⁻⁶", "0.000001"), ("9.8 m/s²", "9.8 m/s^2"), ("12 in²", "12 square inches"), ("5 kg m/s", "5 kg·m/s"),
        ("45°", "45 degrees"), ("45º", "45°"), ("1.0 × 10^{-6}", "10^{-6}"), ("x^{10}", "x⁵x⁵"), ("e^{iπ}x", "-x"),
        ("½(x+y)", r"\frac{x+y}{2}"), (r"\frac12x", "x/2"), ("√x", "x^{1/2}"), ("√{x}", r"\sqrt{x}"),
        ("√ 2", r"\sqrt2"), ("5√2", r"5\sqrt{2}"), ("x²+2x+1", "(x+1)^2"), ("(x+1)²", "x²+2x+1"), ("αβ", "βα"),
        ("Δ", r"\Delta"), ("{1, 2}", r"\{1,2\}"), ("x∈[0,1]", "[0,1]"), ("∅", r"\emptyset"), ("A∪B", "B∪A"),
        ("5ｃｍ", "5 cm"), ("½", "50%"), (r"\sqrt[3]{8}x", "2x"), (r"2\sqrt2", r"\sqrt8"),
        (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"), (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"x\cdot\frac{1}{2}", r"\frac x2"), ("１８", "18"), ("1８", "18"), ("⑱", "18"), ("𝟏𝟖", "18"),
        ("-40°C", "-40°F"), ("x⁻²", r"\frac{1}{x^2}"), ("(x+1)⁻¹", r"\frac{1}{x+1}"), ("e⁻ˣ", "e^{-x}"),
        ("xⁿ⁺¹", "x^{n+1}"), ("a₁+a₂", "a_{1}+a_{2}"), ("log₂x", r"\log_2 x"), ("⅔x", r"\frac{2x}{3}"),
        ("3⅓", r"\frac{10}{3}"), ("5·10⁻³", "0.005"), ("3×4x", "12x"), ("x−y", "x-y"), ("２x＋３", "2x+3"),
        ("（x＋１）²", "(x+1)^2"), ("≤5", r"\le 5"), ("x≤5", r"x\le5"), ("−½", "-0.5"), ("√5/5", r"\frac{1}{\sqrt5}"),
        ("1/√2", r"\frac{\sqrt2}{2}"), ("2√(3)", r"2\sqrt3"), ("√(1/2)", r"\frac{\sqrt2}{2}"),
        ("√(a²+b²)", r"\sqrt{a^2+b^2}"), ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"), ("π²/6", r"\frac{\pi^2}{6}"),
        ("2πr", r"2\pi r"), ("∞", r"\infty"), ("(-∞,∞)", r"(-\infty,\infty)"),
        ("(−∞, −1) ∪ (1, ∞)", r"(-\infty,-1)\cup(1,\infty)"), ("θ=45°", r"45^\circ"), ("Ω", r"\Omega"),
        (r"\binom{n}{n}x", "x"), (r"\binom{x+1}{1}", "x+1"), ("x^(1/2)", r"\sqrt{x}"),
        ("¼ cup", "1/4 cup"), ("12½%", r"12.5\%"), ("33⅓%", r"33\frac{1}{3}\%"), ("2 cubic feet", "2 ft³"),
        ("100 °F", "100 degrees Fahrenheit"), ("x=5, y=6", "(5,6)"), ("x = ½", r"\frac12"),
        ("(½, ⅓)", r"(\frac12,\frac13)"), ("{½, 2}", r"\{0.5, 2\}"), ("[−1, 1]", "[-1,1]"),
        ("(-∞, √2)", r"(-\infty,\sqrt{2})"), ("[π/2, π]", r"[\frac{\pi}{2},\pi]"), ("3√5 − 2", r"3\sqrt{5}-2"),
        ("2x³ − 5x² + 1", "2x^3-5x^2+1"), ("10⁵", "100000"), ("1.5×10⁸", "150000000"),
        ("6.02 × 10²³", r"6.02 \times 10^{23}")],
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
        ("(0,0.0000001]", r"(0,\frac{1}{2^{99}}]"),
        (r"\ln(1+10^{-20})", r"\ln(1+10^{-21})"), ("3.14159265", r"\pi"),
        ("(10^{-20}, 10^{-30})", "(10^{-20}, 10^{-31})"), (r"\{10^{-20}, 2\}", r"\{2, 10^{-21}\}"),
        ("[10^{-20}, 1)", "[10^{-21}, 1)"), ("1e-20", "1e-21"), ("10^{-6}", "0.0000001"), ("10^{6}", "100000"),
        ("2^{10}", "1024"), ("2^{5}", "32"), ("10^{-20}x", "10^{-21}x"), ("x+10^{-25}", "x"), ("(1+10^{-20})x", "x"),
        (r"\sqrt{1+10^{-20}}y", "y"), ("e^{10^{-20}}x", "x"), (r"\cos(10^{-10})x", "x"), ("1.41421356", r"\sqrt{2}"),
        ("0.333333333", r"\frac13"), ("3.14", r"\pi"), ("[0, 0.0000001]", "[0, 0.00000012]"),
        ("0.1234567891", "0.1234567892x"), (r"\{10^{-6}, 1\}", r"\{1, 0.00001\}"), ("x+10^{-30}", "x"),
        (r"\frac{x}{10^{20}}", r"\frac{x}{10^{21}}"), (r"\sqrt{x^2+10^{-20}}", r"\sqrt{x^2}"),
        ("x^{1.0000000001}", "x"), ("1.0000000001x", "x"), ("0.99999999999999999x", "x"), (r"\pi+10^{-18}", r"\pi"),
        (r"\sin(10^{-30})x", "10^{-31}x"), (r"\ln(10^{20}+1)", r"\ln(10^{20})"), ("10^{40}+1", "10^{40}"),
        (r"\sqrt{10^{30}+1}", "10^{15}"), ("1", "1+10^{-40}"), ("0", "10^{-400}"), ("0x", "10^{-20}x"),
        ("(10^{-6}, 1)", "(10^{-7}, 1)"), ("[0, 10^{-6}]", "[0, 10^{-7}]"), (r"x \le 10^{-6}", r"x \le 10^{-7}"),
        ("2^{-10}", "2^{-11}"), ("2^{4}", "16"), ("10^{2}", "10"), ("10^{2}", "20"), ("2^{-1}", "2"),
        ("-2^{-1}", r"\frac12"), ("0^{-1}", "0"), ("5.0.0", "5"), (r"5^{\circ}", "5^{0}"),
        (r"10^{-20}\pi", "10^{-20}"), ("1+10^{-20}", "1"), (r"\sqrt{2}+10^{-25}", r"\sqrt2"),
        (r"\ln(1-10^{-20})", "-10^{-21}"), (r"\ln(1+10^{-30})", "0"), (r"\sin(1+10^{-20})", r"\sin(1+10^{-21})"),
        (r"\{\ln(1+10^{-20})\}", r"\{\ln(1+10^{-21})\}"),
        (r"(0, \ln(1+10^{-20})) \cup (1,2)", r"(0,\ln(1+10^{-21}))\cup(1,2)"),
        (r"\ln(1+10^{-20}), 2", r"\ln(1+10^{-21}), 2"), (r"\tan(\frac{\pi}{4}+10^{-20})x", "x"),
        (r"\cos(10^{-15})x", "x"), (r"x\ge\ln(1+10^{-20})", r"x\ge\ln(1+10^{-21})"),
        (r"|x|+\ln(1+10^{-20})", r"\ln(1+10^{-21})"), (r"\sqrt[3]{1+10^{-20}}x", "x"), ("(1+10^{-15})^{10}x", "x"),
        ("x^{1+10^{-20}}", "x"), (r"\frac{x}{1+10^{-20}}", "x"), (r"\ln(2+10^{-20})", r"\ln 2"),
        (r"\arctan(1+10^{-20})", r"\frac{\pi}{4}"), (r"\log_{10}(10+10^{-20})", "1"),
        (r"\sqrt{10^{-20}}", "10^{-11}"), (r"1\times10^{-20}", r"1\times10^{-21}"),
        (r"5 \times 10^{-7} m", r"5 \times 10^{-8} m"), (r"10^{-7}\text{ m}", r"10^{-8}\text{ m}"),
        ("10^{3}5", "1000"), (r"2\cdot10^{-20}", "10^{-20}")],
    "words": [("9 dozens", "9"), ("9 thousands", "9"), ("9 tenths", "9"), ("1 fifth", "1"), ("9 lakh", "9"),
        ("5 bn", "5"), ("5 doubled", "5"), ("18 thirteen", "18"), ("18 actually nineteen", "18"), ("9 crores", "9"),
        ("3 halves", "3"), ("5 tripled", "5"), ("5 halved", "5"), ("7 hundredths", "7"), ("18 twenty-one", "18"),
        ("4 fold", "4"), ("6 quintillion", "6"), ("2 twentieths", "2"), ("5 mln", "5"), ("18 zero", "18"),
        ("9 grand", "9"), (r"5\text{ bn}", "5"), ("$5 bn", "5"), ("5bn", "5"), ("3 squared", "3"), ("5 k", "5"),
        ("2 score", "2"), ("5 cr", "5"), ("5 quadruple", "5"), ("(9 dozens, 1)", "(9, 1)"), ("5 twenties", "5"),
        ("3 gazillion", "3"), ("2 dozen eggs", "2"), (r"5\text{ M}", "5"),
        ("6 googol", "6"), ("7 myriads", "7"), ("5 kilo", "5"), ("5 lacs", "5"), ("1 third cup", "1"),
        ("5 thousand", "5"), ("2.5 million", "2.5"), ("3 dozen", "3"), ("2 hundred", "2"), ("7 lakh", "7"),
        ("3 crore", "3"), ("2 millionths", "2"), ("3 hundredths", "3"), ("3 hundredth", "3"), ("3 fourths", "3"),
        ("1 quarter", "1"), ("3 quarters", "3"), ("1 half", "1"), ("5 halves", "5"), ("1 third", "1"),
        ("2 thirds", "2"), ("1 third of a cup", "1"), ("2 thirds of cups", "2"), ("1 half cup", "1"),
        ("3 fourth cups", "3"), ("5 half cups", "5"), ("2 and a half", "2"), ("18 nineteen", "18"),
        ("3 twenty-fifths", "3"), ("4 two-thirds", "4"), ("6 half-dozen eggs", "6"), ("5 double", "5"),
        ("5 triple", "5"), ("2 twice", "2"), ("5 quintuple", "5"), ("5 mega", "5"), ("5 giga", "5"), ("5 mil", "5"),
        ("5 bil", "5"), ("5 mio", "5"), ("5 K", "5"), ("5 zillion", "5"), ("5 grand dollars", "5"),
        ("4 score years", "4"), ("4 score", "4"), ("8 of ten", "8"), ("5 of", "5"), ("18 or so", "18"),
        ("18 ab", "18"), ("18 xy", "18"), ("18 mn", "18"), ("3 d", "3"), ("5 N", "5"), ("5 thousand %", "5"),
        ("8 one", "8"), ("8 one-", "8"), ("8 twenty", "8"), ("8 two thirds", "8"), ("8 and two thirds", "8"),
        ("8 two-thirds cups", "8"), ("3 tenths of people", "3"), ("3 tenth", "3"), ("5 third", "5"),
        ("5 thirds of cookies", "5"), ("2 thirds of the cookies", "2"), ("4 fifth cups", "4"), ("1 eighth inch", "1"),
        ("3 eighth inches", "3"), ("5 half", "5"), ("5 quarter hours", "5"), ("5 quarter", "5"),
        ("5 hundred cookies", "5"), ("5 thousand people", "5"), ("5 million people", "5"), ("5 dozen people", "5"),
        ("5 gross", "5"), ("5 scores", "5"), ("2 and 1/2", "2"), ("5 doubling", "5"), ("5 tenfold", "5"),
        ("5 fold", "5"), ("5 squared", "5"), ("5 cubed", "5"), ("5 k dollars", "5"), ("5k", "5"), ("5K dollars", "5"),
        ("5M", "5"), (r"5\text{ million}", "5"), (r"5\text{ thousand}", "5"), (r"5\text{ dozen}", "5"),
        ("5 zero", "5"), ("5 naught", "5"), ("5 minus", "5"), ("5 not", "5"), ("5 is wrong", "5"), ("5 or 6", "5"),
        ("5 maybe", "5"), ("5 apples and 6 pears", "5"), ("5 apples 6 pears", "5"), ("5e", "5"),
        ("10 twenty dollars", "10"), ("30 fifths", "30"), ("8 sevenths in total", "8"), ("7 three digits", "7"),
        ("2 to the third", "2"), ("2 third base", "2"), ("1 third-graders and", "2"), ("5 thousandths", "5"),
        ("5 millionth", "5"), ("5 hundred-dollar", "5"), ("5 hundred-dollar bills", "500"), ("1 half-dollar", "1"),
        ("1 half dollar", "1"), ("1 half an hour", "1"), ("2 quarter-hours", "2"), ("9 tenths of miles", "9"),
        ("1 tenth of miles", "1"), ("2 thirds full", "2"), ("12 dozen", "12"), ("5 point two", "5"),
        ("5 and two thirds", "5"), ("5 minus two", "5"), ("5 plus", "5"), ("20 percent of 50", "20"),
        ("5 per cent of ten", "5"), ("5 over two", "5"), ("5 squared units", "25"),
        ("7 quarters", "7"), ("7 half cups", "7"), ("7 and a third", "7"), ("7 and a half", "7"),
        ("7 and two thirds", "7"), ("7 of them", "7"), ("7 thousand dollars", "7"), ("7 million people", "7"),
        ("7 billion miles", "7"), ("7 halves", "7"), ("7 one-fourth miles", "7"), ("7 dozen eggs", "7"),
        ("7 score", "7"), ("7 up", "7"), ("7 ab", "7"), ("7 xy cd", "7"), ("7 plus one", "7"),
        ("7 less than ten", "7"), ("7 twice", "7"), ("7 third grade", "7"), ("7 or so", "7"),
        ("3 out of 4", "3"), ("1 m 5 cm", "105"), ("5 hundredweight", "500")],
    "units": [("50 cents", "$50"), ("$5", "5 cents"), (r"45^\circ\text{F}", r"45^\circ\text{C}"), ("5 cm^3", "5 cm^2"),
        (r"7\text{ p.m.}", r"7\text{ a.m.}"), ("5 m/s", "5 m"), ("60 miles", "60 mph"), ("5 kg", "5 g"),
        (r"5\text{ m/s}", r"5\text{ m/s}^2"), ("5 square feet", "5 feet"), ("$5", "€5"),
        ("5 eggs a day", "5 eggs a week"), ("5 inches", "5 cm"), ("20°C", "20°F"), ("(5 cm, 1)", "(5 m, 1)"),
        ("3 mg", "3 Mg"), ("5 ml", "5 l"), ("5 gallons", "5 quarts"), ("90 degrees", "90 radians"),
        ("9 times", "8"), ("18 x", "18"), ("3 x", "3"), ("5 N", "5 J"), ("5 W", "5 V"), ("5 days", "5 hours"),
        ("60 minutes", "2 hours"), ("1 km", "100 m"), ("50 cents", "$5"), ("5 dollars", "5 euros"), ("£5", "$5"),
        ("USD 5", "€5"), ("ABC 5", "5"), ("$5 per hour", "$5 per day"), ("5 mpg", "5 mph"), ("5 km", "5 kg"),
        ("5 kN", "5 N"), ("5 ft", "5 in"), ("5 lb", "5 oz"), ("5 gallons", "5 liters"), ("5 a.m.", "5 p.m."),
        ("12:30 am", "12:30 pm"), ("1 hr 30 min", "1 hour 3 minutes"), ("2 ft 3 in", "3 ft 2 in"), ("5 N m", "5 N"),
        ("A or B", "A"), ("(5 km, 3 h)", "(5 miles, 3 hours)"), ("(1 km, 2)", "(100 m, 2)"),
        ("5 km and 3 km", "5 km and 4 km"), ("5%", "5000%"), ("1 hour 30 min", "1 hour 30 seconds"),
        ("$12 per ticket", "$12 per hour"), ("9.8 m/s^2", "9.8 m/s"), ("9.8 m/s", "9.8 m"), ("12 sq in", "12 in"),
        ("144 sq in", "12 sq ft"), ("16 oz", "16 lb"), ("5 J/s", "5 J"), ("5 kg m/s", "5 kg"), ("5 MHz", "5 mHz"),
        ("2 GB", "2 MB"), ("5 nm", "5 mm"), ("5 rad", "5 degrees"), ("5 cents", "$5"), ("5 pennies", "$5"),
        ("4 Euros", "$4"), ("5 US dollars", "5 cents"), ("5 students", "6 students"), ("5 students", "5 teachers"),
        ("1 sixth of pies", "1"), (r"\$5M", "5"), ("5 googolplex", "5"), ("(x+10^{-20})^2", "x^2"),
        ("e^{100}+1", "e^{100}"), ("B", r"\frac{2A}{2}"), ("AM", "PM"), ("9:05 a.m.", "9:05 p.m."),
        ("12:30 pm", "1:30 pm"),
        ("4 dozen cookies", "4 cookies"), ("3 hundred students", "3 students"), ("1 quarter of the pizza", "1"),
        ("3 quarters of the pizza", "3"), ("5 times two", "5"), ("USD 5", "5 cents"), ("USD 5", "JPY 5"),
        ("GBP 5", "$5"), ("EUR 5", "$5"), ("$5 AUD", "€5"), ("5 km", "5000 km"), ("1 km", "1000 km"),
        ("1 hour", "1 minute"), ("60 minutes", "60 hours"), ("1 m^2", "100 cm^2"), ("1 L", "1 cm^3"),
        ("1 lb", "16 lb"), ("5 m/s", "5 m s"), ("5 cm", "5 cm^2"), ("5 mi", "5 min"), ("5 min", "5 mi"),
        ("5 lb", "5 lm"), ("5 MB", "5 mb"), ("3 oz", "3 fl oz"), ("5 mAh", "5 Ah"), ("sqrt2", "2"), ("3 pi", "3"),
        ("3pi", "3"), ("sin(x)", r"\cos x"), ("2pi", r"\pi"),
        ("1/2 of 10", "1/2x"), ("half", "1"), ("6 eggs per week", "6 eggs per day"),
        ("7 feet 2 inches", "2 feet 7 inches"), ("1/4 cup", "1/4 tsp"), ("5 m per s", "5 m"), ("72 in.", "72 feet"),
        ("5 lbs 3 oz", "3 lbs 5 oz"), (r"\$4.50", "4.50 cents"), (r"5\,\text{kg}", "5 g"), (r"\text{5 m}", "50 cm"),
        ("5 m and 3 cm", "5 m"), (r"5\%", "5 cents")],
    "spellings": [("on", "no"), ("yes", "No"), ("4:30 p.m.", "4:30 a.m."), ("10 by 6", "6 by 10"),
        ("1 hour 15 minutes", "1 hour 51 minutes"), (r"(\text{B}, \text{A})", "(A,B)"), ("½", "2"), ("18½", "18"),
        ("½18", "18"), ("⅓", "0.3"), ("5–6", "5"), ("–5", "5"), ("–5", 5), (r"\binom{5}{2}", "10"),
        (r"\binom{n}{2}", r"\frac{n(n+1)}{2}"), (r"\binom{4}{2}\pi", r"6\pi"), ("0.30001", 0.1 + 0.2), ("{5}", "6"),
        ("36/2", "18"), ("0.3", 0.3001),
        (r"\frac{22}{7}", r"\pi"), ("20°C", "20 K"), ("5 m²", "5 m³"), ("5 cm²", "5 cm"), ("5 µm", "5 mm"),
        ("5 µm", "5 Mm"), ("x²", "x^3"), ("x⁻¹", "x"), ("x¹²", "x^2"), ("x¹²", "x^{1}2"), ("½x", "2x"), ("x₁", "x_2"),
        ("x₁", "x^1"), ("３", "4"), ("1⁸", "18"), ("2⁴", "24"), ("½2", r"\frac{1}{22}"),
        (r"\frac{1}{2}18", r"\frac{1}{218}"), ("x÷2", "2/x"), ("√(x+1)", r"\sqrt{x}+1"), ("√x+1", r"\sqrt{x+1}"),
        (r"\binom{n}{2}", "n"), (r"\binom{n}{1}", "m"), ("2x", "x"), ("2n", "n"), ("B", "A"), ("(0,1)", "[0,1]"),
        ("①", "2"), ("x ≥ 2", "x > 2"), ("−5", "5"), ("5, 6", "5"), ("½x", r"\frac{1}{2x}"), ("x½", r"\frac{1}{2}"),
        ("2½", r"\frac{2}{2}"), ("x²", "2x"), ("x⁻²", "x^2"), ("x₂", "x^2"), ("x₂", "2x"), ("√(x)+1", r"\sqrt{x+1}"),
        ("√2x", r"\sqrt{2x}"), ("√12", r"\sqrt12"), ("∛8x", r"\sqrt{8}x"), ("6÷2", "3"), ("６", "9"), ("５０", "5"),
        ("5ⅹ", "5"), ("5²", "5"), ("5²", "52"), ("5₂", "52"), ("(1)(2)", "12"), ("(1}", "1"), ("2{x}", "2"),
        (r"\frac{1}{2}3", r"\frac{1}{23}"), ("n", r"\binom{n}{2}"), (r"\binom{n}{2}", "2n"), ("y", r"\frac{2x}{2}"),
        (r"\frac{A+B}{2}", "A"), ("A, B", "A"), ("9:05", "9:06"), ("3:4", "4:3"),
        ("-40°C", "40°F"), ("0°C", "0 K"), ("0°C", "0°F"), ("x⁻²", "x^{2}"), ("xⁿ⁺¹", "x^n+1"), ("e⁻ˣ", "e^x"),
        ("a₁", "a1"), ("a₁", "a_2"), ("⅔x", r"\frac{3x}{2}"), ("3⅓", r"\frac{3}{3}"), ("3⅓", "1"), ("5·10⁻³", "0.05"),
        ("√5/5", "5"), ("1/√2", "2"), ("√(1/2)", r"\frac{1}{\sqrt{3}}"), ("2√3", r"\sqrt6"), ("x²", "x^{2}+10^{-20}"),
        ("x^(1/2)", "x"),
        ("33⅓%", r"33\%"), ("100 °F", "100 °C"), ("x=5, y=6", "(6,5)"), ("(½, ⅓)", r"(\frac13,\frac12)"),
        ("[−1, 1]", "[1,-1]"), ("(-∞, √2)", r"(-\infty,\sqrt{3})"), ("10⁵", "105"), ("1.5×10⁸", "1.5"),
        ("6.02 × 10²³", "6.02")],
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


@pytest.mark.parametrize("scrap", ["√", "sqrt", r"\frac", r"\binom", "x√", "√ ", "^", "⁻¹", r"5 \frac", "½√"])
def test_scraps_of_formulas(scrap):
    assert not within_a_second(scrap, "x+1") and not within_a_second("x+1", scrap) and not within_a_second(f"5 {scrap}", "5")


def test_googols_of_googols():
    for gold in ("x+1", "5", r"\{x, 1\}", "5 " + "googol " * 50):
        assert not within_a_second("5 " + "googol " * 100, gold)


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
    $ € . : ' 0 1 7 10 99999 1e9 0.5 ½ – ² √ é x y i e o AB cm ft mdB yottacelsius per square degrees F p.m. dollars tenths dozen googol third two-liter mpg USD of pi sqrt log ⁻¹ √ ３ µ 2^{-9} 10^ and or by \sin \ln
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
