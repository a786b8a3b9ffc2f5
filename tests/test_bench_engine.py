"""bench/engine_throughput.py: it answers at once, measures nothing without a GPU, and says when a part failed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import engine_throughput


def run(*args, flags=()):
    """The bench in a process that sees no GPU."""
    return subprocess.run([sys.executable, *flags, BENCH / "engine_throughput.py", *map(str, args)], text=True,
                          capture_output=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("args, code, words", [(["--help"], 0, "--small"), (["--only", "bear"], 2, "no part bear; there are bare,"),
                                               (["--repeats", "many"], 2, "invalid int value: 'many'")])
def test_help_and_typos_are_answered_before_torch_is_imported(args, code, words):
    done = run(*args, flags=["-X", "importtime"])
    assert done.returncode == code and words in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and not imported & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("args", [[], ["--small"], ["--out", "new.json"],
                                  ["--small", "--out", engine_throughput.ROOT / "bench/../results/bench/engine_throughput.json"]])
def test_without_a_gpu_it_is_refused_in_a_line_and_nothing_is_written(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = engine_throughput.PUBLISHED.read_bytes()
    done = run(*args)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "no GPU here" in done.stderr
    assert engine_throughput.PUBLISHED.read_bytes() == before and not list(tmp_path.iterdir())


def test_small_results_are_never_published():
    options = engine_throughput.parse(["--small"])
    for device in ("cpu", "cuda"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_throughput, "DEVICE", device)
            assert "--out" in engine_throughput.refusal(options)
            options.out = Path("other.json")
            assert engine_throughput.refusal(options) is None
            options.out = engine_throughput.PUBLISHED


def test_small_runs_anywhere(tmp_path):
    out = tmp_path / "small.json"
    done = run("--small", "--out", out, "--only", "transformers_engine")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert (result["gpu"], result["model"], result["failed"]) == ("CPU", "micro", {})
    assert list(result["tokens_per_s"]) == ["TransformersEngine, batch 128"] and list(tmp_path.iterdir()) == [out]


def test_a_part_that_fails_is_the_exit_code_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def apart(options, name):
        failed = {name: "no GPU left"} if name == "bare" else {}
        return dict(summary={name: 1.0}, tokens_per_s={}, failed=failed)

    monkeypatch.setattr(engine_throughput, "run_apart", apart)
    out = tmp_path / "small.json"
    out.write_text('{"summary": {"kept": 2.0}, "tokens_per_s": {}, "failed": {"step_cost": "of another call"}}')
    call = lambda only: engine_throughput.main(engine_throughput.parse(["--small", "--out", str(out), "--only", only]))
    assert call("bare,replicas") == 1
    assert "failed parts: bare\n" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["summary"] == {"kept": 2.0, "bare": 1.0, "replicas": 1.0} and result["failed"]["bare"] == "no GPU left"
    assert call("replicas") == 0  # what failed in another call is not this one's exit code


def test_a_part_whose_process_dies_has_failed(tmp_path):
    options = engine_throughput.parse(["--small", "--out", str(tmp_path / "o.json"), "--only", "transformers_engine",
                                       "--model", str(tmp_path / "none")])
    stored = engine_throughput.run_apart(options, "transformers_engine")
    assert stored["failed"] == {"transformers_engine": "the process ended with: 1"}
