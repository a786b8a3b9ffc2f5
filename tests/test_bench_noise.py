"""bench/score_noise.py: its sums are those of 14's matrix of scores, and mistakes in its options are answered at once."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import score_noise as S
from cs336_alignment.inference import Completion
from cs336_alignment.models import load_policy


def test_sums_of_scores_are_those_of_all_scores_side_by_side():
    policy, _ = load_policy("micro", device="cpu")
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(5, 60, (n,), generator=draw).tolist()
    completions = [Completion("", ids(5 + i % 7), [], "stop", prompt_token_ids=ids(9)) for i in range(16)]
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0] * 2)
    rows = torch.stack([torch.cat([g.flatten() for g in score]) for score in S.scores(policy, completions)])
    found = S.one_policy(policy, completions, rewards)
    squared = rows.square().sum(1)
    assert found["squared_right"] == pytest.approx(squared[rewards == 1].mean().item(), rel=1e-5)
    assert found["best_baseline"] == pytest.approx(((rewards * squared).sum() / squared.sum()).item(), rel=1e-5)
    advantages = (rewards.view(2, 8) - 0.25).flatten() * 8 / 7
    for name, w in [("rewards", rewards), ("rewards − the mean reward", rewards - 0.25), ("rewards − the group's mean, × 8/7", advantages)]:
        direct = ((w[:, None] * rows).var(0).sum() / 16).sqrt().item()
        assert found["noise"][name] == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("args, words", [(["--responses", "12"], "whole groups of 8"), (["--track", "course"], "invalid choice")])
def test_mistakes_are_answered_at_once(args, words):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, BENCH / "score_noise.py", *args], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and time.perf_counter() - start < 3


def test_a_track_s_rows_leave_those_of_the_other(tmp_path, monkeypatch):
    out = tmp_path / "noise.json"
    out.write_text('{"pocket": 1}')
    monkeypatch.setattr(S, "OPTIONS", S.parse(["--track", "micro", "--seeds", "1", "--responses", "16", "--out", str(out)]))
    S.main()
    found = json.loads(out.read_text())
    assert found["pocket"] == 1 and found["micro"]["rows"][0]["responses"] == 16
