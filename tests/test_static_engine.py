"""The static engine (notebook E2a) against transformers on the CPU, and its kernels in Triton's interpreter and compiler.

Triton comes with PyTorch for CUDA and with vLLM's CPU build, so the last two are run there (.ci/run); elsewhere they are skipped.
"""
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cs336_alignment import static_engine as S
from cs336_alignment.data import fill_prompt, load_prompt, micro_problems
from cs336_alignment.grpo_runs import use_engine
from cs336_alignment.grpo_settings import grpo_config
from cs336_alignment.inference import Request, SamplingParams, TransformersEngine
from cs336_alignment.models import load_policy
from cs336_alignment.vllm_engine import engine_problem, make_engine, shared_engine

PROMPTS = [fill_prompt(load_prompt("micro"), p.question) for p in micro_problems(5, split="heldout")]
GREEDY = SamplingParams(temperature=0, max_tokens=60)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here: vLLM's environment of .ci/run has it")


@pytest.fixture(scope="module")
def usual():
    return TransformersEngine("micro", device="cpu")


@pytest.fixture
def static():
    with make_engine("micro", kind="static", device="cpu", verbose=False) as engine:
        yield engine


def assert_same(ours, theirs):
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert (a.text, a.token_ids, a.finish_reason, a.prompt_token_ids) == (b.text, b.token_ids, b.finish_reason, b.prompt_token_ids)
        assert (a.logprobs is None) == (b.logprobs is None)
        if a.logprobs is not None:
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampling", [
    GREEDY,
    replace(GREEDY, n=3),
    replace(GREEDY, max_tokens=1),
    replace(GREEDY, max_tokens=S.LOOK),  # ends just where the host looks
    replace(GREEDY, max_tokens=S.LOOK + 1, logprobs=None),
    replace(GREEDY, stop=("=", "so"), include_stop_str_in_output=False),
    replace(GREEDY, stop=("=",), min_tokens=12),  # "=" comes sooner, but may not end it
    replace(GREEDY, stop=(), min_tokens=58),  # eos is forbidden for long
    replace(GREEDY, stop=(), ignore_eos=True),
    replace(GREEDY, max_tokens=10_000, stop=(), ignore_eos=True)], ids=str)  # the context ends it
def test_greedy_responses_are_those_of_transformers(usual, static, sampling):
    assert_same(static.generate(PROMPTS, sampling, progress=False), usual.generate(PROMPTS, sampling, progress=False))


def test_prompts_of_one_token_and_of_many_lengths(usual, static):
    prompts = [[40], [40, 41], PROMPTS[0], [40], "User: 1+1=?\nAssistant: <think>" * 3]
    prompts = [p if isinstance(p, list) else static.tokenizer(p).input_ids for p in prompts]
    assert_same(static.generate(prompts, GREEDY, progress=False), usual.generate(prompts, GREEDY, progress=False))


def test_samples_depend_on_the_seed_alone(static):
    sampling = SamplingParams(n=4, max_tokens=60, seed=7)
    tokens = lambda groups: [c.token_ids for group in groups for c in group]
    whole = tokens(static.generate(PROMPTS, sampling, progress=False))
    assert tokens(static.generate(PROMPTS[:1], sampling, progress=False)) == whole[:4]
    static.max_rows = 3  # waves
    assert tokens(static.generate(PROMPTS, sampling, progress=False)) == whole
    assert tokens(static.generate(PROMPTS, replace(sampling, seed=8), progress=False)) != whole
    assert len({tuple(t) for t in whole}) > 5


def test_samples_follow_the_distribution(static):
    """The first token after one prompt, 2,000 times, against the model's own probabilities."""
    prompt = "User: 3+4=?\nAssistant: <think>"
    n, model = 2000, load_policy("micro", device="cpu")[0]
    drawn = static.generate([prompt], SamplingParams(n=n, max_tokens=1, temperature=2.0, seed=3), progress=False)[0]
    ids = torch.tensor([static.tokenizer(prompt).input_ids])
    p = (model(ids).logits[0, -1] / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(p))
    often = p * n > 5
    chi = (((counts - p * n) ** 2 / (p * n))[often]).sum().item()
    assert chi < 2 * often.sum().item() + 20, chi
    for c in drawn[:20]:
        assert abs(c.logprobs[0] - p.log()[c.token_ids[0]].item()) < 1e-4


def test_new_weights_sleep_and_a_larger_wave(usual, static):
    policy, _ = load_policy("micro", device="cpu")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(0.9)
    before = static.generate(PROMPTS[:1], GREEDY, progress=False)
    static.load_weights(policy)
    changed = TransformersEngine(policy, usual.tokenizer)
    assert_same(static.generate(PROMPTS[:2], GREEDY, progress=False), changed.generate(PROMPTS[:2], GREEDY, progress=False))
    static.sleep(), static.wake()
    assert_same(static.generate(PROMPTS, GREEDY, progress=False), changed.generate(PROMPTS, GREEDY, progress=False))
    static.load_weights(usual.model)
    assert_same(static.generate(PROMPTS[:1], GREEDY, progress=False), before)
    with pytest.raises(ValueError, match="do not fit"):
        static.load_weights({"model.norm.weight": torch.ones(3)})


def test_progress_counts_every_response(static):
    ticks = []
    static.generate(PROMPTS, SamplingParams(n=3, max_tokens=60, seed=1), progress=ticks.append)
    assert sum(ticks) == 15


def test_rows_that_have_ended_leave_the_batch(monkeypatch, static):
    sizes, step = [], S.replay_step
    monkeypatch.setattr(S, "ROWS", (2, 4, 8, 16))
    monkeypatch.setattr(S, "replay_step", lambda e, rows: (sizes.append(rows), step(e, rows)))
    long = "1+" * 125  # the context ends a few tokens behind it, whatever the model writes
    found = static.generate([*PROMPTS[:2], long, long], SamplingParams(n=3, max_tokens=60, min_tokens=40, seed=1), progress=False)
    assert sizes[0] == 16 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    longest = max(len(c.token_ids) for group in found for c in group)
    assert len(sizes) <= longest + 3 * S.LOOK  # not to the end of max_tokens where all have ended


def test_what_it_cannot_do_is_said_before_it_begins(tmp_path, static):
    with pytest.raises(ValueError, match="top_p = 1"):
        static.generate(PROMPTS, SamplingParams(top_p=0.9), progress=False)
    with pytest.raises(ValueError, match="raise cache_gb"):
        S.split_waves([Request([1] * 50, None, 50)], 8, 64)
    with pytest.raises(ValueError, match="a live model"):
        make_engine(load_policy("micro", device="cpu")[0], kind="static")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "use_sliding_window": true, "hidden_act": "silu"}')
    (tmp_path / "model.safetensors").touch(), (tmp_path / "tokenizer.json").write_text("{}")
    assert "use_sliding_window" in engine_problem("static", tmp_path)
    assert engine_problem("static", "micro") is None and "one of" in engine_problem("statics", "micro")


def test_options_out_of_range_and_of_others_are_told():
    for options, said in [({"max_rows": 0}, "max_rows >= 1"), ({"cache_gb": 0}, "cache_gb > 0"), ({"replicas": 2}, "not replicas")]:
        with pytest.raises(ValueError, match=said):
            make_engine("micro", kind="static", device="cpu", **options)


def test_memory_is_made_anew_seldom_and_for_more_rows(static, monkeypatch):
    made, make = [], S.make_memory
    monkeypatch.setattr(S, "make_memory", lambda *args: made.append(args[1]) or make(*args))
    for k in range(1, 30):  # prompts grow by a token
        static.generate([[40] * k] * 2, SamplingParams(max_tokens=20, stop=()), progress=False)
    assert len(made) <= 4, made
    static.max_rows = 2
    static.sleep(), static.generate([[40]] * 2, GREEDY, progress=False)
    static.max_rows = 64
    assert len(static.generate([[40]] * 20, SamplingParams(max_tokens=3), progress=False)) == 20
    assert S.batch_size(1025) == S.batch_size(1280) == 1280


def test_modes_of_the_caller_do_not_matter(usual, static):
    with torch.inference_mode():
        static.generate(PROMPTS[:1], GREEDY, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = static.generate(PROMPTS, GREEDY, progress=False)
    assert_same(found, usual.generate(PROMPTS, GREEDY, progress=False))
    static.eos_ids = set()  # a model without
    static.sleep()
    assert static.generate(PROMPTS[:1], replace(GREEDY, max_tokens=3), progress=False)[0][0].finish_reason == "length"


def test_the_commands_take_it_or_refuse_it_in_a_line(tmp_path):
    from typer.testing import CliRunner

    from cs336_alignment import evaluate_math, safety_eval
    call = lambda app, *args: CliRunner().invoke(app, [*args, "--root", str(tmp_path)])
    grid = ("grid", "--track", "micro", "--data", "micro", "--prompt", "micro", "--n", "4", "--seed", "0", "--engine", "static")
    assert call(evaluate_math.app, *grid).exit_code == 0
    assert "a static engine is one" in call(evaluate_math.app, *grid, "--replicas", "2").output
    done = call(safety_eval.app, "run", "--benchmark", "mmlu", "--track", "micro", "--engine", "fast")
    assert done.exit_code == 2 and "one of auto, vllm, static, transformers" in done.output


def test_a_run_samples_with_it_and_overlaps():
    config = grpo_config("micro", overlap=True)
    policy, tokenizer = load_policy("micro", device="cpu")
    with use_engine(config, policy, tokenizer, None, kind="static", enable_sleep=True) as engine:
        assert isinstance(engine, S.StaticEngine)
    with pytest.raises(ValueError, match="vLLM or static"), use_engine(config, policy, tokenizer, None, kind="transformers"):
        pass


def test_runs_side_by_side_share_one(tmp_path, monkeypatch):
    from cs336_alignment import side_by_side
    with shared_engine("micro", kind="static") as engine:
        assert isinstance(engine, S.StaticEngine)
    config, seen = grpo_config("micro", n_grpo_steps=1, n_eval=8, rollout_batch_size=8, train_batch_size=8), []
    monkeypatch.setattr(side_by_side, "shared_engine", lambda *args, **options: seen.append(args[3]) or side_by_side.nothing())
    file = tmp_path / "jobs"
    side_by_side.write_jobs(file, [side_by_side.Job(config)])
    assert side_by_side.work_through(file, 0, tmp_path, False, 0.1, 1000, "static") == 0 and seen == ["static"]


def test_a_run_against_the_clock_makes_one_of_its_kind(tmp_path, monkeypatch):
    from cs336_alignment import leaderboard, side_by_side
    seen, job = [], side_by_side.Job(leaderboard.leaderboard_config("micro", "grpo"))
    monkeypatch.setattr(side_by_side, "run_leaderboard",
                        lambda config, root, **options: seen.append(options) or {"final": {"answer_accuracy": 0.5}})
    for kind in ("static", "auto"):
        side_by_side.run_job([job], None, tmp_path, False, False, 1000, kind)
    assert seen[0].keys() == {"spent", "kind"} and seen[0]["kind"] == "static" and seen[1]["max_num_seqs"]


IN_THE_INTERPRETER = """
import torch
from cs336_alignment import static_engine as S
from cs336_alignment.inference import SamplingParams
import tests.test_static_engine as T
engine = S.StaticEngine("micro", device="cpu")
greedy, sampled = T.GREEDY, SamplingParams(n=2, max_tokens=30, seed=1)
plain = engine.generate(T.PROMPTS[:2], greedy, progress=False)
engine.forms = S.kernel_forms()
T.assert_same(engine.generate(T.PROMPTS[:2], greedy, progress=False), plain)
whole = engine.generate(T.PROMPTS[:2], sampled, progress=False)
assert [c.token_ids for c in engine.generate(T.PROMPTS[:1], sampled, progress=False)[0]] == [c.token_ids for c in whole[0]]
logits = (2 * torch.randn(300)).expand(2000, 300).contiguous()
table = torch.stack([torch.arange(2000)] * 8)
token, logprob = S.kernel_draw(logits, table, torch.tensor([0.7, 1.0, 10.0]), torch.tensor([4, 9]))
assert not torch.isin(token[:10], torch.tensor([4, 9])).any()  # before min_tokens
log_p = (0.7 * logits[0]).log_softmax(-1)
torch.testing.assert_close(logprob[10:], log_p[token[10:]], rtol=0, atol=1e-5)
expected, often = 1990 * log_p.exp(), 1990 * log_p.exp() > 5
chi = ((torch.bincount(token[10:], minlength=300) - expected)[often] ** 2 / expected[often]).sum()
assert chi < 1.5 * often.sum(), (chi, often.sum())
token, _ = S.kernel_draw(logits, table, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4]))
assert (token == logits[0].argmax()).all()
equal = torch.zeros(3, 5000).index_fill(1, torch.tensor([50, 2051, 2100, 4500]), 3.0)  # greedy, of equals the first
assert (S.kernel_draw(equal, table[:, :3], torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4]))[0] == 50).all()
cold = S.kernel_draw(logits[:3], table[:, 10:13], torch.tensor([1e32, 1.0, 0.0]), torch.tensor([4]))
assert (cold[0] == logits[0].argmax()).all() and (cold[1].abs() < 1e-3).all()
print("equal")
"""


@needs_triton
@pytest.mark.timeout(600)
def test_the_kernels_equal_their_plain_forms_in_the_interpreter():
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], capture_output=True, text=True, cwd=root,
                          env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root})
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]


@needs_triton
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="Triton's ptxas is for x86-64")
@pytest.mark.parametrize("kernel, signature, constants", [
    (S.add_norm_kernel, "bf16 bf16 bf16 bf16 i32 fp32", dict(BLOCK=1024)), (S.gate_kernel, "bf16 bf16 i32", dict(BLOCK=1024)),
    *((S.attend_kernel, "bf16 i64 i64 i64 i64 bf16 bf16 fp32 fp32 bf16 fp32", dict(H=h, K=k, D=d, SHARED=16, BLOCK=64, STAGES=stages))
      for h, k, d, stages in ((9, 3, 64, 3), (12, 2, 128, 2))),
    (S.draw_kernel, "bf16 i64 i64 fp32 i64 i64 fp32 i32", dict(EOS=1, BLOCK=2048))], ids=lambda x: getattr(x, "__name__", "")[:30])
def test_the_kernels_compile_for_hopper_without_a_gpu(kernel, signature, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    names, kinds = kernel.arg_names, iter(signature.split())
    scalars = {"width", "eps", "scale", "vocab"}
    types = {n: "constexpr" if n in constants else (next(kinds) if n in scalars else "*" + next(kinds)) for n in names}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=types, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ("mma.sync" in code and "cp.async" in code) == (kernel is S.attend_kernel)  # tensor cores, loads ahead
