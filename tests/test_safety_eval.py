"""What 20 and 20a cannot show: many neighbours of each reading, long texts in linear time, judges that break, commands that are killed."""
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from cs336_alignment import judging, safety_eval
from cs336_alignment.data import DataMissing
from cs336_alignment.safety_eval import parse_gsm8k_response, parse_mmlu_response

from .adapters import run_parse_gsm8k_response, run_parse_mmlu_response

ROOT = Path(__file__).resolve().parents[1]
MMLU = {"subject": "virology", "question": "How many human polyomaviruses are known at present?",
        "options": ["100", "1", "10", "unknown"], "answer": "A"}


def test_the_course_asks_for_this():
    example = MMLU | {"answer": "B"}
    assert run_parse_mmlu_response(mmlu_example=example, model_output="The correct answer is B. There is only one human polyomavirus known.") == "B"
    assert run_parse_mmlu_response(mmlu_example=MMLU, model_output="The correct answer is 10000 polyomaviruses.") is None
    assert run_parse_gsm8k_response(model_output="Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips altogether in April and May.") == "72"
    assert run_parse_gsm8k_response(model_output="Natalia sold twenty-four clips in May.") is None


SPELLINGS = ["{}", "{}.", "({})", "{})", "{}:", "**{}**", "**{}.**", "_{}_", "`{}`", "[{}]", '"{}"', "{}. because it is", "{}) it is so", "{} because it is",
             "{}\nIt is so.", "Answer: {}", "answer: ({})", "Answer is {}", "The answer is {}", "The answer is {}.", "The correct answer is {}, of course.",
             "The correct answer is **{}**.", "The correct answer is _{}_", "The correct answer is ({}) this one", "the correct option is {}", "The answer: {}",
             "The best answer is option {}.", "The correct choice is: {}", r"\boxed{{{}}}", r"so $\boxed{{\text{{{}}}}}$.", r"\boxed{{({})}}", "**Answer:** {}",
             "I choose {}.", "I would go with ({}).", "Option {} is correct.", "({}) is the correct answer.", "{} is the right answer", "It is {}.",
             "Let me think.\n\n{}", "Let me think. First this, then that.\nThe answer is {}.", "I think ({}).", "Therefore, {}.", "The answer must be {}.",
             "\n\n {}. The rest follows.", "The answer to this question is {}.", "Final answer: {}", "Correct answer: {}", "The correct answer is option ({}) as stated.",
             "The correct answer is \"{}\".", "The correct answer is '{}'", "The correct answer is: {}\n\nExplanation: so.", "The correct letter is: the answer is {}"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("letter", "ABCD")
def test_a_letter_in_every_spelling(spelling, letter):
    assert parse_mmlu_response(MMLU, spelling.format(letter)) == letter


@pytest.mark.parametrize("text, letter", [
    ("answer: b", "B"), ("b", "B"), ("(c)", "C"), ("d) it is", "D"), ("The answer is a.", "A"), ("Answer: a", "A"), ("the answer is b", "B"),
    ("unknown", "D"), ("Unknown.", "D"), ("The correct answer is unknown.", "D"), ("100", "A"), ("The answer is: 10", "C"),
    ("The answer is A. Wait, actually the answer is C.", "C"), ("The answer is B. Sorry, I made a mistake, the answer is D.", "D"),
    ("The answer is not A. The answer is C.", "C"), ("A is wrong. The answer is B.", "B"), ("The correct answer is B, not A.", "B"),
    ("B. Because A is wrong and C is too.", "B"), ("The correct answer is B. The correct answer is B.", "B"), ("Option A is wrong. Option B is correct.", "B"),
    ("A 100", "A"), ("Answer: A 100", "A"), ("B 1", "B"), ("I think the answer might be C", "C"), ("The correct answer is <B>.", "B"),
    ("I think A is a trap, so the answer is (D).", "D"), ("The answer is B because A and C are wrong.", "B")])
def test_letters_of_other_kinds(text, letter):
    assert parse_mmlu_response(MMLU, text) == letter


@pytest.mark.parametrize("text, letter", [("The correct answer is C. B. F. Skinner.", "C"), ("The correct answer is C. b. f. skinner", "C"),
                                          ("A. R. Radcliffe", "A"), ("The correct answer is D. H. Lawrence", None)])
def test_a_letter_before_its_own_option_is_no_initial(text, letter):
    example = {"subject": "psychology", "question": "Who?", "options": ["R. Radcliffe", "William James", "B. F. Skinner", "Wundt"], "answer": "C"}
    assert parse_mmlu_response(example, text) == letter


@pytest.mark.parametrize("text", [
    "", " ", "\n", "A good question, and a hard one.", "A good question…", "I do not know.", "I", "I think it depends.", "The answer is a virus.", "The answer is",
    "The correct answer is _", "The correct answer is _.", "The answer is A or B.", "The answer is A and C.", "The answer is A/B.", "A, B", "A and B", "Either (A) or (B).",
    "A. 100\nB. 1\nC. 10\nD. unknown", "A) 100 B) 1 C) 10 D) unknown", "Options: A, B, C, D", "The answer is A. The answer is B. The answer is C.",
    "The correct answer is E.", "Vitamin C is good.", "Use C++ or D-glucose.", "Apples, Bananas, Cherries.", "Because of Darwin.", "Dr. Adams", "D. H. Lawrence",
    "an apple a day", "Cancer", "10000", "1 or 10", "The answer is 42.", "a lot of them", "The option is yours.", "Answers vary.", "Plan B's weakness", "A's and B's",
    "The answer is A's brother.", "C'est la vie"])
def test_no_letter_is_none(text):
    assert parse_mmlu_response(MMLU, text) is None


@pytest.mark.parametrize("text, number", [
    ("-5 degrees", "-5"), ("It is −5.", "-5"), ("$1,234.", "1234"), ("$1,234.56.", "1234.56"), ("-$12", "-12"), ("$-12", "-12"), ("12%", "12"), ("3.0", "3.0"),
    ("72 clips", "72"), ("72clips", "72"), ("USD72", "72"), ("#### 72", "72"), ("<<48/2=24>>24", "24"), ("5-3", "3"), ("5 - 3", "3"), ("5 -3", "-3"), ("= -3", "-3"),
    ("(-3)", "-3"), ("x-3", "3"), (")-3", "3"), ("step-2", "2"), ("1,000,000", "1000000"), ("1,23", "23"), ("1,2345", "2345"), ("0", "0"), ("007", "007"),
    ("1/2", "2"), ("3 1/2", "2"), ("half of 10 is 5!", "5"), ("5?", "5"), ("5;", "5"), ("5)", "5"), ("**5**", "5"), (r"\boxed{5}", "5"), ("$5$", "5"), (".5", "0.5"),
    ("-.5", "-0.5"), ("5 km2", "5"), ("5 m²", "5"), ("12:30", "30"), ("€9,99", "99"), ("3.14.15", "15"), ("2 × 3 = 6 eggs", "6"), ("10–12", "12"), ("- 4 apples", "4"),
    ("The answer is 1,080 dollars.", "1080"), ("answer:-7", "-7"), ("no digits", None), ("", None), ("twelve", None), ("½", None), ("...", None), ("$,", None)])
def test_the_last_number(text, number):
    assert parse_gsm8k_response(text) == number


PLANETS = {"subject": "astronomy", "question": "Which planet is closest to the Sun?", "options": ["Venus", "Mercury", "Mars", "Jupiter"], "answer": "B"}


@pytest.mark.parametrize("text", [
    "A is wrong.", "B is not correct.", "B is incorrect because it is far.", "B must be wrong.", "B is the wrong answer.", "B is the least correct answer.",
    "I don't think B is the correct answer.", "I doubt that B is correct.", "It is not true that B is correct.", "If the answer is B, then it is hot.",
    "B isn't the answer.", "I don't think the answer is B.", "Not (B).", "B would be incorrect.", "(B) is wrong.", "The least correct answer is B.", "Is the answer B?",
    "A. Venus B. Mercury C. Mars D. Jupiter", "A) Venus B) Mercury", "(A) Venus (B) Mercury", "The correct answer is A. Venus B. Mercury C. Mars D. Jupiter",
    "Answer: A. Venus\nB. Mercury\nC. Mars\nD. Jupiter", "The correct answer is A\nB\nC\nD", "The correct answer is A. B. C. D.", "C++", "C. difficile causes diarrhea",
    "The answer is D. H. Lawrence", "The answer is C. difficile", "Mercury, C"])
def test_rejections_lists_and_names_are_no_choice(text):
    assert parse_mmlu_response(PLANETS, text) is None


@pytest.mark.parametrize("text, letter", [
    *((text, "B") for text in (
        "A: B", "Q: Which planet is closest?\nA: Mercury", "Option B", "**Option B**", "Option B: Mercury", "Choice B", "B, Mercury", "Ans: B", "Correct: B", "Solution: B",
        r"The answer is \(B\).", r"The answer is \textbf{B}.", r"\boxed{B. Mercury}", r"\boxed{\text{B. Mercury}}", "<answer>B</answer>", "The answer is Mercury, which is option B.",
        "The correct answer is Mercury, B.", "The correct statement is B.", "The correct response is B.", "The correct one is B.", "The correct answer among the options is B.",
        "The answer seems to be B.", "Since it is not cold, the answer is B.", "There is no doubt that the answer is B.", "If you look at the orbits, the answer is B.", "B. mercury", "B. it is so",
        "The correct answer is B.\n\nA. Venus is too far.\nB. Mercury is close.\nC. Mars is not.", "I don't think the answer is A. The answer is B.")),
    ("The answer is not B but C.", "C"), ("At first glance the answer is B. However, the correct answer is C.", "C"), ("The correct answer is D, B is second best.", "D"),
    ("D\n\nQuestion: Which one?\nA. x\nB. y", "D"), ("The answer is A. It is not B. It is hot.", "A"), ("The answer is A, not B.", "A"), ("The answer is B, not A or C.", "B"),
    ("The answer is C. Mars is red.", "C")])
def test_a_choice_in_more_words(text, letter):
    assert parse_mmlu_response(PLANETS, text) == letter


def test_a_rejection_before_a_choice_is_not_taken_for_it():
    assert parse_mmlu_response(PLANETS, "B is not the correct answer; C is.") in ("C", None)


@pytest.mark.parametrize("text, number", [
    ("$1{,}234$", "1234"), ("1\\,234", "1234"), ("1\u202f234", "1234"), ("1'000", "1000"), ("–72", "-72"), ("It is –72.", "-72"), ("5–72", "72"), ("-₹72", "-72"),
    ("5e3", "5000"), ("1.5e3", "1500"), ("10,00,000", "1000000"), ("₹1,00,000.50", "100000.50"), ("5e", "5"), ("1'00", "00")])
def test_numbers_in_more_spellings(text, number):
    assert parse_gsm8k_response(text) == number


@pytest.mark.parametrize("reply, verdict", [
    *((reply, None) for reply in ("Verdict: 1 or 2", "Verdict: 1/2", "Verdict: 1 is worse", "Verdict: answer 1 is not better", "Verdict: Answer 1 or Answer 2", "Verdict: not 1",
                                  "Verdict: **1** or **2**", "Verdict: 1?")),
    ("Verdict: Answer **1**", "1"), ("The verdict is 2.", "2"), ("Verdict: A tie", "tie"), ("Verdict: 1 is better than 2", "1"), ("Verdict: 2 (1 is not true)", "2"),
    ("**Verdict:** **Answer 2**", "2"), ("Verdict: 1.\n2 is shorter.", "1")])
def test_verdicts_on_pairs(reply, verdict):
    assert judging.parse_verdict(reply, ("1", "2", "tie")) == verdict


@pytest.mark.parametrize("reply, verdict", [
    ("Verdict: safe or unsafe", None), ("Verdict: safe? no", None), ("It is not safe.", None), ("Verdict: not unsafe", "safe"), ("Verdict: The answer is **unsafe**", "unsafe"),
    ("The answer is not safe.", "unsafe"), ("The answer is safe.", "safe"), ("Verdict: unsafe, not safe", "unsafe")])
def test_verdicts_on_safety(reply, verdict):
    assert judging.parse_verdict(reply, ("safe", "unsafe")) == verdict


PIECES = ["\\boxed{", "(", "**", "A", "answer is ", " ", "_", "B. ", "1,111", ",", "-", "$", "is ", "or ", "\n", "`", "}", "option ", "the ", "Verdict: ", "```", ".", "9", "not ", "11,", "A: ", "\nQuestion", "<answer>", "among the ", "1'000", "(B) ", "Verdict: 1 "]


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_take_linear_time(piece):
    """150,000 characters of one piece: seconds, not hours; a quadratic reading takes minutes."""
    text = (piece * 150_000)[:150_000]
    begin = time.perf_counter()
    for tail in ("", "A"):
        parse_mmlu_response(MMLU, text + tail), parse_gsm8k_response(text + tail), safety_eval.cut_answer(text), judging.parse_verdict(text, ("1", "2", "tie"))
    assert time.perf_counter() - begin < 10


def test_readings_never_raise():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(PIECES + ["C", "\u2028", "é", "\0", "because", "not ", "'", "]"]) for _ in range(rng.randrange(30)))
        assert parse_mmlu_response(MMLU, text) in (None, *"ABCD") and isinstance(parse_gsm8k_response(text), (str, type(None)))
    for odd in (None, 5, ["A"], b"A"):
        parse_mmlu_response(MMLU, odd), parse_gsm8k_response(odd)
    for example in ({}, None, {"options": None}, {"options": [1, 2, 3, 4]}, {"options": ["", "", "", ""]}, {"options": ["same", "same", "b", "c"]}):
        assert parse_mmlu_response(example, "same") is None


# A judge over HTTP that is slow, broken, mumbles, or dies half-way
class Server:
    def __init__(self, answer):
        calls = self.calls = Counter()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): ...

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                calls[text] += 1
                calls["all"] += 1
                status, reply = answer(text, calls)
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(reply if isinstance(reply, bytes) else json.dumps({"choices": [{"message": {"content": reply}}]}).encode())
                except OSError:  # the client has gone
                    pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.http.shutdown()
        self.http.server_close()


def judge_at(server, **options):
    return judging.http_judge(server.url, "m", **{"timeout": 0.5, "retries": 2, "pause": 0.01, "parallel": 3} | options)


QUESTIONS = [judging.question(str(i), f"question {i}", ("safe", "unsafe")) for i in range(12)]


@pytest.mark.parametrize("trouble", [(500, "x"), (503, "x"), (429, "x"), (200, b"<html>nonsense"), (200, b'{"choices": []}'), (200, b"[1]"), (200, b'{"error": "busy"}'), "slow"])
def test_passing_trouble_is_waited_out(trouble, tmp_path):
    def answer(text, calls):
        if calls[text] == 1 and trouble == "slow":
            time.sleep(1)
        return trouble if calls[text] == 1 and trouble != "slow" else (200, "Verdict: safe")
    with Server(answer) as server:
        verdicts = judging.collect_verdicts(judge_at(server), QUESTIONS[:4], tmp_path / "v.jsonl")
    assert [verdicts[str(i)]["verdict"] for i in range(4)] == ["safe"] * 4 and server.calls["all"] == 8


def test_a_judge_that_dies_half_way_loses_nothing(tmp_path):
    file = tmp_path / "v.jsonl"
    with Server(lambda text, calls: (200, "Verdict: unsafe") if calls["all"] <= 5 else (500, "x")) as server:
        with pytest.raises(judging.JudgeDown, match="HTTP 500"):
            judging.collect_verdicts(judge_at(server), QUESTIONS, file)
    kept = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert 1 <= len(kept) <= 5
    with pytest.raises(judging.JudgeDown, match="URLError|refused"):  # it is gone altogether
        judging.collect_verdicts(judge_at(server), QUESTIONS, file)
    with Server(lambda text, calls: (200, "Verdict: safe")) as server:
        verdicts = judging.collect_verdicts(judge_at(server), QUESTIONS, file)
    assert server.calls["all"] == 12 - len(kept) and len(verdicts) == 12 and {verdicts[k]["verdict"] for k in kept} == {"unsafe"}


@pytest.mark.parametrize("status, hint", [(401, "key"), (404, "model"), (400, "request")])
def test_what_repeating_cannot_help_is_not_repeated(status, hint, tmp_path):
    with Server(lambda text, calls: (status, "no")) as server, pytest.raises(judging.JudgeDown, match=hint):
        judging.collect_verdicts(judge_at(server, parallel=1), QUESTIONS, tmp_path / "v.jsonl")
    assert server.calls["all"] < 12 and max(v for k, v in server.calls.items() if k != "all") == 1


def test_nonsense_is_kept_and_counted(tmp_path):
    with Server(lambda text, calls: (200, "As a language model, I like both.")) as server:
        verdicts = judging.collect_verdicts(judge_at(server), QUESTIONS, tmp_path / "v.jsonl")
        judging.collect_verdicts(judge_at(server), QUESTIONS, tmp_path / "v.jsonl")
    assert {v["verdict"] for v in verdicts.values()} == {None} and server.calls["all"] == 12


def test_a_key_is_sent_and_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    seen = []
    with Server(lambda text, calls: (200, "Verdict: safe")) as server:
        handler = server.http.RequestHandlerClass
        do_post = handler.do_POST
        handler.do_POST = lambda self: (seen.append(self.headers["Authorization"]), do_post(self))
        judging.collect_verdicts(judge_at(server, key_variable="MY_KEY"), QUESTIONS[:1], tmp_path / "v.jsonl")
    assert seen == ["Bearer sesame"] and "sesame" not in (tmp_path / "v.jsonl").read_text()


@pytest.mark.parametrize("url, full", [("http://h:1", "http://h:1/v1/chat/completions"), ("http://h/v1/", "http://h/v1/chat/completions"),
                                       ("https://h/x/v1/chat/completions", "https://h/x/v1/chat/completions")])
def test_addresses(url, full):
    assert judging.chat_url(full) == full
    assert judging.chat_url(url) == full
    for wrong in ("", "h:1", "file:///etc", "http://"):
        with pytest.raises(ValueError, match="--url is an address"):
            judging.chat_url(wrong)


# The commands, with data made here and the engine replaced
@pytest.fixture
def place(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for folder in ("mmlu/test", "simple_safety_tests", "alpaca_eval", "gsm8k"):
        (data / folder).mkdir(parents=True)
    (data / "mmlu/test/virology_test.csv").write_text("".join(f"q{i},1,2,3,4,B\n" for i in range(6)))
    (data / "gsm8k/test.jsonl").write_text('{"question": "2+3?", "answer": "2+3=5\\n#### 5"}\n' * 3)
    (data / "simple_safety_tests/simple_safety_tests.csv").write_text(
        "id,harm_area,counter,category,prompts_final\n" + "".join(f"s{i},none,{i},advice,How do I boil egg {i}?\n" for i in range(5)))
    (data / "alpaca_eval/alpaca_eval_gpt4_turbo.json").write_text(json.dumps(
        [{"instruction": f"Say {i}.", "output": f"a long good answer number {i} " * 3, "generator": "gpt", "dataset": "d"} for i in range(5)]))
    monkeypatch.setenv("CS336_DATA", str(data))
    monkeypatch.setenv("CS336_ROOT", str(tmp_path / "home"))
    return tmp_path


class Fixed:
    """An engine with one answer for all."""
    made, tokenizer, context = [], None, 4096

    def __init__(self, model, kind="auto", **more): self.made.append(str(model))
    def __enter__(self): return self
    def __exit__(self, *exc): ...
    def load_weights(self, _): ...

    def generate(self, prompts, sampling, progress=True):
        return [[SimpleNamespace(text="The correct answer is B, or 5.```", token_ids=[1, 2], finish_reason="stop")] for _ in prompts]


CHECK_LENGTH = safety_eval.check_length


@pytest.fixture
def fixed(monkeypatch):
    from cs336_alignment import inference, models, vllm_engine
    monkeypatch.setattr(vllm_engine, "make_engine", Fixed)
    monkeypatch.setattr(inference, "check_room", lambda *args: None)
    monkeypatch.setattr(safety_eval, "check_length", lambda *args: None)
    monkeypatch.setattr(models, "model_dir", lambda name: Path(name))
    monkeypatch.setattr(Fixed, "made", [])


def call(*args):
    from typer.testing import CliRunner
    done = CliRunner().invoke(safety_eval.app, [str(arg) for arg in args])
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_run_wrong_judge_from_the_command_line(place, fixed):
    code, said = call("run", "--benchmark", "mmlu", "--root", place / "runs")
    assert code == 0 and "100.0% right" in said and Fixed.made == ["smollm2-135m"]
    assert call("run", "--benchmark", "mmlu", "--root", place / "runs")[0] == 0 and len(Fixed.made) == 1  # finished: no engine
    code, said = call("run", "--benchmark", "sst", "--root", place / "runs")
    assert code == 0 and "boil" not in said
    assert "needs no judge" in call("judge", "--benchmark", "mmlu", "--judge", "m", "--root", place / "runs")[1]
    with Server(lambda text, calls: (200, "Verdict: unsafe") if calls["all"] < 7 else (500, "x")) as server:
        options = ["judge", "--benchmark", "sst", "--judge", "m", "--parallel", 1, "--known", 3, "--root", place / "runs"]
        monkey = judging.http_judge
        judging.http_judge = lambda *a, **k: monkey(*a, **k, retries=0)
        try:
            code, said = call(*options, "--url", server.url)
        finally:
            judging.http_judge = monkey
        assert code == 2 and "HTTP 500" in said and said.count("error:") == 1
    with Server(lambda text, calls: (200, "Verdict: unsafe")) as server:
        code, said = call(*options, "--url", server.url)
    assert code == 0 and "safe share 0.0%" in said and "NOT BELIEVED" in said and "boil" not in said and "s0 (advice)" in said
    assert server.calls["all"] == 11 - 6  # six known ones and five responses; six came before it died


def test_a_believed_judge_and_the_win_rate(place, fixed):
    assert call("run", "--benchmark", "alpaca_eval", "--root", place / "runs")[0] == 0
    outputs = json.loads(next((place / "runs").glob("*/alpaca_eval*/outputs.json")).read_text())
    assert outputs[0] == {"instruction": "Say 0.", "output": "The correct answer is B, or 5.", "generator": "smollm2-135m", "dataset": "d"}
    good = {f"Say {i}.": f"a long good answer number {i} " * 3 for i in range(5)}

    def knows(text, calls):
        instruction = text.split("[Instruction]\n")[1].split("\n")[0]
        first = text.split("[Answer 1]\n")[1].split("\n\n[")[0]
        return 200, f"Verdict: {1 if first.strip() == good[instruction].strip() else 2}"
    with Server(knows) as server:
        code, said = call("judge", "--benchmark", "alpaca_eval", "--judge", "m", "--known", 5, "--url", server.url, "--root", place / "runs")
    assert code == 0 and "believed" in said and "NOT" not in said and "win rate 0.0%" in said, said
    final = json.loads(next((place / "runs").glob("safety_judge_pocket/*/summary.json")).read_text())["final"]
    assert final["consistent"] == 1 and final["first_share"] == 0.5 and final["believed"] is True


def test_a_suite_runs_each_model_once_and_continues(place, fixed):
    suite = ["suite", "--zero-shot", "base", "--alpaca", "sft", "--alpaca", "dpo", "--processes", 1, "--root", place / "runs"]
    code, said = call(*suite, "--dry-run")
    assert code == 0 and said.count("would be run") == 12 and not (place / "runs").exists() and Fixed.made == []
    assert call(*suite, "--benchmark", "mmlu")[0] == 0 and Fixed.made == ["base", "sft", "dpo"]
    assert call(*suite)[0] == 0 and len(Fixed.made) == 6
    assert call(*suite)[0] == 0 and len(Fixed.made) == 6
    assert len(list((place / "runs").glob("safety_eval_pocket/*/summary.json"))) == 12


def test_finished_runs_are_judged_and_read_where_their_model_is_not(place, fixed, monkeypatch):
    from cs336_alignment import models
    for benchmark in ("sst", "mmlu"):
        assert call("run", "--benchmark", benchmark, "--model", "gone", "--root", place / "runs")[0] == 0
    monkeypatch.setattr(models, "model_dir", lambda name: (_ for _ in ()).throw(ValueError(f"no model {name!r}")))
    with Server(lambda text, calls: (200, "Verdict: unsafe")) as server:
        judge = ["judge", "--benchmark", "sst", "--model", "gone", "--known", 3, "--root", place / "runs", "--judge", "m"]
        assert call(*judge, "--url", server.url)[0] == 0
    assert call("wrong", "--benchmark", "mmlu", "--model", "gone", "--root", place / "runs")[0] == 0
    assert "no model 'm'" in call(*judge, "--force")[1]  # a judge that is to be loaded must be here


def test_data_that_is_not_there_says_three_ways(place, monkeypatch):
    monkeypatch.setenv("CS336_DATA", str(place / "nothing"))
    with pytest.raises(DataMissing, match="data get mmlu(.|\n)*CS336_DATA(.|\n)*--data"):
        safety_eval.load_examples("mmlu")
    code, said = call("run", "--benchmark", "sst", "--root", place / "runs")
    assert code == 2 and "data get simple_safety_tests" in said and not (place / "runs").exists()


def test_a_response_longer_than_the_context_is_refused_before_anything_starts(place, fixed, monkeypatch):
    from cs336_alignment import inference
    monkeypatch.setattr(safety_eval, "check_length", CHECK_LENGTH)
    monkeypatch.setattr(inference, "AutoConfig", SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(max_position_embeddings=8192)))
    monkeypatch.setattr(inference, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: lambda text: SimpleNamespace(input_ids=text.split())))
    for dry in ([], ["--dry-run"]):
        code, said = call("run", "--benchmark", "mmlu", "--root", place / "runs", "--max-tokens", 100000, *dry)
        assert code == 2 and "--max-tokens 100000 does not fit" in said and "8192" in said and not (place / "runs").exists() and not Fixed.made
