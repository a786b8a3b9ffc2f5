"""bench/grpo_step.py: it refuses what would spoil a measured file, and a part that fails leaves the others."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import grpo_step

STORED = grpo_step.STORED
needs_no_gpu = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@needs_no_gpu
@pytest.mark.parametrize("arguments, message", [([], "no GPU here"), (["--small"], "--small --out FILE"),
                                                (["--only", "both"], "--only is pocket or course")])
def test_it_refuses_in_one_line_and_writes_nothing(arguments, message):
    before = STORED.read_bytes()
    done = subprocess.run([sys.executable, BENCH / "grpo_step.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert STORED.read_bytes() == before


def test_help_is_quick():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import grpo_step; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, str(BENCH)], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("saves", [0, 1])
def test_a_setting_that_fails_keeps_its_own_rows_and_no_older_ones(tmp_path, monkeypatch, saves):
    def fails(small, replicas, steps, vllm, save):
        for _ in range(saves):
            save({"variants": [{"variant": "new"}]})
        raise RuntimeError("no GPU left")

    monkeypatch.setattr(grpo_step, "course", fails)
    out = tmp_path / "step.json"
    out.write_text('{"pocket": {"variants": ["kept"]}, "course": {"variants": ["old"]}}')
    assert grpo_step.measure_all(out, True, 3, 1, "course", {}) == 1
    result = json.loads(out.read_text())
    assert result["pocket"]["variants"] == ["kept"] and "no GPU left" in result["course"]["error"]
    assert result["course"].get("variants", []) == [{"variant": "new"}] * saves


def test_a_variant_that_fails_is_an_exit_status_too(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_step, "pocket", lambda small, replicas, steps, vllm, save: save({"variants": [{"error": "x"}]}))
    assert grpo_step.measure_all(tmp_path / "step.json", True, 3, 1, "pocket", {}) == 1
    monkeypatch.setattr(grpo_step, "pocket", lambda small, replicas, steps, vllm, save: save({"variants": [{"step_s": 1}]}))
    assert grpo_step.measure_all(tmp_path / "step.json", True, 3, 1, "pocket", {}) == 0


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_rewards_leave_the_wanted_share_with_an_advantage(share):
    rewards = grpo_step.RandomRewards(256, 8, share)
    given = torch.tensor([rewards("", "")["reward"] for _ in range(256)]).view(32, 8)
    mixed = (given.mean(1) == 0.5).float().mean().item()
    assert abs(mixed - share) < 0.02 and given.sum() == 4 * round(share * 32)
