"""bench/training_throughput.py: it answers at once, measures nothing without a GPU, and says when a part failed."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import training_throughput as T

SETTINGS = ["pocket", "course"]


def run(*args, flags=()):
    """The bench in a process that sees no GPU."""
    return subprocess.run([sys.executable, *flags, BENCH / "training_throughput.py", *map(str, args)], text=True,
                          capture_output=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("args, code, words", [
    (["--help"], 0, "--small"), (["--only", "cours"], 2, "invalid choice: 'cours'"),
    (["--steps", "0"], 2, "invalid choice: 0"), (["--smal", "x"], 2, "unrecognized arguments: x")])
def test_help_and_typos_are_answered_before_torch_is_imported(args, code, words):
    start = time.perf_counter()
    done = run(*args, flags=["-X", "importtime"])
    assert time.perf_counter() - start < 2
    assert done.returncode == code and words in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and not imported & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("args", [[], ["--small"], ["--out", "new.json"],
                                  ["--small", "--out", T.ROOT / "bench/../results/bench/training_throughput.json"]])
def test_without_a_gpu_it_is_refused_in_a_line_and_nothing_is_written(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = T.PUBLISHED.read_bytes()
    done = run(*args)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "no GPU here" in done.stderr
    assert T.PUBLISHED.read_bytes() == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_small_results_are_never_published(device, monkeypatch):
    monkeypatch.setattr(T, "DEVICE", device)
    assert "--out" in T.refusal(T.parse(["--small"]))
    assert T.refusal(T.parse(["--small", "--out", "other.json"])) is None
    assert (T.refusal(T.parse([])) is None) == (device == "cuda")


def test_small_runs_anywhere_and_its_file_has_the_published_form(tmp_path):
    out = tmp_path / "new" / "small.json"
    done = run("--small", "--out", out, "--steps", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    small, published = json.loads(out.read_text()), json.loads(T.PUBLISHED.read_text())
    assert list(small) == SETTINGS and done.stdout.endswith("failed: nothing\n")
    for name in SETTINGS:
        assert {*published[name]} <= {*small[name]}
        assert len(small[name]["variants"]) == 2 and all(v["tokens_per_s"] > 0 for v in small[name]["variants"])
    assert small["pocket"]["agreement"]["gradient_relative_difference"] < 1e-5


def good(small, steps, peak):
    """Stands for it."""
    return {"data": "none", "variants": [{"variant": "packed", "tokens_per_s": 1.0}]}


@pytest.mark.parametrize("part, names", [
    ({"variants": [{"variant": "packed", "error": "x"}, {"variant": "literal"}]}, "course, packed"),
    ({"agreement": {"variant": "agreement", "error": "x"}, "variants": []}, "course, agreement"), (None, "course")])
def test_a_part_that_fails_is_the_exit_code_and_the_others_are_kept(part, names, tmp_path, monkeypatch, capsys):
    def bad(small, steps, peak):
        """Fails."""
        return part or 1 / 0

    monkeypatch.setattr(T, "matrix_peak", lambda n: 1e12)
    monkeypatch.setattr(T, "pocket", good)
    monkeypatch.setattr(T, "course", bad)
    out = tmp_path / "small.json"
    out.write_text('{"another": {"kept": 1}}')
    options = T.parse(["--small", "--out", str(out)])
    assert T.main(options) == 1
    assert capsys.readouterr().out.endswith(f"failed: {names}\n")
    result = json.loads(out.read_text())
    assert result["another"] == {"kept": 1} and result["pocket"]["variants"] == good(1, 1, 1)["variants"]
    assert ("error" in result["course"]) == (part is None)
    only_pocket = T.parse(["--small", "--out", str(out), "--only", "pocket"])
    assert T.main(only_pocket) == 0  # what failed in another call is not this one's exit code


def test_a_variant_that_raises_becomes_a_row_with_its_error(capsys):
    rows = []
    T.attempt(rows, "packed", lambda: 1 / 0)
    assert rows == [{"variant": "packed", "error": "ZeroDivisionError: division by zero"}]
    assert T.failures("pocket", {"variants": rows}) == ["pocket, packed"]
