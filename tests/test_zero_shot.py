"""The zero-shot command as a user runs it: in a process of its own, killed in the middle, and called wrongly."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "cs336_alignment" / "evaluate_math.py")]
MICRO = ["--track", "micro", "--n", "96", "--engine", "transformers", "--seed", "3"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # two wait for each other wherever a core is busy


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_run_ends_with_the_file_of_the_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    to = lambda out: ["--out", str(out), "--root", str(out.with_suffix(""))]  # each its own run folder
    subprocess.run([*SCRIPT, *MICRO, *to(whole)], check=True, cwd=tmp_path, env=ONE_THREAD)
    assert lines(whole) == 96
    run = subprocess.Popen([*SCRIPT, *MICRO, *to(killed)], cwd=tmp_path, env=ONE_THREAD)
    while lines(killed) == 0 and run.poll() is None:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and 0 < lines(killed) < 96, lines(killed)
    kept = killed.read_bytes()
    again = subprocess.run([*SCRIPT, *MICRO, *to(killed)], check=True, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert killed.read_bytes() == whole.read_bytes() and killed.read_bytes().startswith(kept)
    assert "n = 96" in again.stdout
    [folder] = tmp_path.glob("killed/base_micro/*")
    assert (folder / "responses.jsonl").read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "killed.jsonl", "whole", "whole.jsonl"]


def test_help_and_a_slip():
    shown = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(option in shown for option in ("--track", "--data", "--prompt", "--seed", "--model"))
    slip = subprocess.run([*SCRIPT, "--data", "gsm8k"], capture_output=True, text=True,
                          env=os.environ | {"CS336_DATA": "/nonexistent", "CS336_ROOT": "/nonexistent"})
    assert slip.returncode == 2 and "Three ways to get it" in slip.stderr and "Traceback" not in slip.stderr
