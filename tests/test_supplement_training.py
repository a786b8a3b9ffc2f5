"""Instruction tuning and DPO: many documents and pairs, kills, and commands that refuse before they write."""
import gzip
import json
import math
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from adapters import get_packed_sft_dataset, run_compute_per_instance_dpo_loss, run_iterate_batches
from kills import ended_by, in_child, without_clock
from test_commands import call
from transformers import GPT2Config, GPT2LMHeadModel

from cs336_alignment.dpo import (Preference, accumulate_dpo, dpo, dpo_config, dpo_split, hh_files, load_hh, pair_log_probs,
                                 preference_examples)
from cs336_alignment.instruction_tuning import instruct, tuning_config
from cs336_alignment.models import character_tokenizer, micro_model, model_dir
from cs336_alignment.runs import find_checkpoint

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
BETWEEN = "\n\n### Response:\n"  # the template, written out once more: a changed one is seen


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def text(rng: random.Random, longest: int = 60) -> str:
    return "".join(rng.choices("ab{} \n#:=7é", k=rng.randint(1, longest))) + "."


@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
def test_every_token_of_many_documents_is_there_once(bos, tmp_path):
    rng, tokenizer = random.Random(bos), character_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    encode = lambda s: tokenizer(s, add_special_tokens=False)["input_ids"]
    for trial in range(40):
        pairs = [(text(rng), text(rng)) for _ in range(rng.randint(1, 6))]
        lines = "".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs).encode()
        path = tmp_path / ("d.jsonl.gz" if trial % 2 else "d.jsonl")
        path.write_bytes(gzip.compress(lines) if trial % 2 else lines)
        first = [tokenizer.bos_token_id] * bos
        stream = [t for p, r in pairs for t in [*first, *encode(HEAD + p + BETWEEN + r), tokenizer.eos_token_id]]
        L = rng.choice([1, 2, 7, 64, len(stream) - 1, len(stream), len(stream) + 3])
        data = get_packed_sft_dataset(tokenizer=tokenizer, dataset_path=path, seq_length=L, shuffle=False)
        n = (len(stream) - 1) // L
        assert isinstance(data, torch.utils.data.Dataset) and len(data) == n
        size = rng.randint(1, 4)
        batches = list(run_iterate_batches(dataset=data, batch_size=size, shuffle=False))
        assert len(batches) == math.ceil(n / size) and all(b["input_ids"].shape == b["labels"].shape for b in batches)
        flat = lambda name: [t for batch in batches for row in batch[name].tolist() for t in row]
        assert flat("input_ids") == stream[:n * L] and flat("labels") == stream[1:n * L + 1]
        mixed = get_packed_sft_dataset(tokenizer=tokenizer, dataset_path=path, seq_length=L, shuffle=True)
        assert sorted(mixed.tokens.tolist()) == sorted(stream)


def tiny(seed: int, dtype=torch.float64):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=512, bos_token_id=None, eos_token_id=1,
                        initializer_range=0.3)
    return GPT2LMHeadModel(config).to(dtype).eval()


def by_hand(model, tokenizer, instruction: str, response: str):
    """log of a product of probabilities, in float64."""
    ids = tokenizer(HEAD + instruction + BETWEEN + response)["input_ids"] + [1]
    p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    return torch.stack([p[t, ids[t + 1]].log() for t in range(len(ids) - 1)]).sum()


def grads(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("seed", range(6))
def test_dpo_loss_and_gradient_are_those_of_the_formula(seed):
    rng, tokenizer = random.Random(seed), character_tokenizer()
    lm, lm_ref, beta = tiny(seed), tiny(seed + 100), rng.choice([0.05, 0.1, 0.5, 2.0])
    instruction, w, l = text(rng), text(rng), text(rng)
    loss = run_compute_per_instance_dpo_loss(lm=lm, lm_ref=lm_ref, tokenizer=tokenizer, beta=beta, prompt=instruction,
                                             response_chosen=w, response_rejected=l)
    assert loss.shape == () and loss.device == lm.device
    loss.backward()
    got = grads(lm)
    lm.zero_grad()
    a, b, a_ref, b_ref = (by_hand(m, tokenizer, instruction, r) for m in (lm, lm_ref) for r in (w, l))
    m = beta * ((a - a_ref) - (b - b_ref)).item()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-abs(m))) + max(-m, 0), rel=1e-9)
    (-beta / (1 + math.exp(m)) * (a - b)).backward()
    assert (got - grads(lm)).norm() < 1e-8 * grads(lm).norm()
    assert all(p.grad is None for p in lm_ref.parameters())


def test_packed_pairs_have_the_loss_and_gradient_of_single_ones():
    rng, tokenizer = random.Random(0), character_tokenizer()
    torch.manual_seed(0)
    lm, lm_ref = micro_model(len(tokenizer)).eval(), micro_model(len(tokenizer)).eval()
    pairs = [Preference("What?", text(rng, 30), text(rng, 30), "made") for _ in range(9)]
    pairs += [Preference("Same start", "abc.", "abc. And more.", "made")]  # one response begins the other
    single = [run_compute_per_instance_dpo_loss(lm, lm_ref, tokenizer, 0.1, p.instruction, p.chosen, p.rejected) for p in pairs]
    torch.stack(single).mean().backward()
    literal = grads(lm)
    rows = preference_examples(tokenizer, pairs)
    reference = pair_log_probs(lm_ref, rows, 4096)
    for max_tokens in (450, 1000, 10_000):
        lm.zero_grad()
        metrics = accumulate_dpo(lm, rows, reference, 0.1, max_tokens)
        assert metrics["loss"] == pytest.approx(torch.stack(single).mean().item(), abs=1e-5)
        assert (grads(lm) - literal).norm() < 1e-5 * literal.norm()


TUNE = tuning_config("micro", n_train=30, n_val=8, eval_every=2, seq_length=128, micro_batch_size=4)
PREFER = dpo_config("micro", model="micro", n_train=48, n_val=8, batch_size=8, eval_every=1, pass_tokens=2048)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_reference_may_be_on_another_gpu():
    policy, reference = micro_model()[0].to("cuda:0").eval(), micro_model()[0].eval()
    losses, gradients = [], []
    for device in ("cuda:0", "cuda:1"):
        policy.zero_grad()
        loss = run_compute_per_instance_dpo_loss(policy, reference.to(device), character_tokenizer(), 0.1, "1+1=?", "2", "3")
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert losses[0] == losses[1] and torch.equal(*gradients)


def test_pairs_of_the_same_tokens_are_left_out_and_counted(tmp_path, monkeypatch):
    """The character tokenizer has no token for some characters: texts that differ may be the same tokens."""
    from cs336_alignment import dpo as module
    monkeypatch.setenv("CS336_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model_dir("micro"), tmp_path / "micro")
    usual = module.preference_data(PREFER)
    same = Preference("1+1=?", "2", "2", "made")
    monkeypatch.setattr(module, "preference_data", lambda config: (usual[0][:16] + [same], usual[1], {}))
    summary = dpo(replace(PREFER, model=str(tmp_path / "micro")), None, tmp_path / "runs", progress=False)
    assert (summary["same_tokens"], summary["n_train"], summary["too_long"]) == (1, 16, 0)


def left(folder):
    """What a run leaves that must not depend on interruptions."""
    lines = [without_clock(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = without_clock(json.loads((folder / "summary.json").read_text()))
    summary["final"] = without_clock(summary["final"])
    return lines, summary, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def killed_after(work, function: str, calls: int) -> None:
    """Runs `work(…)` in a child that kills itself when a function of its module has returned for the `calls`-th time."""
    module, left_to_do = sys.modules[work.func.__module__], [calls]
    original = getattr(module, function)

    def deadly(*args, **more):
        result = original(*args, **more)
        left_to_do[0] -= 1
        if not left_to_do[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, deadly)  # the child inherits it
    try:
        assert ended_by(in_child(work)) == signal.SIGKILL
    finally:
        setattr(module, function, original)


@pytest.mark.parametrize("work, config, places", [
    (instruct, TUNE, [("log_metrics", 2), ("save_checkpoint", 1), ("log_metrics", 2), ("save_checkpoint", 1)]),
    (dpo, PREFER, [("log_metrics", 1), ("save_checkpoint", 1), ("keep_weights", 1), ("save_checkpoint", 2), ("log_metrics", 2)])],
    ids=["instruct", "dpo"])
def test_kills_change_nothing(work, config, places, tmp_path, monkeypatch):
    cache = tmp_path / "cache"  # policies are saved there
    shutil.copytree(model_dir("micro"), tmp_path / "micro")
    monkeypatch.setenv("CS336_CACHE", str(cache))
    config = replace(config, model=str(tmp_path / "micro"))
    work(config, None, tmp_path / "whole", progress=False)
    name = f"{config.family}_micro/default_seed0"
    weights = (cache / "policies" / name / "model.safetensors").read_bytes()
    shutil.rmtree(cache)
    cut, steps = partial(work, config, None, tmp_path / "cut", progress=False), []
    for place in places:
        killed_after(cut, *place)
        checkpoint = find_checkpoint(tmp_path / "cut" / name)
        steps.append(int(checkpoint.name[5:]) if checkpoint else 0)
    assert steps == sorted(steps) and 0 < steps[-1] < 6, steps  # of 6 updates
    cut()
    assert left(tmp_path / "cut" / name) == left(tmp_path / "whole" / name)
    assert (cache / "policies" / name / "model.safetensors").read_bytes() == weights


def hh_file(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))


def test_hh_files_by_their_names(tmp_path, monkeypatch):
    one = {side: f"\n\nHuman: Q {{x}}?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    hh = tmp_path / "hh"
    hh_file(hh / "harmless-base-test.jsonl.gz", one)
    monkeypatch.setenv("CS336_DATA", str(tmp_path))
    monkeypatch.setenv("CS336_ROOT", str(tmp_path / "none"))
    assert (dpo_split("pocket"), dpo_split("micro")) == ("test", "train")
    for path in ("helpful-base.jsonl.gz", "helpful-online/train.jsonl.gz", "helpful-rejection-sampled-train.jsonl.gz"):
        hh_file(hh / path, one, one)
    assert dpo_split("pocket") == "train"
    assert list(hh_files(hh, "train")) == ["helpful-base", "helpful-online", "helpful-rejection-sampled"]
    pairs, counts = load_hh(hh)
    assert len(pairs) == 6 and pairs[0] == Preference("Q {x}?", "chosen", "rejected", "helpful-base")
    assert {name: dict(c) for name, c in counts.items()}["helpful-online"] == {"single-turn": 2}


TUNING, DPO = "instruction_tuning", "dpo"


@pytest.mark.parametrize("command", [TUNING, DPO])
def test_help_and_unknown_options_import_nothing_heavy(command, tmp_path):
    status, said, imported = call(command, "--help", cwd=tmp_path)
    assert (status, imported) == (0, set()) and "Usage" in said
    status, said, imported = call(command, "--lenght", "3", cwd=tmp_path)
    assert (status, imported) == (2, set()) and "No such option" in said


@pytest.mark.parametrize("command, args, expected", [
    (TUNING, ["--set", "lerning_rate=1"], "is it learning_rate?"), (TUNING, ["--set", "batch_size=0"], "batch_size = 0"),
    (TUNING, ["--set", "micro_batch_size=3"], "must divide batch_size = 8"), (TUNING, ["--data", "nope.jsonl"], "nope.jsonl: no such file"),
    (TUNING, ["--data", "bad.jsonl"], "bad.jsonl:2: no text in field 'response'"), (TUNING, ["--model", "nope"], "no model 'nope'"),
    (TUNING, ["--set", "n_train=9999"], "asked for: 9,999"), (TUNING, ["--seed", "-1"], "seed = -1"), (TUNING, ["--track", "nope"], "unknown track"),
    (TUNING, ["--variant", "a/b"], "cannot be part"), (TUNING, ["--steps", "1", "--set", "max_steps=1"], "given twice"),
    (DPO, ["--set", "bta=1"], "is it beta?"), (DPO, ["--set", "beta=0"], "beta = 0"), (DPO, ["--data", "nope"], "nope: none of harmless-base"),
    (DPO, ["--model", "nope"], "no model 'nope'"), (DPO, ["--set", "n_val=1000"], "0 pairs to train on"), (DPO, ["--steps", "0"], "max_steps = 0"),
    (DPO, ["--data", "hh", "--model", "micro", "--set", "n_val=1"], "harmless-base-train.jsonl.gz:2: field 'rejected'"),
    (DPO, ["--set", "optimizer=adam"], "optimizer = 'adam'"),
])
def test_slips_are_one_line_and_leave_nothing(command, args, expected, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    talk = "\n\nHuman: a\n\nAssistant: b"
    hh_file(tmp_path / "hh" / "harmless-base-train.jsonl.gz", {"chosen": talk, "rejected": talk}, {"chosen": talk, "rejected": "b"})
    args = [str(tmp_path / "hh") if a == "hh" else a for a in args]
    track = [] if "--track" in args else ["--track", "micro"]
    status, said, imported = call(command, *args, *track, "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and expected in said and said.startswith("error: ")
    assert not imported & {"torch", "transformers", "vllm"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "hh"]
