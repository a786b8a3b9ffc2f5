"""`adapters.py` as the course's public tests call it: relative import, keyword names, shapes, values computed here."""
import hashlib
import inspect

import numpy as np
import pytest
import torch

from . import adapters

HOOKS = {  # hook: its arguments, in the course's order
    "run_tokenize_prompt_and_output": "prompt_strs output_strs tokenizer",
    "run_compute_entropy": "logits",
    "run_get_response_log_probs": "model input_ids labels return_token_entropy",
    "run_masked_normalize": "tensor mask normalize_constant dim",
    "run_sft_microbatch_train_step": "policy_log_probs response_mask gradient_accumulation_steps normalize_constant",
    "run_compute_group_normalized_rewards":
        "reward_fn rollout_responses repeated_ground_truths group_size advantage_eps normalize_by_std",
    "run_compute_naive_policy_gradient_loss": "raw_rewards_or_advantages policy_log_probs",
    "run_compute_grpo_clip_loss": "advantages policy_log_probs old_log_probs cliprange",
    "run_compute_policy_gradient_loss":
        "policy_log_probs loss_type raw_rewards advantages old_log_probs cliprange",
    "run_masked_mean": "tensor mask dim",
    "run_grpo_microbatch_train_step": "policy_log_probs response_mask gradient_accumulation_steps loss_type "
        "raw_rewards advantages old_log_probs cliprange constant_normalize_factor",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_takes_the_courses_arguments(hook):
    assert list(inspect.signature(getattr(adapters, hook)).parameters) == HOOKS[hook].split()


def draw(seed: int = 42) -> dict:
    "Two responses of ten places; advantages in a column, as the course's fixtures have them."
    g = torch.Generator().manual_seed(seed)
    log_probs, rewards = torch.randn(2, 10, generator=g), torch.rand(2, 1, generator=g)
    return {"policy_log_probs": log_probs, "old_log_probs": log_probs + torch.randn(2, 10, generator=g),
            "raw_rewards": rewards, "advantages": rewards - rewards.mean(0),
            "response_mask": torch.rand(2, 10, generator=g) > 0.5}


def hash_reward(response: str, ground_truth: str) -> dict[str, float]:
    reward = int(hashlib.sha256(response.encode()).hexdigest(), 16) % 10 / 10
    return {"reward": reward, "format_reward": reward, "answer_reward": reward}


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_group_normalized_rewards(normalize_by_std):
    responses = [f"hmm I think the answer is {i}" for i in range(8)]
    advantages, raw, metadata = adapters.run_compute_group_normalized_rewards(
        reward_fn=hash_reward, rollout_responses=responses, repeated_ground_truths=["42"] * 8, group_size=4,
        advantage_eps=1e-6, normalize_by_std=normalize_by_std)
    expected = np.array([hash_reward(r, "")["reward"] for r in responses])
    np.testing.assert_allclose(raw, expected, rtol=1e-6)
    groups = expected.reshape(2, 4)
    centred = groups - groups.mean(1, keepdims=True)
    scale = groups.std(1, ddof=1, keepdims=True) + 1e-6 if normalize_by_std else 1
    np.testing.assert_allclose(advantages, (centred / scale).flatten(), atol=1e-5)
    assert isinstance(metadata, dict)


def clip_loss(x: dict, cliprange: float) -> np.ndarray:
    "GRPO-Clip in numpy."
    A, ratio = x["advantages"].numpy(), np.exp((x["policy_log_probs"] - x["old_log_probs"]).numpy())
    return -np.minimum(ratio * A, np.clip(ratio, 1 - cliprange, 1 + cliprange) * A)


@pytest.mark.parametrize("cliprange", [0.1, 0.5, 10.0])
def test_losses(cliprange):
    x = draw()
    arguments = {k: x[k] for k in ("advantages", "policy_log_probs", "old_log_probs")} | {"cliprange": cliprange}
    loss, metadata = adapters.run_compute_grpo_clip_loss(**arguments)
    np.testing.assert_allclose(loss, clip_loss(x, cliprange), rtol=1e-5)
    assert isinstance(metadata, dict)
    naive = adapters.run_compute_naive_policy_gradient_loss(raw_rewards_or_advantages=x["raw_rewards"],
                                                            policy_log_probs=x["policy_log_probs"])
    np.testing.assert_allclose(naive, -(x["raw_rewards"] * x["policy_log_probs"]), rtol=1e-6)
    expected = {"no_baseline": naive, "reinforce_with_baseline": -x["advantages"] * x["policy_log_probs"],
                "grpo_clip": loss, "grpo_no_clip": -x["advantages"] * (x["policy_log_probs"] - x["old_log_probs"]).exp()}
    for loss_type, value in expected.items():
        got, _ = adapters.run_compute_policy_gradient_loss(
            loss_type=loss_type, raw_rewards=x["raw_rewards"], **arguments)
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("constant", [None, 42.0])
@pytest.mark.parametrize("calls", [1, 10])  # gradients add up, as in the course's 10-step test
def test_microbatch_train_step(calls, constant):
    x, steps = draw(), 2
    leaf = x["policy_log_probs"].clone().requires_grad_()
    extra = {} if constant is None else {"constant_normalize_factor": constant}
    for _ in range(calls):
        loss, metadata = adapters.run_grpo_microbatch_train_step(
            policy_log_probs=leaf, response_mask=x["response_mask"], gradient_accumulation_steps=steps,
            loss_type="grpo_clip", raw_rewards=x["raw_rewards"], advantages=x["advantages"],
            old_log_probs=x["old_log_probs"], cliprange=0.1, **extra)
    mask, token_loss = x["response_mask"].numpy(), clip_loss(x, 0.1)
    divisor = (mask.sum(1) if constant is None else constant) * 2 * steps
    np.testing.assert_allclose(loss, ((token_loss * mask).sum(1) / divisor).sum(), rtol=1e-5)
    A, ratio = x["advantages"].numpy(), np.exp((x["policy_log_probs"] - x["old_log_probs"]).numpy())
    held = ((A > 0) & (ratio > 1.1)) | ((A < 0) & (ratio < 0.9))
    slope = np.where(held | ~mask, 0, -ratio * A) / np.reshape(divisor * np.ones(2), (2, 1))
    np.testing.assert_allclose(leaf.grad, calls * slope, rtol=1e-4, atol=1e-7)
    assert 0 < held[mask].mean() < 1 and isinstance(metadata, dict)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_masked_mean_and_normalize_in_three_dimensions(dim):
    g = torch.Generator().manual_seed(0)
    tensor, mask = torch.randn(2, 10, 100, generator=g), torch.rand(2, 10, 100, generator=g) > 0.5
    total = (tensor * mask).numpy().sum(dim)
    with np.errstate(invalid="ignore"):
        mean = total / mask.numpy().sum(dim)
    keywords = {} if dim is None else {"dim": dim}
    np.testing.assert_allclose(adapters.run_masked_mean(tensor=tensor, mask=mask, **keywords), mean, atol=1e-5)
    normalized = adapters.run_masked_normalize(tensor=tensor, mask=mask, dim=dim, normalize_constant=42.0)
    np.testing.assert_allclose(normalized, total / 42, atol=1e-5)
