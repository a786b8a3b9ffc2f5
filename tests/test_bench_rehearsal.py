"""bench/dress_rehearsal.py: it refuses what would spoil a measured file; every command's words are its own; one runs, small."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import dress_rehearsal

from cs336_alignment.grpo_experiments import ABOUT, variants


@pytest.mark.parametrize("arguments, message", [([], "no GPU here"), (["--small"], "--small --out FILE"),
                                                (["--only", "sleep"], "no command sleep; there are: zero-shot, sft")])
def test_it_refuses_in_one_line_and_writes_nothing(arguments, message):
    done = subprocess.run([sys.executable, BENCH / "dress_rehearsal.py", *arguments], capture_output=True, text=True,
                          env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not dress_rehearsal.STORED.exists() or json.loads(dress_rehearsal.STORED.read_text())["small"] is False


def test_every_command_of_the_course_is_rehearsed_with_a_variant_it_has():
    assert set(ABOUT) <= set(dress_rehearsal.COMMANDS)
    for name in ABOUT:
        assert dress_rehearsal.COMMANDS[name][0].split()[-1] in variants(name, "course"), name


def test_a_small_rehearsal_trains(tmp_path):
    out = tmp_path / "rehearsal.json"
    done = subprocess.run([sys.executable, BENCH / "dress_rehearsal.py", "--small", "--out", out, "--only", "off-policy"],
                          capture_output=True, text=True)
    found = json.loads(out.read_text())["commands"]["off-policy"]
    assert done.returncode == 0 and found["steps"] == 2 and found["step_s"] > 0, done.stderr + str(found)
