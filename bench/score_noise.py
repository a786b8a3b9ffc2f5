"""How large are the scores of right and of wrong responses, and how noisy is the gradient that rewards or advantages make of them (14)?

    python bench/score_noise.py                 # pocket: the four start policies, trained if they are not there
    python bench/score_noise.py --track micro --seeds 1   # five minutes on a CPU

A score is the gradient of a response's mean token log-prob, over all weights; one response a backward pass, in float32, and only sums are kept.
A batch's gradient m is the mean of weighted scores. Over B batches of a step's questions: signal² = mean of m·m' over pairs of batches, noise² = mean of ‖m‖² − signal².
Writes a row a start policy into the track's entry of results/bench/score_noise.json.
"""
import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "results/bench/score_noise.json"


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--track", choices=["micro", "pocket"], default="pocket")
    ap.add_argument("--seeds", type=int, default=4, help="start policies, and the seeds of their responses")
    ap.add_argument("--batches", type=int, default=16, help="of 256 responses: the first steps' of a run")
    ap.add_argument("--out", type=Path, default=STORED)
    options = ap.parse_args(argv)
    if options.batches < 2 or options.seeds < 1:
        ap.error("--batches: at least 2; --seeds: at least 1")
    return options


OPTIONS = parse(sys.argv[1:]) if __name__ == "__main__" else None  # before the slow imports: --help answers at once
sys.path.insert(0, str(ROOT))

import torch

from cs336_alignment.data import problem_sets
from cs336_alignment.drgrpo_grader import grade_batch, reward_fn_of
from cs336_alignment.grpo import sample_rollouts
from cs336_alignment.grpo_experiments import experiment_config
from cs336_alignment.inference import TransformersEngine
from cs336_alignment.models import cache_dir, load_policy
from cs336_alignment.runs import environment, write_text
from cs336_alignment.sft_helper import get_response_log_probs, padded_batch
from cs336_alignment.sft_math_reasoning import sft
from cs336_alignment.side_by_side import have_policy


def scores(policy, completions):
    """Each response's score, as a list of the weights' gradients (float32, the same tensors each time)."""
    for c in completions:
        batch = {k: v.to(policy.device) for k, v in padded_batch([c.prompt_token_ids], [c.token_ids], 0).items()}
        policy.zero_grad()
        log_probs = get_response_log_probs(policy, batch["input_ids"], batch["labels"])["log_probs"]
        log_probs[batch["response_mask"].bool()].mean().backward()
        yield [p.grad for p in policy.parameters()]


def batch_gradient(policy, completions, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, list]]:
    """‖score‖² of each response, (n,), and for each of the weights (n,) the mean of weighted scores."""
    squared, means = [], {name: [torch.zeros_like(p) for p in policy.parameters()] for name in weights}
    for i, score in enumerate(scores(policy, completions)):
        squared.append(sum(g.square().sum().item() for g in score))
        for name, w in weights.items():
            torch._foreach_add_(means[name], score, alpha=w[i].item() / len(w))
    return torch.tensor(squared), means


def weightings(rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    """What multiplies the scores; rewards: (n,), groups of 8 next to each other. Averaged over a response's tokens, as here, a baseline
    moves the expected gradient too (14), so each weighting's noise is compared with its own signal."""
    groups = rewards.view(-1, 8)
    return {"rewards": rewards, "rewards − the mean reward": rewards - rewards.mean(),
            "rewards − the group's mean, × 8/7": (groups - groups.mean(1, keepdim=True)).flatten() * 8 / 7}


def over_batches(policy, batches) -> dict:
    """Signal and noise of each weighting, and the sizes of scores. batches: pairs of completions and rewards (n,)."""
    squared, rewards, sums, lengths = [], [], {}, {}
    for completions, r in batches:
        sizes, means = batch_gradient(policy, completions, weightings(r))
        squared.append(sizes), rewards.append(r)
        for name, m in means.items():
            lengths.setdefault(name, []).append(sum(g.square().sum().item() for g in m))
            torch._foreach_add_(sums.setdefault(name, [torch.zeros_like(g) for g in m]), m)
    B, squared, rewards = len(rewards), torch.cat(squared), torch.cat(rewards)
    signal2 = {name: (sum(g.square().sum().item() for g in total) - sum(lengths[name])) / (B * (B - 1)) for name, total in sums.items()}
    right, wrong = (squared[rewards == r].mean().item() for r in (1, 0))
    return {"batches": B, "responses": len(rewards), "mean_reward": rewards.mean().item(), "squared_right": right, "squared_wrong": wrong,
            "best_baseline": ((rewards * squared).sum() / squared.sum()).item(), "signal": {n: math.copysign(abs(x) ** 0.5, x) for n, x in signal2.items()},
            "noise": {n: (sum(lengths[n]) / B - x) ** 0.5 for n, x in signal2.items()}}


def measure(track: str, seed: int, batches: int) -> dict:
    """The row of one start policy."""
    config, start = experiment_config(track, "score_noise", {}, seed)
    if start:
        have_policy(start, sft, None, cache_dir() / "score_noise", compiled=torch.cuda.is_available())
    policy, tokenizer = load_policy(config.model, dtype="float32")
    engine = TransformersEngine(policy, tokenizer)
    problems, _ = problem_sets(config.train_data, config.eval_data, config.n_eval)

    def rollouts(step):
        completions, truths = sample_rollouts(config, engine, problems, step)
        graded = grade_batch(reward_fn_of(config.prompt), [c.text for c in completions], truths)
        return completions, torch.tensor([g["reward"] for g in graded])

    return {"seed": seed, "model": config.model, **over_batches(policy, map(rollouts, range(1, batches + 1)))}


def main() -> None:
    rows = []
    for seed in range(OPTIONS.seeds):
        rows.append(measure(OPTIONS.track, seed, OPTIONS.batches))
        print(rows[-1], flush=True)
    kept = json.loads(OPTIONS.out.read_text()) if OPTIONS.out.exists() else {}
    write_text(OPTIONS.out, json.dumps(kept | {OPTIONS.track: {"environment": environment(), "rows": rows}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
