"""bench/engine_throughput.py: it answers at once, measures nothing without a GPU, and says when a part failed."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import decode_profile
import engine_throughput


def run(*args, flags=()):
    """The bench in a process that sees no GPU."""
    return subprocess.run([sys.executable, *flags, BENCH / "engine_throughput.py", *map(str, args)], text=True,
                          capture_output=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("args, code, words", [(["--help"], 0, "--small"), (["--only", "bear"], 2, "no part bear; there are bare,"),
                                               (["--repeats", "many"], 2, "invalid int value: 'many'")])
def test_help_and_typos_are_answered_before_torch_is_imported(args, code, words):
    done = run(*args, flags=["-X", "importtime"])
    assert done.returncode == code and words in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and not imported & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("args", [[], ["--small"], ["--out", "new.json"],
                                  ["--small", "--out", engine_throughput.ROOT / "bench/../results/bench/engine_throughput.json"]])
def test_without_a_gpu_it_is_refused_in_a_line_and_nothing_is_written(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = engine_throughput.PUBLISHED.read_bytes()
    done = run(*args)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "no GPU here" in done.stderr
    assert engine_throughput.PUBLISHED.read_bytes() == before and not list(tmp_path.iterdir())


def test_small_results_are_never_published():
    options = engine_throughput.parse(["--small"])
    for device in ("cpu", "cuda"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_throughput, "DEVICE", device)
            assert "--out" in engine_throughput.refusal(options)
            options.out = Path("other.json")
            assert engine_throughput.refusal(options) is None
            options.out = engine_throughput.PUBLISHED


def test_small_runs_anywhere(tmp_path):
    out = tmp_path / "small.json"
    done = run("--small", "--out", out, "--only", "transformers_engine")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert (result["gpu"], result["model"], result["failed"]) == ("CPU", "micro", {})
    assert list(result["tokens_per_s"]) == ["TransformersEngine, batch 128"] and list(tmp_path.iterdir()) == [out]


def test_a_part_that_fails_is_the_exit_code_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def apart(options, name):
        failed = {name: "no GPU left"} if name == "bare" else {}
        return dict(summary={name: 1.0}, tokens_per_s={}, failed=failed)

    monkeypatch.setattr(engine_throughput, "run_apart", apart)
    out = tmp_path / "small.json"
    out.write_text('{"summary": {"kept": 2.0}, "tokens_per_s": {}, "failed": {"step_cost": "of another call"}}')
    call = lambda only: engine_throughput.main(engine_throughput.parse(["--small", "--out", str(out), "--only", only]))
    assert call("bare,replicas") == 1
    assert "failed parts: bare\n" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["summary"] == {"kept": 2.0, "bare": 1.0, "replicas": 1.0} and result["failed"]["bare"] == "no GPU left"
    assert call("replicas") == 0  # what failed in another call is not this one's exit code


def test_a_part_whose_process_dies_has_failed(tmp_path):
    options = engine_throughput.parse(["--small", "--out", str(tmp_path / "o.json"), "--only", "transformers_engine",
                                       "--model", str(tmp_path / "none")])
    stored = engine_throughput.run_apart(options, "transformers_engine")
    assert stored["failed"] == {"transformers_engine": "the process ended with: 1"}


# --- decode_profile.py

def profile(*args):
    return subprocess.run([sys.executable, BENCH / "decode_profile.py", *map(str, args)], text=True, capture_output=True,
                          timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("args, words", [([], "no GPU here"), (["--small"], "no GPU here"), (["--part", "pear"], "none of profile, static, pairs"),
                                         (["--small", "--out", "o.json", "--model", "micro"], "--model is for --shape pocket")])
def test_the_profile_refuses_in_a_line_and_writes_nothing(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--model" in args and decode_profile_problem():
        words = decode_profile_problem()[:20]
    done = profile(*args)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def decode_profile_problem():
    from cs336_alignment.vllm_engine import vllm_problem
    return vllm_problem()


@pytest.mark.parametrize("kernel, kind", [
    ("void flash::FlashAttnFwdSm90<cutlass::Gemm>", "attention"), ("vllm::reshape_and_cache_flash_kernel", "attention"),
    ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matrix products"), ("Memcpy DtoD (Device -> Device)", "copies"),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForward", "sampler"), ("distribution_elementwise_grid", "sampler"),
    ("triton_red_fused_rms_norm_0", "norms, rotary, activations"), ("something_new", "other")])
def test_kernels_are_sorted_by_their_names(kernel, kind):
    assert decode_profile.kind_of(kernel) == kind


def test_a_candidates_options_are_put_together_with_the_engines():
    engine = {"max_num_seqs": 8, "compilation_config": {"sizes": [1]}}
    both = decode_profile.with_option(engine, {"compilation_config": {"mode": "full"}, "replicas": 2})
    assert both == {"max_num_seqs": 8, "compilation_config": {"sizes": [1], "mode": "full"}, "replicas": 2}
    assert engine == {"max_num_seqs": 8, "compilation_config": {"sizes": [1]}}


class Slow:
    """An engine that takes its time, and notes when it is asked."""

    def __init__(self, seconds, asked):
        self.seconds, self.asked = seconds, asked

    def generate(self, prompts, sampling, progress):
        from types import SimpleNamespace
        self.asked.append(self.seconds)
        time.sleep(self.seconds)
        return [[SimpleNamespace(token_ids=[1, 2])] for _ in prompts]


def test_a_pair_takes_turns_and_tells_the_faster():
    asked = []
    found = decode_profile.pair(Slow(0.03, asked), Slow(0.01, asked), ["a", "b"], None, turns=2)
    assert asked == [0.01, 0.03, 0.03, 0.01, 0.01, 0.03] and len(found["ratios"]) == 2  # the first turn warms up
    assert 1.5 < found["ratio"] and found["tokens"] == {"base": 4, "other": 4}


def test_parts_are_timed_where_they_are_and_left_out_where_not():
    from collections import defaultdict
    from types import SimpleNamespace as Thing
    scheduler = Thing(schedule=lambda: time.sleep(0.01), update_from_output=lambda: None)
    engine = Thing(engine_core=Thing(engine_core=Thing(scheduler=scheduler)), output_processor=Thing(process_outputs=lambda: 5))
    engine.step = lambda: (scheduler.schedule(), engine.output_processor.process_outputs())[1]
    seconds = defaultdict(float)
    with decode_profile.timed_parts(engine, seconds):
        assert engine.step() == 5
    assert set(seconds) == {"schedule", "output", "step"} and seconds["step"] >= seconds["schedule"] >= 0.01
    engine.step()
    assert seconds["schedule"] < 0.02  # no timer is left


class FakeVLLM:
    """In place of VLLMEngine: each token takes a millisecond, half of it in `process_outputs` unless text is made late."""

    def __init__(self, model, tokenizer, in_process=False, late_text=False, **options):
        from types import SimpleNamespace as Thing
        if options.get("kv_cache_dtype"):
            raise RuntimeError("a traceback\nno such cache")
        self.tokenizer = tokenizer
        core = Thing(output_processor=Thing(process_outputs=lambda: time.sleep(0 if self.backend.late_text else 0.0005)))
        core.step = lambda: (time.sleep(0.0005), core.output_processor.process_outputs())
        self.backend = Thing(late_text=late_text, llm=Thing(llm_engine=core))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def generate(self, prompts, sampling, progress):
        from types import SimpleNamespace as Thing
        for _ in range(sampling.max_tokens):
            self.backend.llm.llm_engine.step()
        return [[Thing(token_ids=[0] * sampling.max_tokens)] for _ in prompts]


@pytest.mark.parametrize("part", ["profile", "pairs"])
def test_a_part_of_the_profile_with_an_engine_that_is_not_real(part, tmp_path, monkeypatch, capsys):
    from cs336_alignment import vllm_engine
    monkeypatch.setattr(vllm_engine, "VLLMEngine", FakeVLLM)
    monkeypatch.setitem(decode_profile.CANDIDATES, "2 engines", {"kv_cache_dtype": "fp8"})  # one that does not start
    out = tmp_path / "o.json"
    decode_profile.run_here(part, "pocket", True, 20, 2, "", lambda found: decode_profile.store(out, "pocket", part, found))
    rows = json.loads(out.read_text())["pocket"][part]["rows"]
    if part == "pairs":
        assert rows["2 engines"] == {"error": "did not start: no such cache"}
        assert rows["no detokenisation"]["full"]["ratio"] > 1.2 and "natural" in rows["no detokenisation"]
    else:
        with_text, late = rows[0], rows[2]
        assert [(r["sequences"], r["late_text"]) for r in rows] == [(2, False), (4, False), (2, True), (4, True)]
        assert with_text["clock_ms"] > 1.2 * late["clock_ms"] and with_text["host_ms"]["output"] > 0.4
        assert with_text["gpu_ms"] == 0 and with_text["host_ms"]["rest"] < with_text["host_ms"]["step"]


def test_the_static_engines_profile_runs_and_keeps_the_rest_of_the_file(tmp_path):
    out = tmp_path / "profile.json"
    out.write_text(json.dumps({"pocket": {"profile": "kept"}}))
    options = ["--small", "--shape", "pocket", "--part", "static", "--tokens", "4", "--out", out]
    done = subprocess.run([sys.executable, BENCH / "decode_profile.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["pocket"]
    assert found["profile"] == "kept" and len(found["static"]["batches_s"]) == 4 and min(found["static"]["batches_s"]) > 0
    assert [row["sequences"] for row in found["static"]["rows"]] == [2, 4]
