"""The course's hook names, so that its public test files can be dropped beside this one and run."""

from cs336_alignment.dpo import compute_per_instance_dpo_loss
from cs336_alignment.grpo_helper import (compute_group_normalized_rewards, compute_grpo_clip_loss,
                                         compute_naive_policy_gradient_loss, compute_policy_gradient_loss,
                                         grpo_microbatch_train_step, masked_mean)
from cs336_alignment.packed_dataset import PackedSFTDataset, iterate_batches
from cs336_alignment.safety_eval import parse_gsm8k_response, parse_mmlu_response
from cs336_alignment.sft_helper import (compute_entropy, get_response_log_probs, masked_normalize,
                                        sft_microbatch_train_step, tokenize_prompt_and_output)

run_tokenize_prompt_and_output = tokenize_prompt_and_output
run_compute_entropy = compute_entropy
run_get_response_log_probs = get_response_log_probs
run_masked_normalize = masked_normalize
run_sft_microbatch_train_step = sft_microbatch_train_step
run_compute_group_normalized_rewards = compute_group_normalized_rewards
run_compute_naive_policy_gradient_loss = compute_naive_policy_gradient_loss
run_compute_grpo_clip_loss = compute_grpo_clip_loss
run_compute_policy_gradient_loss = compute_policy_gradient_loss
run_masked_mean = masked_mean
run_parse_mmlu_response = parse_mmlu_response
run_parse_gsm8k_response = parse_gsm8k_response
run_grpo_microbatch_train_step = grpo_microbatch_train_step
get_packed_sft_dataset = PackedSFTDataset
run_iterate_batches = iterate_batches
run_compute_per_instance_dpo_loss = compute_per_instance_dpo_loss
