"""The readers of problems: golds are read right, or refused with the file and the line."""

import json
import os
import subprocess
import sys

import pytest

from cs336_alignment.data import (DataError, DataMissing, _trace_problem, gsm8k_problem, join_thousands, last_boxed,
                                  math_problem, read_gsm8k, read_jsonl, read_math, read_problems, read_records,
                                  read_traces, repo_root, trace_record)

BARE = {  # \boxed without braces
    r"$\boxed 3.5$": "3.5", r"\boxed\frac{1}{2}": r"\frac{1}{2}",
    r"$\boxed 2$.": "2", r"$\boxed -3.25$, so": "-3.25", r"$\boxed .5$.": ".5", r"so \boxed 1,234.": "1,234",
    r"\boxed 7 apples": "7", r"\boxed 7, and then": "7", r"\boxed 7. Then": "7", r"$\boxed 5!$": "5!",
    r"{\boxed 5}": "5", r"$\boxed 2\%$": r"2\%", r"$\boxed\$5$": r"\$5", r"$\boxed 5\,$": r"5\,",
    r"$\boxed 2 \text{ cm}$": r"2 \text{ cm}",
    r"$\boxed A$": "A", r"$\boxed xy$": "xy", r"$\boxed x^2$": "x^2", r"$\boxed ab+1$": "ab+1",
    r"$\boxed (1, 2)$": "(1, 2)", r"\boxed\frac12": r"\frac12", r"$\boxed\frac 1 2$": r"\frac 1 2",
    r"\boxed\sqrt{2}": r"\sqrt{2}",
    r"\boxed\sqrt[3]{2}.": r"\sqrt[3]{2}", r"so \boxed\frac{1}{2} is": r"\frac{1}{2}", r"$\boxed\pi r^2$": r"\pi r^2",
    r"$x=\boxed\dfrac{\sqrt{3}}{2}$ cm": r"\dfrac{\sqrt{3}}{2}", r"\boxed\text{(A)} is right": r"\text{(A)}",
    r"$\boxed\frac{1}{\frac{1}{\sqrt{2}}}$": r"\frac{1}{\frac{1}{\sqrt{2}}}", r"\(\boxed 4\)": "4",
    r"\[\boxed 4\]": "4", r"$\boxed\left(1,\frac{2}{3}\right)$": r"\left(1,\frac{2}{3}\right)",
    r"\begin{align*}\boxed 4\end{align*}": "4",
    r"\begin{align*}x&=\boxed 4\\&=4\end{align*}": "4"}
PROSE = [r"\boxed{5}. It is in \boxed form", r"\boxed{5}. It is in \boxed form.", r"$\boxed{5}$. Write it in a \boxed.",
         r"$\boxed{5}$, in \boxed", r"\boxed{5} as \boxed a box", r"\boxed{5}. \boxedtext",
         r"\boxed{5}. The \boxed-form",
         r"\boxed{5}, in \boxed (see above)", r"\boxed{5}, see \fbox{6}", "\\boxed{5}, in \\boxed\nform",
         r"$\boxed 5$ in \boxed it"]
BRACES = {r"so $\boxed{\frac{1}{2}}$.": r"\frac{1}{2}", r"$\boxed{1}$, no: $\boxed{ x^{2^{n}} }$": r"x^{2^{n}}",
          "\\boxed\n{7}": "7", r"\boxed {7}": "7", r"\boxed{\{1,2\}}": r"\{1,2\}", r"\fbox{6}": "6",
          r"\boxed{\frac{\sqrt{\frac{1}{\sqrt{2}}}}{3}}": r"\frac{\sqrt{\frac{1}{\sqrt{2}}}}{3}"}
NONE = ["no box", r"\boxed{}", r"\boxed{1", r"\boxed", "", r"\boxed form", r"\boxed{5} or \boxed{}", r"\boxed\frac{a",
        r"\boxed \boxed", r"\boxed $5$", r"$\boxed{\}$"]


@pytest.mark.parametrize("text, gold", [*BARE.items(), *BRACES.items(), *((text, "5") for text in PROSE)])
def test_a_box_is_read_right(text, gold):
    assert last_boxed(text) == gold


@pytest.mark.parametrize("text", NONE)
def test_no_box_no_gold(text):
    assert last_boxed(text) is None
    with pytest.raises(DataError, match="f:1: "):
        math_problem({"problem": "?", "solution": text}, "f:1")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", [
    "\\boxed " * 20_000, "\\boxed 1" * 20_000, "\\boxed{" * 20_000, "\\boxed " + "{" * 50_000,
    "\\boxed 1" + " " * 50_000 + "1",
    "\\boxed 1" + ".," * 30_000 + "x", "\\boxed 1" + "{a" * 50 + "}" * 20 + "{" * 5_000, "\\boxed " + "\\" * 50_000])
def test_long_text_takes_no_time(text):
    last_boxed(text)


COMMAS = {"1,080": "1080", "-1,080": "-1080", "$1,234,567": "$1234567", "12,345.67": "12345.67",
          "1,080 dollars": "1080 dollars",
          "1,2,3": "1,2,3", "12,34": "12,34", "1,00,000": "1,00,000", "1,0000": "1,0000", "1,234,5": "1,234,5",
          "0,123": "0,123", "(1,2)": "(1,2)", "1, 2, 3": "1, 2, 3", "1,000, 2,000": "1000, 2000",
          "1080": "1080", "2.5": "2.5"}


@pytest.mark.parametrize("written, gold", COMMAS.items())
def test_only_commas_between_thousands_go(written, gold):
    assert join_thousands(written) == gold
    assert gsm8k_problem({"question": "?", "answer": f"steps\n#### {written}"}).ground_truth == gold


# JSON as it stands in the file, because Python's json writes some of these as something else
VALUES = ["NaN", "Infinity", "-Infinity", "1e999", "true", "false", "[5]", '{"value": 5}', '"\\ud800"', '"5\\udc00"',
          '"nan"', '"NaN"', '"-nan"', '"inf"', '"Infinity"', '"+inf"', '"-infinity"', '"- inf"', '"$nan$"',
          '"\\\\text{nan}"', '"$-\\\\text{ Inf }$"', '"\\\\mathrm{NaN}"', '"{}"', '"$$"',
          '"nan."', '"(nan)"', '"\\\\textbf{inf}"', '"\\\\operatorname{nan}"', '"\\\\boxed{NaN}"', '"\\\\(inf\\\\)"', '"−inf"',
          '"\\\\left(\\\\text{nan}\\\\right)"', '"\\uff4e\\uff41\\uff4e"', '"nan\\u200b"', '"\\\\$inf"', '"nan%"', '"±inf"',
          '""', '"  "', "9" * 5_000, '"' + "9" * 5_000 + '"', "-" + "9" * 4_301, "[" * 200_000 + "]" * 200_000]
FORMATS = {  # a record with the gold left open, and the reader
    "math answer": ('{"problem": "?", "answer": GOLD}', read_math),
    "math expected_answer": ('{"problem": "?", "expected_answer": GOLD, "answer": "5"}', read_math),
    "math solution": ('{"problem": "?", "solution": GOLD}', read_math),
    "gsm8k": ('{"question": "?", "answer": GOLD}', read_gsm8k),
    "trace": ('{"problem": "?", "reasoning_trace": "x</think> <answer>5</answer>", "expected_answer": GOLD}',
              read_traces),
    "prompt trace": ('{"prompt": "?", "response": "5", "ground_truth": GOLD}', read_traces)}


@pytest.mark.parametrize("record, read", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:12])
def test_values_that_are_no_gold_are_refused_in_their_line(tmp_path, value, record, read):
    file = tmp_path / "set.jsonl"
    good = record.replace("GOLD", json.dumps("#### 5 \\boxed{5}"))
    file.write_text(f"{good}\n\n{record.replace('GOLD', value)}\n")
    with pytest.raises(DataError) as error:
        read(file)
    assert f"{file}:3: " in str(error.value) and len(str(error.value)) < 400
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("end", ["nan", "NaN", "-nan", "inf", "$infinity$", "+Inf", r"-\text{inf}", "", " ", "5\nand a note", "9" * 5_000])
def test_results_of_gsm8k_that_are_none(end):
    with pytest.raises(DataError, match="f:3: "):
        gsm8k_problem({"question": "?", "answer": f"steps\n#### {end}"}, "f:3")


def test_boxes_that_hold_no_gold():
    for content in ("nan", "inf", "-infinity", r"\text{nan}", r"-\mathrm{Inf}", "9" * 5_000):
        with pytest.raises(DataError, match="f:3: the answer is"):
            math_problem({"problem": "?", "solution": f"\\boxed{{{content}}}"}, "f:3")


def test_numbers_from_python_are_refused_too():
    for number in (float("nan"), float("inf"), 10 ** 5_000, True):
        with pytest.raises(DataError, match="f:3: field 'answer' must hold"):
            math_problem({"problem": "?", "answer": number}, "f:3")


@pytest.mark.parametrize("value, gold", {
    "5": "5", "2.5": "2.5", "-0": "0", '"\\ud83d\\ude00"': "😀", "null": "7", "1e3": "1000.0", '"none"': "none",
    "9" * 4_000: "9" * 4_000, '"\\\\infty"': "\\infty",
    '"-\\\\infty"': "-\\infty", '"(-\\\\infty, 5]"': "(-\\infty, 5]", '"no information"': "no information",
    '"-"': "-", '"\\\\text{info}"': "\\text{info}", '"nano"': "nano",
    '"\\\\{\\\\}"': "\\{\\}", '"infinitely many"': "infinitely many", '"Infinity War"': "Infinity War", '"∞"': "∞",
    '"\\\\left\\\\{\\\\right\\\\}"': "\\left\\{\\right\\}", '"\\\\mathbb{R}"': "\\mathbb{R}", '"\\\\inf"': "\\inf"}.items(), ids=lambda text: text[:12])
def test_what_stays_accepted(tmp_path, value, gold):
    file = tmp_path / "set.jsonl"
    record = '{"problem": "?", "answer": VALUE, "solution": "\\\\boxed{7}", "level": NaN}'
    file.write_text(record.replace("VALUE", value))
    assert [p.ground_truth for p in read_problems(file)] == [gold]


@pytest.mark.parametrize("field", ["question", "answer"])
def test_half_a_character(tmp_path, field):
    records = [{"question": "?", "answer": "😀\n#### 5"}, {"question": "?", "answer": "#### 5"}]
    records[1][field] = "\ud83d " + records[1][field]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match=f"set.jsonl:2: field '{field}' holds half a character"):
        read_gsm8k(file)


def test_half_a_character_elsewhere():
    half = "x\udfff"
    for record in ({"problem": half, "answer": "5"}, {"problem": "?", "answer": "5", "solution": half}):
        with pytest.raises(DataError, match="f:1: field .* holds half a character"):
            math_problem(record, "f:1")
    for record in ({"prompt": half, "response": "5"}, {"prompt": "?", "response": half},
                   {"problem": "?", "reasoning_trace": half, "expected_answer": "5"}):
        with pytest.raises(DataError, match="f:1: field .* holds half a character"):
            trace_record(record, "f:1")
    with pytest.raises(DataError):
        _trace_problem({"problem": half, "reasoning_trace": "x", "expected_answer": "5"})


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"5\\ud800"', "true", "[5]", '{"value": 5}'])
@pytest.mark.parametrize("field", ["extracted_answer", "expected_answer", "problem", "reasoning_trace"])
def test_fields_of_traces_that_are_no_text(tmp_path, field, value):
    good = {"problem": "?", "reasoning_trace": "x</think>", "extracted_answer": 5, "expected_answer": "5"}
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {field: "VALUE"}).replace('"VALUE"', value))
    with pytest.raises(DataError, match=f"traces.jsonl:2: field '{field}' "):
        read_traces(file)


def test_what_a_trace_may_leave_out():
    trace = {"problem": "?", "reasoning_trace": "x", "expected_answer": "5"}
    for extracted, read in [({}, None), ({"extracted_answer": None}, None), ({"extracted_answer": 5}, "5"),
                            ({"extracted_answer": ""}, ""), ({"extracted_answer": "nan"}, "nan")]:  # the model's word
        assert trace_record(trace | extracted)["extracted_answer"] == read


@pytest.mark.parametrize("torn_ok", [False, True])
@pytest.mark.parametrize("line", ["5", "[]", "null", '"text"', "true", '[{"a": 1}]'])
def test_lines_that_are_no_objects_are_named(tmp_path, line, torn_ok):
    for text in (f'{{"a": 1}}\n{line}\n{{"a": 2}}\n', f'{{"a": 1}}\n{line}'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(DataError, match="rows.jsonl:2: expected a JSON object, found "):
            read_jsonl(tmp_path / "rows.jsonl", torn_ok)


BROKEN = {"brackets": ("[" * 200_000 + "]" * 200_000, "nested too deeply"), "digits": ("9" * 5_000, "more digits"),
          "objects": ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
          "unclosed": ('{"a": 1', "not valid JSON"), "quotes": ("{'a': 1}", "not valid JSON")}


@pytest.mark.parametrize("bad, says", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("array", [False, True])
def test_broken_json_says_where(tmp_path, bad, says, array):
    file = tmp_path / "set.json"
    good = '{"problem": "?", "answer": 5}'
    file.write_text(f"[{good},\n{good},\n{bad},\n{good}]" if array else f"{good}\n{good}\n{bad}\n")
    for read in (read_records, read_jsonl, read_problems)[::2 if array else 1]:
        with pytest.raises(DataError, match=says) as error:
            read(file)
        line = int(str(error.value).removeprefix(f"{file}:").split(":")[0])
        assert line == 3 or (array and line == 4 and bad == '{"a": 1')  # an open brace is noticed where the next begins


def test_bytes_that_are_no_text_say_the_line(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_bytes(b'{"problem": "?", "answer": 5}\n{"problem": "\xff", "answer": 5}\n')
    with pytest.raises(DataError, match="set.jsonl:2: not UTF-8"):
        read_problems(file)
    file.write_bytes(b'\xef\xbb\xbf{"problem": "?", "answer": 5}\r\n\r\n{"problem": "?", "answer": 6}\r\n')
    assert [p.ground_truth for p in read_problems(file)] == ["5", "6"]


def test_an_array_says_the_item(tmp_path):
    file = tmp_path / "set.json"
    file.write_text('[{"problem": "?", "answer": 5},\n {"problem": "?", "answer": NaN}]')
    with pytest.raises(DataError, match="set.json: item 2: field 'answer' must hold .* not nan"):
        read_math(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataMissing, match="no such file"):
        read_problems(tmp_path / "no.jsonl")


def command(*args):
    env = os.environ | {"PYTHONPATH": str(repo_root()), "NO_COLOR": "1", "COLUMNS": "100"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("module", ["data", "data_sets"])
def test_commands_by_both_names(module, tmp_path):
    run = lambda *args: command("-m", f"cs336_alignment.{module}", *args)
    shipped = str(repo_root() / "data" / "gsm_symbolic")
    done = run("verify", shipped)
    assert (done.returncode, done.stdout) == (0, "train.jsonl: OK\ntest.jsonl: OK\nheldout.jsonl: OK\n")
    for wrong in (["verify", str(tmp_path)], ["get", "gsm9k"], ["make", "gsm8k"], ["verify"], ["gets"]):
        done = run(*wrong)
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
        assert wrong in (["verify"], ["gets"]) or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)
    assert "No such command 'gets'" in run("gets").stderr


def test_the_module_runs_as_a_script_file(tmp_path):
    for module in ("data", "data_sets"):
        done = command(str(repo_root() / "cs336_alignment" / f"{module}.py"), "verify", str(tmp_path))
        assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'SHA256SUMS'}: no such file\n")


def test_help_does_not_wait_for_torch():
    done = command("-X", "importtime", "-m", "cs336_alignment.data", "--help")
    assert done.returncode == 0 and "verify" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported and not {"torch", "transformers", "huggingface_hub", "pyarrow"} & imported


def test_names_of_models_come_without_torch():
    done = command("-c", "import sys\nfrom cs336_alignment.models import TRACKS, load_policy, trained_policies\n"
                         "trained_policies(); print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))")
    assert done.stdout == "set()\n"
