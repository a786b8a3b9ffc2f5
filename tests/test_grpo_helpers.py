"""The GRPO helpers against an independent float64 re-implementation in plain loops: values and gradients."""
import math

import numpy as np
import pytest
import torch

from cs336_alignment import grpo_helper
from cs336_alignment.grpo_helper import (compute_group_normalized_rewards, compute_grpo_clip_loss,
                                         compute_naive_policy_gradient_loss, compute_policy_gradient_loss,
                                         group_normalize, grpo_microbatch_train_step, masked_mean)

LOSS_TYPES = ["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]
CONSTANTS = [None, 9.0]
EPS = 0.2


def batch(seed: int, B: int = 12, T: int = 7) -> dict:
    "Random inputs of one training step, float64; some responses have a single token, some ratios are far from 1."
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    start = (torch.rand(B, generator=g) * (T - lengths + 1)).long()
    position = torch.arange(T)
    log_probs = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    return {"policy_log_probs": log_probs,
            "response_mask": (position >= start[:, None]) & (position < (start + lengths)[:, None]),
            "old_log_probs": log_probs + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
            "raw_rewards": torch.randint(0, 2, (B, 1), generator=g).double(),
            "advantages": torch.randn(B, 1, generator=g, dtype=torch.float64)}


def reference_token(loss_type: str, r: float, A: float, logp: float, old: float) -> tuple[float, float]:
    "(loss, d loss / d logp) of one token, from the handout's formulas, case by case."
    if loss_type == "no_baseline":
        return -r * logp, -r
    if loss_type == "reinforce_with_baseline":
        return -A * logp, -A
    ratio = math.exp(logp) / math.exp(old)
    if loss_type == "grpo_clip" and A > 0 and ratio > 1 + EPS:
        return -(1 + EPS) * A, 0.0
    if loss_type == "grpo_clip" and A < 0 and ratio < 1 - EPS:
        return -(1 - EPS) * A, 0.0
    return -ratio * A, -ratio * A


def reference_step(x: dict, loss_type: str, steps: float, constant: float | None) -> tuple[float, np.ndarray]:
    "Loss and gradient of one micro-batch, in loops."
    logp, old, mask = (x[k].numpy() for k in ("policy_log_probs", "old_log_probs", "response_mask"))
    B, T = logp.shape
    total, gradient = 0.0, np.zeros((B, T))
    for i in range(B):
        divisor = (sum(int(m) for m in mask[i]) if constant is None else constant) * B * steps
        for t in range(T):
            if mask[i, t]:
                r, A = x["raw_rewards"][i, 0].item(), x["advantages"][i, 0].item()
                loss, slope = reference_token(loss_type, r, A, logp[i, t], old[i, t])
                total += loss / divisor
                gradient[i, t] = slope / divisor
    return total, gradient


def step(x: dict, loss_type: str, steps: float = 1, constant: float | None = None, rows=slice(None), leaf=None):
    "grpo_microbatch_train_step on some rows; returns loss, the leaf that holds the gradient, and metadata."
    leaf = x["policy_log_probs"].clone().requires_grad_() if leaf is None else leaf
    loss, metadata = grpo_microbatch_train_step(
        policy_log_probs=leaf[rows], response_mask=x["response_mask"][rows], gradient_accumulation_steps=steps,
        loss_type=loss_type, raw_rewards=x["raw_rewards"][rows], advantages=x["advantages"][rows],
        old_log_probs=x["old_log_probs"][rows], cliprange=EPS, constant_normalize_factor=constant)
    return loss, leaf, metadata


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_step_agrees_with_the_reference(loss_type, constant, seed):
    x = batch(seed)
    loss, leaf, metadata = step(x, loss_type, 4, constant)
    expected, gradient = reference_step(x, loss_type, 4, constant)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, atol=1e-12)
    if loss_type == "grpo_clip":
        assert 0 < metadata["clip_fraction"] < 1  # so that both branches were visited


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_step_gradient_agrees_with_finite_differences(loss_type, constant):
    x, h = batch(7, B=4, T=5), 1e-6
    _, leaf, _ = step(x, loss_type, 2, constant)
    for i, t in np.ndindex(4, 5):
        nudge = torch.zeros(4, 5, dtype=torch.float64)
        nudge[i, t] = h
        up, down = (step(x | {"policy_log_probs": x["policy_log_probs"] + d}, loss_type, 2, constant)[0].item()
                    for d in (nudge, -nudge))
        assert leaf.grad[i, t].item() == pytest.approx((up - down) / (2 * h), abs=1e-8)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_loss_agrees_with_the_reference(loss_type):
    x = batch(11)
    r, A, logp, old = (x[name] for name in ("raw_rewards", "advantages", "policy_log_probs", "old_log_probs"))
    loss, metadata = compute_policy_gradient_loss(logp, loss_type, r, A, old, EPS)
    for i, t in np.ndindex(*loss.shape):
        numbers = (x.item() for x in (r[i, 0], A[i, 0], logp[i, t], old[i, t]))
        expected, slope = reference_token(loss_type, *numbers)
        assert loss[i, t].item() == pytest.approx(expected, abs=1e-12)
        if loss_type == "grpo_clip":
            assert metadata["clipped"][i, t].item() == (slope == 0)


def test_direct_functions_are_what_the_wrapper_calls():
    x = batch(12)
    arguments = {k: x[k] for k in ("advantages", "policy_log_probs", "old_log_probs")} | {"cliprange": EPS}
    naive = compute_naive_policy_gradient_loss(raw_rewards_or_advantages=x["advantages"],
                                               policy_log_probs=x["policy_log_probs"])
    assert torch.equal(naive, compute_policy_gradient_loss(loss_type="reinforce_with_baseline", **arguments)[0])
    clipped, _ = compute_grpo_clip_loss(**arguments)
    assert torch.equal(clipped, compute_policy_gradient_loss(loss_type="grpo_clip", **arguments)[0])


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batching_does_not_matter(loss_type, constant):
    x, B = batch(3), 12
    loss, whole, _ = step(x, loss_type, 1, constant)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 3, 4, 6):  # equal parts, as the handout's loop makes them, in any order
        leaf, losses = x["policy_log_probs"].clone().requires_grad_(), []
        for rows in order.split(size):
            losses.append(step(x, loss_type, B // size, constant, rows, leaf)[0].item())
        assert sum(losses) == pytest.approx(loss.item(), abs=1e-12)
        torch.testing.assert_close(leaf.grad, whole.grad, atol=1e-12, rtol=0)
    leaf = x["policy_log_probs"].clone().requires_grad_()
    for rows in order.split([1, 4, 7]):  # unequal parts, each weighted by its share of the batch
        step(x, loss_type, B / len(rows), constant, rows, leaf)
    torch.testing.assert_close(leaf.grad, whole.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_response_without_tokens_adds_nothing_but_counts(constant):
    x = batch(6)
    x["response_mask"][[0, 5]] = False
    loss, leaf, _ = step(x, "grpo_clip", 2, constant)
    filled = [i for i in range(12) if i not in (0, 5)]
    without, gradient = reference_step({k: v[filled] for k, v in x.items()}, "grpo_clip", 2, constant)
    assert loss.item() == pytest.approx(without * 10 / 12, abs=1e-12)
    assert (leaf.grad[[0, 5]] == 0).all()
    np.testing.assert_allclose(leaf.grad[filled].numpy(), gradient * 10 / 12, atol=1e-12)


@pytest.mark.parametrize("normalize_by_std", [True, False])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_advantages_agree_with_the_reference(group_size, normalize_by_std):
    rng = np.random.default_rng(group_size)
    rewards = np.concatenate([rng.integers(0, 2, 10 * group_size).astype(float), rng.normal(size=10 * group_size)])
    graded = iter(rewards)
    advantages, raw, metadata = compute_group_normalized_rewards(
        reward_fn=lambda response, ground_truth: {"reward": next(graded)}, rollout_responses=["x"] * len(rewards),
        repeated_ground_truths=["y"] * len(rewards), group_size=group_size, advantage_eps=1e-6,
        normalize_by_std=normalize_by_std)
    equal = 0
    for start in range(0, len(rewards), group_size):
        group = [float(r) for r in rewards[start:start + group_size]]
        mean = sum(group) / group_size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (group_size - 1))
        equal += len(set(group)) == 1
        for i, r in enumerate(group):
            expected = (r - mean) / (std + 1e-6 if normalize_by_std else 1)
            assert advantages[start + i].item() == pytest.approx(expected, abs=1e-5)
    assert raw.dtype == advantages.dtype == torch.float32
    np.testing.assert_allclose(raw.numpy(), rewards.astype(np.float32))
    assert metadata["reward_mean"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert metadata["reward_std"] == pytest.approx(rewards.std(), abs=1e-6)
    assert (metadata["reward_max"], metadata["reward_min"]) == pytest.approx((rewards.max(), rewards.min()), abs=1e-6)
    assert metadata["share_equal_groups"] == pytest.approx(equal / (len(rewards) // group_size), abs=1e-6)


@pytest.mark.parametrize("normalize_by_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("group_size", [2, 3, 7, 8])
def test_an_equal_group_contributes_exactly_nothing(group_size, reward, normalize_by_std):
    rewards = torch.cat([torch.full((group_size,), reward), torch.arange(group_size).float()])
    advantages, metadata = group_normalize(rewards, group_size, 1e-6, normalize_by_std)
    assert metadata["share_equal_groups"] == 0.5
    for loss_type in ("reinforce_with_baseline", "grpo_clip", "grpo_no_clip"):
        _, leaf, _ = step(batch(5, B=2 * group_size) | {"advantages": advantages.double()[:, None]}, loss_type)
        assert (leaf.grad[:group_size] == 0).all() and (leaf.grad[group_size:] != 0).any()


@pytest.mark.parametrize("constant", CONSTANTS)
def test_at_ratio_one_the_clip_is_reinforce(constant):
    x = batch(9)
    x["old_log_probs"] = x["policy_log_probs"].clone()
    gradients = [step(x, loss_type, 2, constant)[1].grad for loss_type in LOSS_TYPES[1:]]
    metadata = step(x, "grpo_clip")[2]
    assert torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-15, rtol=0)
    assert metadata["ratio"] == 1 and metadata["clip_fraction"] == 0


def test_no_gradient_flows_into_old_log_probs():
    x = batch(10)
    old = x["old_log_probs"].requires_grad_()
    for loss_type in ("grpo_clip", "grpo_no_clip"):
        step(x, loss_type)
        assert old.grad is None


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_masked_mean_agrees_with_the_reference(dim):
    g = torch.Generator().manual_seed(0)
    tensor, mask = torch.randn(3, 8, generator=g, dtype=torch.float64), torch.rand(3, 8, generator=g) > 0.5
    mask[:, 0] = False  # an empty column
    expected = np.ma.array(tensor.numpy(), mask=~mask.numpy()).mean(axis=dim)
    np.testing.assert_allclose(masked_mean(tensor, mask, dim).numpy(), np.ma.filled(expected, np.nan), atol=1e-12)


def test_errors_name_what_is_wrong():
    x = batch(1)
    with pytest.raises(ValueError, match="'no_baseline' needs raw_rewards"):
        compute_policy_gradient_loss(x["policy_log_probs"], "no_baseline", advantages=x["advantages"])
    with pytest.raises(ValueError, match="'grpo_clip' needs old_log_probs, cliprange"):
        compute_policy_gradient_loss(x["policy_log_probs"], "grpo_clip", advantages=x["advantages"])
    with pytest.raises(ValueError, match="unknown loss_type 'grpo'"):
        compute_policy_gradient_loss(x["policy_log_probs"], "grpo", advantages=x["advantages"])
    with pytest.raises(ValueError, match=r"advantages has shape \(12,\)"):  # would broadcast along tokens
        compute_policy_gradient_loss(torch.zeros(12, 12), "grpo_no_clip", advantages=torch.zeros(12),
                                     old_log_probs=torch.zeros(12, 12))
    with pytest.raises(ValueError, match="10 rewards cannot be split into groups of group_size = 4"):
        group_normalize(torch.zeros(10), 4)
    with pytest.raises(ValueError, match="group_size = 1"):
        group_normalize(torch.zeros(10), 1)


def test_the_seeds_spelling_imports_too():
    from cs336_alignment import gpro_helper

    assert set(gpro_helper.__all__) == set(grpo_helper.__all__)
    assert gpro_helper.grpo_microbatch_train_step is grpo_microbatch_train_step
