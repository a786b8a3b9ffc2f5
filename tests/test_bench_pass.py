"""bench/training_pass.py: it answers at once, runs anywhere when small, keeps what fails apart and sees a wrong gradient."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import training_pass as T


def run(*args, flags=()):
    """The bench in a process that sees no GPU."""
    return subprocess.run([sys.executable, *flags, BENCH / "training_pass.py", *map(str, args)], text=True, capture_output=True,
                          timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("args, code, words", [(["--help"], 0, "--small"), (["--only", "cours"], 2, "not 'cours'"),
                                               (["--turns", "0"], 2, "--turns"), (["--smal"], 2, "--smal")])
def test_help_and_typos_are_answered_before_torch_is_imported(args, code, words):
    start = time.perf_counter()
    done = run(*args, flags=["-X", "importtime"])
    assert time.perf_counter() - start < 3 and done.returncode == code and words in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported and not imported & {"torch", "transformers"}


def test_without_a_gpu_it_is_refused_and_nothing_is_written():
    kept = T.STORED.read_bytes() if T.STORED.exists() else None
    done = run()
    assert done.returncode == 2 and "no GPU here" in done.stderr
    assert (T.STORED.read_bytes() if T.STORED.exists() else None) == kept


def test_small_runs_anywhere(tmp_path):
    done = run("--small", "--out", tmp_path / "pass.json", "--turns", 1, "--only", "pocket")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "pass.json").read_text())["pocket"]
    names = [row["variant"] for row in found["variants"] if not row["variant"].startswith("together")]
    assert {*names} | {*found["left_out"]} == {*T.VARIANTS} and found["left_out"]["attention: flash-attn 2"] == "needs a GPU"
    for row in found["variants"]:
        assert row["mfu"] > 0 and row["off"]["exact"]["gradient_off"] < 1e-4 and row["off"]["exact"]["loss_off"] < 1e-4
    assert found["variants"][0]["passes"] == 3 and found["products"][0]["tokens"] == 3 * 31


def one_shape(monkeypatch, **variants):
    """The result of a small shape with these variants only."""
    saved = {}
    monkeypatch.setattr(T, "VARIANTS", {"today": ({}, None), **{k: (v, None) for k, v in variants.items()}})
    T.one_shape("course", True, 1, 100, 1e12, "", saved.update)
    return {row["variant"]: row for row in saved["variants"]}


def test_a_variant_that_fails_is_stored_as_its_error_and_the_others_run(monkeypatch):
    rows = one_shape(monkeypatch, bad={"attention": "none"}, good={"max_logits": 1})
    assert "no attention 'none'" in rows["bad"]["error"] and rows["good"]["mfu"] > 0


def test_a_wrong_gradient_is_seen(monkeypatch):
    from cs336_alignment import packing as P
    forget = lambda model, hidden, labels, temperature=1.0: T.ORIGINAL(model, 1.01 * hidden, labels, temperature)
    monkeypatch.setattr(T, "liger_log_probs", forget)
    rows = one_shape(monkeypatch, wrong={"output": "liger"})
    assert rows["wrong"]["off"]["today"]["gradient_off"] > 1e-3 and rows["today"]["off"]["exact"]["gradient_off"] < 1e-5
    assert P.head_log_probs is not forget  # as it was


def test_what_gained_is_joined_the_best_of_each_kind():
    rows = [{"variant": name, "gradients_s": s} for name, s in
            [("today", 1.0), ("pass: twice the rows", 0.9), ("pass: three times the rows", 0.8), ("output: one slice", 0.995)]]
    assert T.joined(rows + [{"variant": "output: not compiled", "error": "x"}]) == ("pass: three times the rows", {"rows": 3})
    assert T.joined(rows[:1]) == ("", {})
    assert T.by_kind({"sm90_xmma_gemm_bf16": 2.0, "triton_poi_fused_silu": 1.0, "x": 0.5}) == {
        "matrix products": 2.0, "compiled, pointwise": 1.0, "other": 0.5}
