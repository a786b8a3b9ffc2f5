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


def test_signal_and_noise_are_those_of_all_scores_side_by_side():
    policy, _ = load_policy("micro", device="cpu")
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(5, 60, (n,), generator=draw).tolist()
    batches = [([Completion("", ids(5 + i % 7), [], "stop", prompt_token_ids=ids(9)) for i in range(16)],
                torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0] * 2).roll(k)) for k in range(3)]
    rows = [torch.stack([torch.cat([g.flatten() for g in score]) for score in S.scores(policy, c)]) for c, _ in batches]
    found = S.over_batches(policy, batches)
    squared, rewards = torch.cat(rows).square().sum(1), torch.cat([r for _, r in batches])
    assert found["squared_right"] == pytest.approx(squared[rewards == 1].mean().item(), rel=1e-5)
    assert found["best_baseline"] == pytest.approx(((rewards * squared).sum() / squared.sum()).item(), rel=1e-5)
    for name in S.weightings(rewards):
        m = torch.stack([(S.weightings(r)[name][:, None] * x).mean(0) for (_, r), x in zip(batches, rows)])
        signal2 = ((m @ m.T).sum() - (m @ m.T).trace()) / 6
        assert found["signal"][name] ** 2 == pytest.approx(abs(signal2.item()), rel=1e-3)
        assert found["noise"][name] ** 2 == pytest.approx(m.square().sum(1).mean().item() - signal2.item(), rel=1e-3)


@pytest.mark.parametrize("args, words", [(["--batches", "1"], "at least 2"), (["--track", "course"], "invalid choice")])
def test_mistakes_are_answered_at_once(args, words):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, BENCH / "score_noise.py", *args], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and time.perf_counter() - start < 3


def test_a_track_s_rows_leave_those_of_the_other(tmp_path, monkeypatch):
    out = tmp_path / "noise.json"
    out.write_text('{"pocket": 1}')
    monkeypatch.setattr(S, "OPTIONS", S.parse(["--track", "micro", "--seeds", "1", "--batches", "2", "--out", str(out)]))
    S.main()
    found = json.loads(out.read_text())
    assert found["pocket"] == 1 and found["micro"]["rows"][0]["batches"] == 2
