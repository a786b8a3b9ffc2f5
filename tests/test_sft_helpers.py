"""The SFT helpers against an independent float64 re-implementation: numpy, loops over rows and tokens, no torch.nn."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import adapters
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM)

from cs336_alignment import packing as P, sft_helper as S

VOCAB = ["<pad>", "<eos>", *"abcdefghij"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def tokenizer(**special):
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def tiny(family="llama", **options):
    """A random model in float64, with grouped-query attention and an output layer tied to the embedding."""
    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen": (Qwen2Config, Qwen2ForCausalLM)}[family]
    torch.manual_seed(1)
    model = cls(config(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double()


def random_examples(n=7, seed=0, longest=9, side=False):
    rng = np.random.default_rng(seed)

    def ids(low):
        return rng.integers(2, 23, rng.integers(low, longest + 1)).tolist()

    rows = [P.Example(ids(1), ids(1)) for _ in range(n)]
    if side:
        rows = [replace(e, side={"weight": float(rng.normal()), "old": rng.normal(-2, 1, len(e.response_ids)).tolist()})
                for e in rows]
    return rows


def gradient(model):
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return g


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


# --- numpy, by loops

def np_log_softmax(row):
    peak = max(row)
    return row - peak - math.log(sum(math.exp(x - peak) for x in row))


def np_entropy(logits):
    flat = logits.reshape(-1, logits.shape[-1])
    return np.array([-sum(math.exp(x) * x for x in np_log_softmax(r)) for r in flat]).reshape(logits.shape[:-1])


def np_log_probs(logits, labels):
    return np.array([[np_log_softmax(r)[y] for r, y in zip(rows, ys)] for rows, ys in zip(logits, labels)])


def np_masked_normalize(x, mask, constant, dim):
    if dim is None:
        return sum(v for v, m in zip(x.flatten(), mask.flatten()) if m) / constant
    x, mask = np.moveaxis(x, dim, -1), np.moveaxis(mask, dim, -1)
    out = [sum(v for v, m in zip(x[i], mask[i]) if m) / constant for i in np.ndindex(x.shape[:-1])]
    return np.array(out).reshape(x.shape[:-1])


# --- the handout's functions

def test_tokenize_matches_a_loop():
    rng, tok = np.random.default_rng(0), tokenizer(pad_token="<pad>", eos_token="<eos>")
    words = [["".join(rng.choice(list("abcdefghij"), rng.integers(0, 8))) for _ in range(20)] for _ in range(2)]
    out = adapters.run_tokenize_prompt_and_output(prompt_strs=words[0], output_strs=words[1], tokenizer=tok)
    longest = max(len(p + o) for p, o in zip(*words))
    for i, (p, o) in enumerate(zip(*words)):
        ids = [VOCAB.index(c) for c in p + o] + [0] * (longest - len(p + o))
        mask = [False] * len(p) + [True] * len(o) + [False] * (longest - len(p + o))
        assert out["input_ids"][i].tolist() == ids[:-1]
        assert out["labels"][i].tolist() == ids[1:]
        assert out["response_mask"][i].tolist() == mask[1:]
    assert {t.shape for t in out.values()} == {(20, longest - 1)}
    assert out["response_mask"].dtype == torch.bool and out["input_ids"].dtype == torch.long


def test_tokenize_adds_no_special_tokens_and_pads_with_eos_if_it_must():
    tok = tokenizer(eos_token="<eos>", bos_token="<eos>", additional_special_tokens=[])
    out = S.tokenize_prompt_and_output(["ab", "a"], ["cd", "b"], tok)
    assert out["input_ids"].tolist() == [[2, 3, 4], [2, 3, 1]]
    with pytest.raises(ValueError, match="neither a pad nor an eos"):
        S.tokenize_prompt_and_output(["ab", "a"], ["cd", "b"], tokenizer())


@pytest.mark.parametrize("prompts, outputs, message", [
    (["a"], ["b", "c"], "1 prompts but 2 outputs"), ([], [], "no tokens"), ([""], [""], "no tokens")])
def test_tokenize_refuses(prompts, outputs, message):
    with pytest.raises(ValueError, match=message):
        S.tokenize_prompt_and_output(prompts, outputs, tokenizer(pad_token="<pad>"))


def test_entropy_matches_numpy():
    logits = 5 * torch.randn(3, 4, 50, dtype=torch.float64)
    close(adapters.run_compute_entropy(logits=logits), np_entropy(logits.numpy()))
    close(S.compute_entropy(logits + 1e4), np_entropy(logits.numpy()))
    assert S.compute_entropy(logits.bfloat16()).dtype == torch.float32
    big = torch.tensor([[1e5, 0.0, -1e5], [-torch.inf, 3.0, 3.0]], requires_grad=True)
    close(S.compute_entropy(big).detach(), [0, math.log(2)], 1e-6)
    S.compute_entropy(big).sum().backward()
    assert big.grad.isfinite().all()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_response_log_probs_match_numpy(with_entropy):
    logits, labels = 4 * torch.randn(3, 5, 30, dtype=torch.float64), torch.randint(0, 30, (3, 5))
    inputs = torch.randint(0, 30, (3, 5))

    def fake(input_ids):
        assert input_ids is inputs
        return SimpleNamespace(logits=logits)

    out = adapters.run_get_response_log_probs(model=fake, input_ids=inputs, labels=labels,
                                              return_token_entropy=with_entropy)
    close(out["log_probs"], np_log_probs(logits.numpy(), labels.numpy()))
    assert set(out) == {"log_probs", "token_entropy"} if with_entropy else {"log_probs"}
    if with_entropy:
        close(out["token_entropy"], np_entropy(logits.numpy()))


@pytest.mark.parametrize("dim", [None, 0, 1, 2, -1])
def test_masked_normalize_matches_numpy(dim):
    x, mask = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5) < 0.4
    expected = np_masked_normalize(x.numpy(), mask.numpy(), 7.0, dim)
    close(adapters.run_masked_normalize(tensor=x, mask=mask, dim=dim, normalize_constant=7.0), expected)
    close(S.masked_normalize(x.masked_fill(~mask, torch.nan), mask.float(), 7.0, dim), expected)


@pytest.mark.parametrize("constant", [1.0, 42.0])
def test_microbatch_step_matches_numpy(constant):
    lp, mask = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.rand(4, 6) < 0.5
    mask[2] = False  # an empty response
    loss, metadata = adapters.run_sft_microbatch_train_step(
        policy_log_probs=lp, response_mask=mask, gradient_accumulation_steps=3, normalize_constant=constant)
    rows = [-sum(v for v, m in zip(r, ms) if m) / constant for r, ms in zip(lp.tolist(), mask.tolist())]
    close(loss, sum(rows) / 4 / 3)
    close(lp.grad, np.where(mask, -1 / (constant * 4 * 3), 0.0))  # d loss / d log p
    close(metadata["response_tokens"], mask.sum())
    close(metadata["mean_log_prob"], np.mean(lp.detach().numpy()[mask.numpy()]))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_literal_gradients_do_not_depend_on_the_micro_batch(size):
    model, examples = tiny(), random_examples(6)
    expected_loss, expected, _ = padded_gradient(model, examples, [1 / (6 * 3.0)] * 6)
    rows = [e.prompt_ids for e in examples], [e.response_ids for e in examples]
    close(S.literal_gradients(model, *rows, size, normalize_constant=3.0), expected_loss)
    close(gradient(model), expected)
    with pytest.raises(ValueError, match="6 rows are no multiple of micro_batch_size=4"):
        S.literal_gradients(model, *rows, 4)


def test_microbatch_step_survives_nan_under_the_mask():
    lp = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    loss, _ = S.sft_microbatch_train_step(lp, torch.tensor([[True, False]]), 1)
    assert loss == 1 and lp.grad.tolist() == [[-1, 0]]


# --- responses that end

def test_examples_end_with_eos_once_if_asked():
    tok = tokenizer(pad_token="<pad>", eos_token="<eos>")
    plain = P.make_examples(["ab", "a"], ["cd", ""], tok)
    assert [e.response_ids for e in plain] == [[4, 5], []]
    examples = P.make_examples(["ab", "a", "b"], ["cd", "", "c<eos>"], tok, end=True)
    assert [e.response_ids for e in examples] == [[4, 5, 1], [1], [4, 1]]
    assert [e.prompt_ids for e in examples] == [[2, 3], [2], [3]]
    assert plain == P.make_examples(["ab", "a"], ["cd", ""], tok, end=False)


def test_without_eos_no_response_can_end():
    tok = tokenizer(pad_token="<pad>")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        P.make_examples(["a"], ["b"], tok, end=True)
    assert P.make_examples(["a"], ["b"], tok)[0].response_ids == [3]


def test_the_handouts_helper_adds_no_eos():
    out = S.tokenize_prompt_and_output(["ab"], ["cd"], tokenizer(pad_token="<pad>", eos_token="<eos>"))
    assert out["labels"].tolist() == [[3, 4, 5]]


# --- the fast path

@pytest.mark.parametrize("seed", range(20))
def test_bins_hold_every_row_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 100, rng.integers(1, 60)).tolist()
    bins = P.pack_rows(lengths, 120)
    sums = [sum(lengths[i] for i in b) for b in bins]
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert max(sums) <= 120 and min(sums) > 0 and all(b == sorted(b) for b in bins)
    assert len(bins) <= 1 + 1.5 * sum(lengths) / 120


def random_groups(seed):
    """Groups of 1 to 5 rows of one prompt, in any order; some responses are of one token."""
    rng = np.random.default_rng(seed)
    rows = [replace(e, response_ids=e.response_ids[:rng.integers(1, 9)]) for e in random_examples(20, seed)]
    rows = [replace(e, prompt_ids=rows[i - i % rng.integers(1, 6)].prompt_ids) for i, e in enumerate(rows)]
    return [rows[i] for i in rng.permutation(20)]


def shared_tokens(rows):
    """Tokens of a bin that has each prompt once."""
    prompts = {tuple(e.prompt_ids) for e in rows}
    return sum(map(len, prompts)) + sum(len(e.response_ids) - 1 for e in rows)


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_cut_into_the_fewest_bins_and_the_smallest_largest(seed):
    rows, multiple = random_groups(seed), seed % 3 + 1
    bins = P.pack_groups(rows, 40, multiple)
    filled = [b for b in bins if b]
    order = sum(bins, [])
    assert sorted(order) == list(range(len(rows))) and len(bins) % multiple == 0
    prompts = [tuple(rows[i].prompt_ids) for i in order]
    changes = sum(a != b for a, b in zip(prompts, prompts[1:]))
    assert changes == len(set(prompts)) - 1  # no group in two places
    size = [[shared_tokens([rows[i] for i in order[a:b]]) for b in range(len(order) + 1)] for a in range(len(order) + 1)]
    best = {(0, 0): 0}  # (rows, bins): the smallest largest bin, over all ways to cut this sequence
    for n, k in itertools.product(range(1, len(order) + 1), range(1, len(bins) + 1)):
        ways = [max(best[a, k - 1], size[a][n]) for a in range(n) if (a, k - 1) in best]
        best |= {(n, k): min(ways)} if ways else {}
    fewest = min(k for (n, k), largest in best.items() if n == len(order) and largest <= 40)
    assert len(bins) == -(-fewest // multiple) * multiple
    assert max(shared_tokens([rows[i] for i in b]) for b in filled) == min(best.get((len(order), k), 99) for k in range(1, len(bins) + 1))


@pytest.mark.parametrize("seed", range(10))
def test_a_prompt_once_a_group_changes_no_gradient_and_no_log_prob(seed, monkeypatch):
    model, weights = tiny("qwen" if seed % 2 else "llama"), np.random.default_rng(seed).normal(size=20).tolist()
    rows = [replace(e, side={"weight": w}) for e, w in zip(random_groups(seed), weights)]
    rows = [*rows[:5], P.Example([3], [], {"weight": 1.0}), *rows[5:]]  # an empty response is passed over
    seen = []
    monkeypatch.setattr(P, "hidden_states", lambda model, packed, call=P.hidden_states: seen.append(packed) or call(model, packed))
    found = {}
    for shared in (True, False):
        monkeypatch.setattr(P, "SHARE_PROMPTS", shared)
        for budget in (30, 1000):
            metrics = P.accumulate_gradients(model, rows, P.sft_loss, budget)
            log_probs = P.packed_log_probs(model, rows, budget)
            found[shared, budget] = metrics["loss"], gradient(model), torch.cat([torch.stack(pair) for pair in log_probs], dim=1)
    tokens = [packed.input_ids.numel() for packed in seen]
    once, each = shared_tokens([e for e in rows if e.response_ids]), sum(map(len, rows))
    for loss, g, scores in found.values():
        close(loss, found[False, 1000][0])
        close(g, found[False, 1000][1], 1e-6)  # RMSNorm rounds to float32
        close(scores, found[False, 1000][2], 1e-6)
    assert once in tokens and max(tokens) == each > once


def test_only_equal_prompts_are_shared():
    rows = [P.Example(ids, [9, 8, 7]) for ids in ([4, 5], [4, 6], [4], [4, 5], [4, 5, 9], (4, 5))]
    order = [0, 3, 5, 1, 2, 4]
    assert P.pack_groups(rows, 99) == [order]
    packed = P.pack([rows[i] for i in order], shared=True)
    assert packed.input_ids.tolist() == [[4, 5, 9, 8, 9, 8, 9, 8, 4, 6, 9, 8, 4, 9, 8, 4, 5, 9, 9, 8]]
    assert packed.cu_seq_lens.tolist() == [0, 4, 6, 8, 12, 15, 20] and packed.cu_seq_lens_k.tolist() == [0, 4, 8, 12, 16, 19, 24]
    assert P.pack(rows, shared=False).key_index is None and P.pack(rows[:3], shared=True).key_index is None


def padded_gradient(model, examples, weights):
    """Σ weight · −log p by a padded forward pass, picked out and summed in loops."""
    rows = [[*e.prompt_ids, *e.response_ids] for e in examples]
    longest = max(map(len, rows))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    log_p = model(ids).logits.log_softmax(-1)
    loss = 0
    for i, (e, w) in enumerate(zip(examples, weights)):
        for t in range(len(e.prompt_ids), len(rows[i])):
            loss = loss - w * log_p[i, t - 1, rows[i][t]]
    loss.backward()
    return loss.item(), gradient(model), log_p.detach()


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("max_tokens, max_logits", [(1000, 10**6), (20, 10**6), (40, 23 * 10), (17, 1)])
def test_packed_gradient_equals_padded(family, max_tokens, max_logits):
    model, examples = tiny(family), random_examples()
    loss, expected, _ = padded_gradient(model, examples, [1 / (7 * 3.0)] * 7)
    metrics = P.accumulate_gradients(model, P.sft_examples(examples, 3.0), P.sft_loss, max_tokens, max_logits)
    close(metrics["loss"], loss)
    close(gradient(model), expected)
    assert metrics["tokens"] == sum(map(len, examples))


def test_packed_log_probs_and_entropy_equal_padded():
    model, examples = tiny(), random_examples()
    examples[3] = replace(examples[3], response_ids=[])
    _, _, log_p = padded_gradient(model, examples, [1.0] * 7)
    for max_tokens in (1000, 20):
        for i, (e, (lp, h)) in enumerate(zip(examples, P.packed_log_probs(model, examples, max_tokens, 23 * 6))):
            n = len(e.prompt_ids)
            rows = log_p[i, n - 1:n - 1 + len(e.response_ids)]
            close(lp, [r[y] for r, y in zip(rows, e.response_ids)])
            close(h, np_entropy(rows.numpy()) if len(rows) else [])


def clipped(log_probs, entropy, side):
    """A loss like GRPO's, with per-row and per-token side data."""
    ratio = (log_probs - side["old"]).exp()
    cut = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * side["weight"], cut * side["weight"]), {"outside": (ratio != cut).float()}


def test_a_policy_gradient_loss_plugs_in():
    model, examples = tiny(), random_examples(side=True)
    rows = [[*e.prompt_ids, *e.response_ids] for e in examples]
    loss, outside, n = 0, 0, 0
    for e, row in zip(examples, rows):  # one row at a time, token by token
        log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for t, old in enumerate(e.side["old"], start=len(e.prompt_ids)):
            ratio, a = (log_p[t - 1, row[t]] - old).exp(), e.side["weight"]
            loss = loss - min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            outside, n = outside + (not 0.8 <= ratio <= 1.2), n + 1
    loss.backward()
    expected = gradient(model)
    metrics = P.accumulate_gradients(model, examples, clipped, max_tokens=30, max_logits=23 * 7)
    close(metrics["loss"], loss.item())
    close(gradient(model), expected)
    close(metrics["outside"], outside / n, 1e-6)


def test_a_loss_sees_whole_responses():
    model, examples = tiny(), random_examples()
    rows = [replace(e, side={"row": i, "n": len(e.response_ids)}) for i, e in enumerate(examples)]

    def whole(log_probs, entropy, side):
        for i in side["row"].unique():
            assert (side["row"] == i).sum() == side["n"][side["row"] == i][0]
        return log_probs, {}

    P.accumulate_gradients(model, rows, whole, max_tokens=40, max_logits=23 * 10)


def test_gradient_checkpointing_changes_nothing():
    model, batch = tiny(), P.sft_examples(random_examples())
    P.accumulate_gradients(model, batch, P.sft_loss)
    expected = gradient(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name in v6
    model.train()
    P.accumulate_gradients(model, batch, P.sft_loss, max_tokens=30)
    close(gradient(model), expected)


def test_train_step_equals_the_handouts_loop():
    model, examples = tiny(), random_examples(8)
    literal, packed, loop = (copy.deepcopy(model) for _ in range(3))
    optimizers = [P.make_optimizer(m, 1e-2) for m in (literal, packed, loop)]
    for step in range(3):
        for s in range(0, 8, 2):
            pair = examples[s:s + 2]
            rows = [[*e.prompt_ids, *e.response_ids] for e in pair]
            ids = torch.tensor([r + [0] * (max(map(len, rows)) - len(r)) for r in rows])
            at = torch.arange(1, ids.shape[1])
            mask = torch.stack([(at >= len(e.prompt_ids)) & (at < len(r)) for e, r in zip(pair, rows)])
            lp = S.get_response_log_probs(literal, ids[:, :-1], ids[:, 1:])["log_probs"]
            S.sft_microbatch_train_step(lp, mask, gradient_accumulation_steps=4, normalize_constant=5.0)
        norm = torch.nn.utils.clip_grad_norm_(literal.parameters(), 1.0)
        optimizers[0].step(), optimizers[0].zero_grad()
        batch = P.sft_examples(examples, 5.0)
        metrics = P.train_step(packed, optimizers[1], batch, P.sft_loss, max_tokens=30)
        close(metrics["grad_norm"], norm.item())
        rows = [e.prompt_ids for e in examples], [e.response_ids for e in examples]
        close(S.literal_step(loop, optimizers[2], *rows, 2, normalize_constant=5.0), metrics["loss"], 1e-8)
        assert all(p.grad is None for p in loop.parameters())
    for p, q, r in zip(literal.parameters(), packed.parameters(), loop.parameters()):
        close(p.detach(), q.detach(), 1e-8)
        close(p.detach(), r.detach(), 1e-8)


def test_the_default_weight_is_one_over_all_response_tokens():
    examples = random_examples()
    weights = {e.side["weight"] for e in P.sft_examples(examples)}
    assert weights == {1 / sum(len(e.response_ids) for e in examples)}


def test_varlen_is_called_as_it_wants_to_be(monkeypatch):
    """The CUDA kernel cannot run here; its signature, layouts and the adapter around it can be checked."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    import inspect
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **kwargs):
        q, k, v, queries, keys, longest_q, longest_k = args
        signature.bind(*args, **kwargs)
        assert q.shape[1:] == k.shape[1:] == v.shape[1:] and queries.dtype == keys.dtype == torch.int32
        assert longest_q == queries.diff().max() and longest_k == keys.diff().max() and queries.diff().min() > 0
        assert (len(q), len(k)) == (queries[-1], keys[-1]) and len(queries) == len(keys)
        return P.looped_attention(*args)

    stand_in.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    P.register_varlen.cache_clear()
    P.register_varlen()
    model, batch = tiny("qwen"), P.sft_examples(random_groups(0))
    P.accumulate_gradients(model, batch, P.sft_loss)
    expected = gradient(model)
    AttentionInterface.register("packed", AttentionInterface()["packed_varlen"])
    try:
        P.accumulate_gradients(model, batch, P.sft_loss)
        close(gradient(model), expected)
    finally:
        AttentionInterface.register("packed", partial(P.packed_attention, P.looped_attention))
        P.register_varlen.cache_clear()


def dense_attention(q, k, v, queries, keys, longest_q, longest_k, causal):
    """What a variable-length kernel computes, in operators that torch.compile can trace on a CPU."""
    def example_and_end(borders, n):
        example = torch.searchsorted(borders, torch.arange(n, dtype=torch.int32), right=True)
        return example, borders[example] - torch.arange(n)
    (row, left), (column, right) = example_and_end(queries, len(q)), example_and_end(keys, len(k))
    seen = (row[:, None] == column) & (left[:, None] <= right)  # as many tokens before the end, or more
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def test_compiled_layers_take_shared_prompts_of_any_lengths_in_one_graph(monkeypatch):
    """As on a GPU, but for the kernel and the code that is generated."""
    AttentionInterface.register("packed_dense", partial(P.packed_attention, partial(dense_attention, causal=True)))
    monkeypatch.setitem(P.ATTENTION, "packed_dense", lambda: None)
    monkeypatch.setattr(P, "SHARE_PROMPTS", True)
    plain, model = tiny("qwen"), tiny("qwen")
    model.packed_attention = "packed_dense"
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    for layer in model.base_model.layers:
        layer.compile(dynamic=True, backend="aot_eager")
    for seed in range(4):
        batch = P.sft_examples(random_groups(seed))
        for policy in (plain, model):
            P.accumulate_gradients(policy, batch, P.sft_loss)
        close(gradient(model), gradient(plain), 1e-6)  # RMSNorm rounds to float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]


# --- refusals

def test_bad_batches_are_refused_and_leave_the_weights_alone():
    model, optimizer = tiny(), None
    optimizer = P.make_optimizer(model, 1e-2)
    before = copy.deepcopy(model.state_dict())
    good = P.sft_examples(random_examples())
    for batch, error, message in [
            ([P.Example([3], [])], ValueError, "all 1 responses"), ([], ValueError, "all 0 responses"),
            ([P.Example([], [3])], ValueError, "empty prompt"),
            ([P.Example([3] * 60, [4] * 9)], ValueError, "60 prompt . 9 response tokens do not fit"),
            ([replace(good[0], side={"weight": [1.0] * 50})], ValueError, "'weight' has 50 numbers"),
            ([replace(e, side={"weight": math.inf}) for e in good], FloatingPointError, "no step was made")]:
        with pytest.raises(error, match=message):
            P.train_step(model, optimizer, batch, P.sft_loss)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_attention_is_restored_after_an_error():
    model = tiny()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        P.accumulate_gradients(model, P.sft_examples(random_examples()), lambda *_: 1 / 0)
    assert model.config._attn_implementation == before
