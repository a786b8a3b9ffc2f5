"""What notebooks 08 and 09 cannot show: their runs killed at any moment, and bad input given to the commands.

The runs are the library's own, small, on the micro track; they live in forked children, so that the imports are paid for once."""
import contextlib
import io
import json
import time
from dataclasses import replace

import pytest
import torch

import kills
from cs336_alignment import packing, runs
from cs336_alignment.data import DataError
from cs336_alignment.runs import find_checkpoint, read_metrics, run_folder, write_text
from cs336_alignment.sft_math_reasoning import sft, sft_config
from cs336_alignment.sft_math_reasoning_ei import ei_config, expert_iteration
from kills import ended_by, in_child, kill_ten_times

SFT = sft_config("micro", 32, pool=64, batch_size=4, min_steps=24, evaluations=8, n_eval=8, max_tokens=24)
EI = ei_config("micro", pool=64, questions=16, group_size=4, batch_size=4, n_eval=8, n_ei_steps=8, max_tokens=40)
torch.set_num_threads(1)  # a process with one thread can be forked


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    monkeypatch.setattr(runs, "environment", lambda: {"gpu": None})
    monkeypatch.setenv("WANDB_MODE", "disabled")


def run(work, config, root):
    with contextlib.redirect_stdout(io.StringIO()):
        return work(config, root=root, keep=False, progress=False)


def record(config, root):
    return kills.record(run_folder(config, root))


@pytest.mark.parametrize("work, config", [(sft, SFT), (expert_iteration, EI)], ids=["sft", "ei"])
def test_ten_random_kills_leave_the_same_run(tmp_path, work, config):
    begin = time.monotonic()
    assert ended_by(in_child(lambda: run(work, config, tmp_path / "whole"))) == 0
    kill_ten_times(lambda: run(work, config, tmp_path / "killed"), run_folder(config, tmp_path / "killed"),
                   0.35 * (time.monotonic() - begin))
    assert record(config, tmp_path / "killed") == record(config, tmp_path / "whole")


def test_a_gradient_that_is_not_finite_stops_a_run_that_can_go_on(tmp_path, monkeypatch):
    """The weights stay those of the last good step, and the run is finished once the cause is gone."""
    original, calls = packing.accumulate_gradients, []

    def poisoned(model, *args):
        metrics = original(model, *args)
        calls.append(1)
        if len(calls) == 8:
            next(model.parameters()).grad.fill_(float("nan"))
        return metrics

    run(sft, SFT, tmp_path / "whole")
    monkeypatch.setattr(packing, "accumulate_gradients", poisoned)
    with pytest.raises(FloatingPointError, match="no step was made"):
        run(sft, SFT, tmp_path / "stopped")
    assert find_checkpoint(run_folder(SFT, tmp_path / "stopped")).name == "step_00000006"
    monkeypatch.undo()
    monkeypatch.setattr(runs, "environment", lambda: {"gpu": None})
    run(sft, SFT, tmp_path / "stopped")
    assert record(SFT, tmp_path / "stopped") == record(SFT, tmp_path / "whole")


def trace(response, prompt="User: 1+1=?\nAssistant: <think>"):
    return json.dumps({"prompt": prompt, "response": response}) + "\n"


GOOD = trace(" 1+1=2 </think> <answer> 2 </answer>")


@pytest.mark.parametrize("text, message", [
    (GOOD + trace(""), r"traces.jsonl:2: the trace has no"),
    (GOOD + trace(" 1+1=2 <answer> 2 </answer>"), r"traces.jsonl:2: the trace has no"),
    (GOOD + "{broken\n", r"traces.jsonl:2: not valid JSON"),
    (GOOD + json.dumps({"prompt": "a"}) + "\n", r"traces.jsonl:2: no text in field 'response'"),
    ("", r"traces.jsonl: the file is empty"),
])
def test_bad_traces_are_named_and_leave_no_folder(tmp_path, text, message):
    path = tmp_path / "traces.jsonl"
    write_text(path, text)
    with pytest.raises(DataError, match=message):
        run(sft, sft_config("micro", traces=str(path)), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_prompt_longer_than_the_context(tmp_path):
    path = tmp_path / "traces.jsonl"
    write_text(path, GOOD + trace(" 2 </think> <answer> 2 </answer>", "1+" * 200))
    with pytest.raises(ValueError, match="400 prompt .* do not fit the model's context of 256: drop or shorten it"):
        run(sft, sft_config("micro", traces=str(path)), tmp_path)


def test_no_correct_rollout_in_any_step(tmp_path, capsys):
    """The run ends, says so at each step, and its policy is the one it began with."""
    never = replace(EI, max_tokens=4, n_ei_steps=2)
    summary = expert_iteration(never, root=tmp_path, keep=False, progress=False)
    assert capsys.readouterr().out.count("none of 64 responses is right") == 2
    assert summary["steps"] == 2
    assert [m["train/updates"] for m in read_metrics(run_folder(never, tmp_path)) if "train/updates" in m] == [0, 0]
