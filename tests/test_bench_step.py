"""bench/grpo_step.py: it refuses what would spoil a measured file, and a part that fails leaves the others."""
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import grpo_step
import trl_step

STORED = grpo_step.STORED
needs_no_gpu = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@needs_no_gpu
@pytest.mark.parametrize("arguments, message", [([], "no GPU here"), (["--small"], "--small --out FILE"),
                                                (["--only", "both"], "--only is pocket, course or lean")])
def test_it_refuses_in_one_line_and_writes_nothing(arguments, message):
    before = STORED.read_bytes()
    done = subprocess.run([sys.executable, BENCH / "grpo_step.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert STORED.read_bytes() == before


def test_help_is_quick():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import grpo_step, trl_step; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, str(BENCH)], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("saves", [0, 1])
def test_a_setting_that_fails_keeps_its_own_rows_and_no_older_ones(tmp_path, monkeypatch, saves):
    def fails(small, replicas, steps, vllm, save):
        for _ in range(saves):
            save({"variants": [{"variant": "new"}]})
        raise RuntimeError("no GPU left")

    monkeypatch.setattr(grpo_step, "course", fails)
    out = tmp_path / "step.json"
    out.write_text('{"pocket": {"variants": ["kept"]}, "course": {"variants": ["old"]}}')
    assert grpo_step.measure_all(out, True, 3, 1, "course", {}) == 1
    result = json.loads(out.read_text())
    assert result["pocket"]["variants"] == ["kept"] and "no GPU left" in result["course"]["error"]
    assert result["course"].get("variants", []) == [{"variant": "new"}] * saves


def test_a_variant_that_fails_is_an_exit_status_too(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_step, "pocket", lambda small, replicas, steps, vllm, save: save({"variants": [{"error": "x"}]}))
    assert grpo_step.measure_all(tmp_path / "step.json", True, 3, 1, "pocket", {}) == 1
    monkeypatch.setattr(grpo_step, "pocket", lambda small, replicas, steps, vllm, save: save({"variants": [{"step_s": 1}]}))
    assert grpo_step.measure_all(tmp_path / "step.json", True, 3, 1, "pocket", {}) == 0


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_rewards_leave_the_wanted_share_with_an_advantage(share):
    rewards = grpo_step.RandomRewards(256, 8, share)
    given = torch.tensor([rewards("", "")["reward"] for _ in range(256)]).view(32, 8)
    mixed = (given.mean(1) == 0.5).float().mean().item()
    assert abs(mixed - share) < 0.02 and given.sum() == 4 * round(share * 32)


# --- TRL's side

@needs_no_gpu
def test_without_trl_it_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(grpo_step, "measure_all", lambda *args: pytest.fail("it began"))
    with pytest.raises(SystemExit) as stop:
        grpo_step.main(out=tmp_path / "step.json", small=True, only="", trl=True)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install trl" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_our_sides_measured_again_leave_trls_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_step, "pocket", lambda small, replicas, steps, vllm, save: save({"variants": [{"step_s": 1}]}))
    out = tmp_path / "step.json"
    out.write_text('{"pocket": {"variants": ["old"], "trl": {"best": "TRL"}}}')
    assert grpo_step.measure_all(out, True, 3, 1, "pocket", {}) == 0
    assert json.loads(out.read_text())["pocket"].items() >= {"variants": [{"step_s": 1}], "trl": {"best": "TRL"}}.items()


SECONDS = {"": 5.0, "no recomputation": 4.0, "bfloat16 weights": 4.5, "compiled": 6.0}
TRIED = {name: ({name: True}, None) for name in SECONDS if name} | {"absent": ({}, "no_such_package")}


def searched(row, deadline=float("inf")):
    saved = []
    found = trl_step.search((64, 32), TRIED, row, deadline, saved.append)
    assert saved[-1] == found
    return found


def test_the_search_ends_with_the_options_that_helped_together():
    def row(name, size, options):
        return {"variant": name, "micro_batch": size, "options": options,
                "step_s": sum(SECONDS[o] - 5.0 for o in options) + (5.0 if size == 32 else 5.5)}

    found = searched(row)
    assert found["best"] == "TRL, micro-batch 32, no recomputation + bfloat16 weights" == found["rows"][-1]["variant"]
    assert found["left_out"] == {"absent": "no_such_package is not installed"} and len(found["rows"]) == 6


def test_a_row_without_memory_is_tried_at_half_the_size_and_ends_nothing():
    def row(name, size, options):
        if "no recomputation" in options and size == 64 or size == 32 and not options:
            raise MemoryError("out of memory")
        return {"variant": name, "micro_batch": size, "options": options, "step_s": 5.0 - len(options)}

    found = searched(row)
    tried = [(r["variant"], "error" in r) for r in found["rows"]]
    assert ("TRL, micro-batch 64, no recomputation", True) in tried and ("TRL, micro-batch 32, no recomputation", False) in tried
    assert found["rows"][-1]["micro_batch"] == 32  # the smallest of those that helped


def test_what_the_time_does_not_allow_is_named():
    found = searched(lambda *args: pytest.fail("no time"), deadline=time.monotonic() - 1)
    assert found["best"] is None and found["left_out"]["TRL, micro-batch 64"] == "time"


def test_trls_options_are_put_together_with_those_of_its_model():
    both = trl_step.merged(trl_step.OPTIONS["bfloat16 weights"][0], trl_step.OPTIONS["FlashAttention-2"][0], {"a": 1})
    assert both == {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}, "a": 1}


def test_what_a_row_puts_into_a_module_is_taken_back():
    """As Liger's layers, which would serve the rows after it too."""
    module = SimpleNamespace(Norm="Qwen2RMSNorm")
    with pytest.raises(MemoryError), trl_step.as_before(module):
        module.Norm = "LigerRMSNorm"
        raise MemoryError
    assert module.Norm == "Qwen2RMSNorm"


@needs_no_gpu
@pytest.mark.skipif(trl_step.trl_problem() is not None, reason="TRL is not installed")
def test_trls_loss_and_gradient_are_ours(tmp_path):
    out = tmp_path / "step.json"
    arguments = ["--small", "--steps", "1", "--only", "pocket", "--out", str(out)]
    subprocess.run([sys.executable, BENCH / "trl_step.py", *arguments], check=True)
    trl = json.loads(out.read_text())["pocket"]["trl"]
    assert set(trl["same_loss"]) == {"grpo", "dr_grpo", "dapo"} and trl["best"] is not None
    for row in trl["same_loss"].values():
        assert row["loss"]["TRL"] == pytest.approx(row["loss"]["ours"], abs=1e-6) and row["gradient_norm"] > 1e-3
        assert row["gradient_off"]["TRL"] < 1e-4 and row["gradient_off"].get("literal", 0) < 1e-6  # RMSNorm rounds to float32


def test_random_words_are_a_token_each_for_every_engine(tmp_path):
    with grpo_step.workload("course", True) as work:
        with grpo_step.start_engine(work["model"], work["tokenizer"], 1, 4, {}) as engine:
            assert {len(ids) for ids in engine.tokenizer(work["prompts"], add_special_tokens=False).input_ids} == {10}
    out = tmp_path / "step.json"
    assert grpo_step.measure_all(out, True, 1, 1, "course", {}) == 0
    assert all("step_s" in row for row in json.loads(out.read_text())["course"]["variants"])


def test_a_steps_flops_have_a_shared_prompt_once():
    """Each prompt of a group counts once where it is shared; what is left is that of one prompt and all responses."""
    with grpo_step.workload("pocket", True) as work:
        each, once = (grpo_step.step_flops(work, shared) for shared in (False, True))
        alone = grpo_step.step_flops(work | {"group": 1}, False)
        assert once < each and grpo_step.step_flops(work | {"group": 1}, True) == alone
        longer = work | {"prompts": [prompt * 2 for prompt in work["prompts"]]}  # adds its tokens to each response, or once
        more = [grpo_step.step_flops(longer, shared) - flops for shared, flops in ((False, each), (True, once))]
        assert more[0] > 2 * more[1] > 0 and work["group"] == 4
