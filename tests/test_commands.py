"""Commands answer `--help` and slips at once, which is a matter of what they have imported by then."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "vllm", "pandas", "scipy", "matplotlib", "sympy", "wandb"}
COMMANDS = ["evaluate_math", "sft_math_reasoning", "sft_math_reasoning_ei", "grpo_experiments", "grpo", "run_queue", "runs", "data",
            "data_sets", "drgrpo_grader", "safety_eval"]
REPORT = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *sys.modules.keys() & set({heavy}), file=sys.stderr))
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(command: str, *args: str, cwd: Path) -> tuple[int, str, set[str]]:
    """(exit status, what was printed, which of HEAVY were imported) of a command that is run as a script."""
    argv = [str(ROOT / "cs336_alignment" / f"{command}.py"), *args]
    done = subprocess.run([sys.executable, "-c", REPORT.format(heavy=sorted(HEAVY), argv=argv)], cwd=cwd, text=True,
                          capture_output=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"})
    said, _, imported = (done.stdout + done.stderr).rpartition("imported:")
    assert "Traceback" not in said, said
    return done.returncode, said, set(imported.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_unknown_options_import_nothing_heavy(command, tmp_path):
    status, said, imported = call(command, "--help", cwd=tmp_path)
    assert (status, imported) == (0, set()) and "Usage" in said
    status, said, imported = call(command, "--lenght", "3", cwd=tmp_path)
    assert (status, imported) == (2, set()) and "No such option: --lenght" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args, expected", [
    (["--data", "nope.jsonl"], "'nope.jsonl' is no file"),
    (["--data", "gsm_symbolic", "--n", "9999"], "ask for fewer"),
    (["--prompt", "nope"], "shipped prompts"),
    (["--engine", "vlm"], "not 'vlm'"),
    (["--n", "-1"], "n = -1"),
    (["--n", "many"], "--n"),
    (["--max-tokens", "0"], "max_tokens = 0"),
    (["--seed", "-1"], "seed = -1"),
    (["--out", __file__], "else than responses"),
    (["--out", f"{__file__}/r.jsonl"], "cannot write"),
    (["--root", __file__], "cannot write"),
    (["grid", "--prompt", "nope"], "shipped prompts"),
    (["grid", "--data", "nope.jsonl"], "'nope.jsonl' is no file"),
    (["grid", "--replicas", "0"], "--replicas"),
    (["--model", "nope"], "no model 'nope'"), (["--seed", "4294967296"], "seed = 4294967296"),
    *[([*command, option, ""], "names nothing") for command in ([], ["grid"]) for option in ("--model", "--data", "--prompt")],
])
def test_slips_in_the_zero_shot_command_import_nothing_heavy(args, expected, tmp_path):
    status, said, imported = call("evaluate_math", *args, cwd=tmp_path)
    assert (status, imported) == (2, set()) and expected in said
    assert list(tmp_path.iterdir()) == []  # and leave nothing behind


SAFE = [["run", "--benchmark", "sst"], ["suite", "--zero-shot", "micro", "--benchmark", "sst"],
        ["judge", "--benchmark", "sst", "--judge", "micro"], ["wrong", "--benchmark", "sst"]]


@pytest.mark.parametrize("args, expected", [
    (["run", "--benchmark", "mmul"], "mmlu, gsm8k, alpaca_eval, sst"), (["run"], "--benchmark"),
    (["suite", "--benchmark", "sst"], "no model"), (["suite", "--zero-shot", "micro", "--benchmark", "x"], "mmlu, gsm8k"),
    (["judge", "--benchmark", "sst"], "--judge"), (["judge", "--benchmark", "gsm8k", "--judge", "m"], "needs no judge"),
    (["judge", "--benchmark", "sst", "--judge", "m", "--url", "localhost"], "--url is an address"), (["judge", "--benchmark", "sst", "--judge", "nope"], "no model 'nope'"),
    (["run", "--benchmark", "sst", "--prompt", "r1_zero"], "zero_shot, alpaca"), (["run", "--benchmark", "sst", "--model", "nope"], "no model 'nope'"),
    (["run", "--benchmark", "sst", "--engine", "vlm"], "not 'vlm'"), (["run", "--benchmark", "sst", "--data", "nope.csv"], "no file or folder"),
    (["run", "--benchmark", "gsm8k"], "get gsm8k"),
    *[([*command, *wrong], said) for command in SAFE for wrong, said in [
        (["--track", "nope"], "micro, pocket, course"), (["--seed", "-1"], "seed = -1"), (["--max-tokens", "0"], "max_tokens = 0"),
        (["--max-examples", "-1"], "n = -1"), (["--max-examples", "7"], "holds 2"), (["--root", __file__], "cannot write")]]])
def test_slips_in_the_safety_commands_import_nothing_heavy(args, expected, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "simple_safety_tests"
    folder.mkdir(parents=True)
    (folder / "simple_safety_tests.csv").write_text("id,harm_area,counter,category,prompts_final\ns1,none,1,advice,How?\ns2,none,2,advice,Why?\n")
    monkeypatch.setenv("CS336_DATA", str(tmp_path / "data"))
    status, said, imported = call("safety_eval", *args, cwd=tmp_path)
    assert (status, imported) == (2, set()) and expected in said
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


SFT, EI, GRPO = "sft_math_reasoning", "sft_math_reasoning_ei", "grpo_experiments"


@pytest.mark.parametrize("command, args, expected", [
    (SFT, ["--set", "evaluations=0"], "evaluations = 0"), (SFT, ["--set", "batch_size=0"], "batch_size = 0"),
    (SFT, ["--set", "epochs=one"], "epochs = 'one'"), (SFT, ["--set", "learning_rate=-.1"], "learning_rate = -0.1"),
    (SFT, ["--set", "warmup=2"], "warmup = 2"), (SFT, ["--set", "temperature=0"], "temperature = 0"),
    (SFT, ["--set", "nope=1"], "there are: family, track"), (SFT, ["--set", "n_eval=1.5"], "n_eval = 1.5"),
    (EI, ["--set", "questions=0"], "questions = 0"), (EI, ["--set", "schedule=cosine"], "'linear' or 'constant'"),
    (EI, ["--set", "group_size=two"], "group_size = 'two'"), (EI, ["--set", "nope=1"], "there are: family, track"),
    (EI, ["--set", "temperature=-1"], "temperature = -1"), (EI, ["--set", "n_ei_steps=0"], "n_ei_steps = 0"),
    (GRPO, ["--set", "n_grpo_steps=2.5"], "n_grpo_steps = 2.5"), (GRPO, ["--set", "group_size=abc"], "group_size = 'abc'"),
    (GRPO, ["--lr", "-1"], "learning_rate = -1"), (GRPO, ["--set", "temperature=-1"], "temperature = -1"),
    (GRPO, ["--set", "temperature=0"], "temperature = 0"), (GRPO, ["--set", "min_tokens=9", "--set", "max_tokens=4"], "min_tokens = 9"),
    (GRPO, ["--set", "kl_coef=-.1"], "kl_coef = -0.1"), (GRPO, ["--steps", "0"], "n_grpo_steps = 0"),
    (GRPO, ["--set", "loss_type=ppo"], "loss_type = 'ppo'"), (GRPO, ["--set", "nope=1"], "there are: family, track"),
    (GRPO, ["--set", "overlap=maybe"], "overlap = 'maybe'"), (GRPO, ["--track", "nope"], "nope"), (GRPO, ["--named", "ppo"], "ppo"),
    *[(command, ["--set", "track=pocket"], "--set track: this command has an option") for command in (SFT, EI, GRPO)],
    (SFT, ["--set", "seed=1", "--seed", "1"], "seed is given twice"), (SFT, ["--set", "n_train=16", "--n", "8"], "n_train is given twice"),
    (SFT, ["--set", "variant=a", "--variant", "a"], "variant is given twice"), (SFT, ["--set", "traces=a", "--traces", "a"], "traces is given twice"),
    (EI, ["--set", "seed=1", "--seed", "0"], "seed is given twice"), (GRPO, ["--set", "seed=1", "--seed", "0"], "seed is given twice"),
    (GRPO, ["--set", "model=micro", "--model", "nope"], "model is given twice"), (GRPO, ["--set", "learning_rate=1", "--lr", "2"], "learning_rate is given"),
    (GRPO, ["--set", "n_grpo_steps=1", "--steps", "1"], "n_grpo_steps is given twice"), (GRPO, ["--set", "epochs", "--steps", "1"], "name=value"),
    (EI, ["--set", "epochs=1", "--set", "epochs=1"], "epochs is given twice"), (EI, ["--set", "=1"], "name=value, not '=1'"),
    (GRPO, ["--lr", "nan"], "learning_rate = nan: Input should be a finite number"), (SFT, ["--set", "temperature=Infinity"], "= inf: Input should be a finite"),
    (EI, ["--set", "learning_rate=NaN"], "= nan: Input should be a finite"), (GRPO, ["--set", "cliprange=-Infinity"], "= -inf: Input should be a finite"),
    (GRPO, ["--set", "temperature=inf"], "= inf: Input should be a finite"), (SFT, ["--set", "learning_rate=-inf"], "= -inf: Input should be a finite"),
    (SFT, ["--set", "warmup=nan"], "warmup = nan: Input should be a finite"), (EI, ["--set", "pool=inf"], "pool = inf: Input should be a valid integer"),
    (GRPO, ["--lr", "inf"], "= inf: Input should be a finite"), (GRPO, ["--set", "clip_high=nan"], "clip_high = nan: Input should be a finite"),
    (SFT, ["--seed", "-1"], "seed = -1"), (EI, ["--seed", "-1"], "seed = -1"), (GRPO, ["--seed", "-1"], "seed = -1"),
    (SFT, ["--seed", "99999999999999999999"], "seed = 99999999999999999999"), (EI, ["--set", "seed=4294967296"], "seed = 4294967296"),
    (SFT, ["--n", "0"], "n_train = 0"), (SFT, ["--n", "99999999"], "n_train = 99,999,999, but micro has"), (EI, ["--set", "pool=64"], "questions = 128 a step"),
    (GRPO, ["--set", "rollout_batch_size=2560000"], "320,000 questions a step"), (SFT, ["--set", "learning_rat=1"], "learning_rat (is it learning_rate?)"),
    (GRPO, ["--set", "lerning_rate=1"], "is it learning_rate?"), (EI, ["--set", "question=8"], "is it questions?"),
    *[(command, ["--set", f"variant={name}"], f"{name!r} cannot be part") for command in (SFT, EI, GRPO) for name in ("", "..", ".x")],
    (SFT, ["--variant", ""], "'' cannot be part"), (SFT, ["--variant", ".."], "'..' cannot be part"), (EI, ["--set", "family=.."], "'..' cannot be part"),
    (SFT, ["--set", "model=nope"], "no model 'nope'"), (EI, ["--set", "model=nope"], "no model 'nope'"), (GRPO, ["--model", "nope"], "no model 'nope'"),
    (GRPO, ["--set", "model=nope"], "no model 'nope'"), (GRPO, ["--model", "runs/nope_seed0x"], "no model"),
    (SFT, ["--set", "variant=a/b"], "'a/b' cannot be part"), (EI, ["--set", "variant=a/b"], "'a/b' cannot be part"),
    (GRPO, ["--set", "variant=a/b"], "'a/b' cannot be part"), (GRPO, ["--variant", "a/b"], "'a/b' cannot be part"),
    (GRPO, ["--set", "family="], "'' cannot be part"), (EI, ["--set", "questions=99999999"], "questions = 99,999,999 a step, but micro has"),
    (SFT, ["--variant", "x" * 300], "more than 200 characters"), (EI, ["--set", f"variant={'é' * 150}"], "more than 200 characters"),
    (GRPO, ["--variant", "x" * 300], "more than 200 characters"), (GRPO, ["--set", f"family={'x' * 300}"], "more than 200 characters"),
    (GRPO, ["--server", "localhost:8000"], "takes http://HOST:PORT, not 'localhost:8000'"),
    (GRPO, ["--server", "http://10.0.0.2:8000", "--replicas", "2"], "leave --engine out too with --server"),
    (GRPO, ["--engine", "static", "--replicas", "2"], "leave them out with --engine static"),
    (GRPO, ["--engine", "fast"], "one of auto, vllm, static, transformers"),
    ("run_queue", ["nope"], "there are: tune"), *[("run_queue", ["sft", "--seeds", s], "0,1,2,3") for s in ("a", "", "-1", "0,0", "²", "4294967296")],
    ("run_queue", ["sft", "--seed", "9"], "--seed one of --seeds"), ("run_queue", ["sft", "--vllm", "[1]"], "takes a JSON object"),
])
def test_a_setting_that_cannot_be_is_one_line_and_leaves_nothing(command, args, expected, tmp_path):
    track = [] if "--track" in args else ["--track", "micro"]
    status, said, imported = call(command, *args, *track, *([] if command == "run_queue" else ["--root", str(tmp_path / "runs")]), cwd=tmp_path)
    assert status == 2 and expected in said and not imported & {"torch", "transformers", "vllm"}
    assert said.startswith("error: ") and (len(said.strip().splitlines()) == 1 or "no model" in said)  # or all ways to name one
    assert list(tmp_path.iterdir()) == []


TRACE = json.dumps({"prompt": "1+1=?", "response": " 2 </think> <answer> 2 </answer>", "expected_answer": "2"}) + "\n"
COMMANDS_THAT_RUN = [[SFT], [SFT, "sweep"], [SFT, "tune"], [SFT, "quality", "file"], [EI], [EI, "sweep"], [GRPO], [GRPO, "std-norm"]]


@pytest.mark.parametrize("command", COMMANDS_THAT_RUN, ids=" ".join)
@pytest.mark.parametrize("setting, expected", [
    ("model=nope", "no model 'nope'"), ("data=nope", "'nope' is no file"), ("eval_data=nope", "'nope' is no file"), ("prompt=nope", "shipped prompts"),
    ("family=a/b", "'a/b' cannot be part"), ("nope=1", "there are: family")])
def test_every_command_refuses_at_once_what_is_not_there(command, setting, expected, tmp_path):
    (tmp_path / "file").write_text(TRACE)
    if command[0] == GRPO:
        setting = setting.replace("data=nope", "train_data=nope") if setting[0] == "d" else setting
    status, said, imported = call(*command, "--track", "micro", "--set", setting, "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and expected in said and not imported & {"torch", "transformers", "vllm"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command, args, expected", [
    (SFT, ["sweep", "--size", "128", "--size", "99999999"], "n_train = 99,999,999"), (SFT, ["sweep", "--size", "-1"], "n_train = -1"),
    (SFT, ["tune", "--n", "99999999"], "n_train = 99,999,999"), (SFT, ["tune", "--set", "learning_rate=1"], "--set learning_rate: this command"),
    (SFT, ["tune", "--track", "nope"], "micro, pocket, course"), (SFT, ["sweep", "--track", "nope"], "micro, pocket, course"),
    (EI, ["sweep", "--track", "nope"], "micro, pocket, course"), (GRPO, ["std-norm", "--track", "nope"], "micro, pocket, course"),
    (EI, ["sweep", "--set", "questions=1500"], "questions = 3,000 a step"), (GRPO, ["std-norm", "--set", "n_grpo_steps=1", "--steps", "2"], "given twice"),
    (GRPO, ["std-norm", "--model", "nope"], "no model 'nope'"), (SFT, ["traces", "nope", "out.jsonl"], "no model 'nope'"),
    (SFT, ["traces", "micro", "file/out.jsonl"], "cannot write"), (SFT, ["filter", "traces.jsonl", "file/out.jsonl"], "cannot write"),
    (SFT, ["--seed", "1", "sweep"], "--seed belongs behind the command"), (EI, ["--set", "epochs=2", "sweep"], "--set belongs behind the command"),
    (GRPO, ["--set", "kl_coef=1", "std-norm"], "--set belongs behind the command"), ("evaluate_math", ["--n", "8", "grid"], "--n belongs behind"),
    ("run_queue", ["sft", "--root", "file"], "cannot write"),
])
def test_slips_in_sweeps_and_other_commands(command, args, expected, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "traces.jsonl").write_text(TRACE)
    takes_root = {"sweep", "tune", "std-norm"} & set(args) and "belongs" not in expected
    more = ["--root", str(tmp_path / "runs")] if takes_root else []
    if not {"filter", "--track"} & set(args):
        more += ["--track", "micro"]
    status, said, imported = call(command, *args, *more, cwd=tmp_path)
    assert status == 2 and expected in said and said.startswith("error: ") and not imported & {"torch", "transformers", "vllm"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "traces.jsonl"]


@pytest.mark.parametrize("command", COMMANDS_THAT_RUN, ids=" ".join)
def test_a_file_where_run_folders_should_go_is_refused_at_once(command, tmp_path):
    (tmp_path / "file").write_text(TRACE)
    status, said, imported = call(*command, "--track", "micro", "--root", str(tmp_path / "file"), cwd=tmp_path)
    assert status == 2 and "no folder that we can write to" in said and not imported & {"torch", "transformers", "vllm"}


@pytest.mark.parametrize("command, option", [(c, o) for c in ([SFT], [SFT, "sweep"], [EI], [EI, "sweep"], [GRPO], [SFT, "tune"])
                                             for o in (["--replicas", "0"], ["--gpu-memory-utilization", "7"], ["--gpu-memory-utilization", "0"])]
                         + [([GRPO, "lr-sweep"], o) for o in (["--seeds", "0"], ["--processes", "0"], ["--share", "7"], ["--steps", "0"])]
                         + [(["run_queue", "sft"], o) for o in (["--replicas", "0"], ["--share", "7"], ["--share", "nan"])])
def test_numbers_of_machines_that_cannot_be_are_refused(command, option, tmp_path):
    status, said, imported = call(*command, "--track", "micro", *option, "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and (option[0] in said or "n_grpo_steps = 0" in said) and not imported & {"torch", "transformers", "vllm"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[SFT, "sweep"], [EI], [GRPO, "std-norm"], ["evaluate_math"]], ids=" ".join)
def test_a_prompt_that_does_not_fit_the_model_leaves_nothing(command, tmp_path):
    prompt = ["--prompt", "r1_zero"] if command == ["evaluate_math"] else ["--set", "prompt=r1_zero"]
    status, said, _ = call(*command, "--track", "micro", *prompt, "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and "but the context of micro is 256" in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[SFT, "sweep"], [SFT, "tune"], [EI, "sweep"], [GRPO, "baselines"]], ids=" ".join)
@pytest.mark.parametrize("name", ["seed", "track", "variant"])
def test_a_sweep_says_that_a_setting_is_its_own(command, name, tmp_path):
    status, said, imported = call(*command, "--track", "micro", "--set", f"{name}=1", "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and f"--set {name}: this command has an option" in said and not imported & {"torch", "transformers", "vllm"}


@pytest.mark.parametrize("command, args, folder", [
    (SFT, ["--set", "n_train=32", "--set", "seed=3"], "sft_experiments_micro/n32-FEW_seed3"), (SFT, ["--set", "variant=mine", "--n", "32"], "sft_experiments_micro/mine_seed0"),
    (EI, ["--set", "seed=3"], "ei_micro/FEW_seed3"), (GRPO, ["--set", "seed=3", "--set", "learning_rate=.001"], "grpo_micro/learning_rate0.001-FEW_seed3")])
def test_a_setting_that_has_an_option_may_be_set_by_either(command, args, folder, tmp_path):
    """The run begins under its name; it is the preset with the answer that its folder is no folder."""
    few = {"n_eval": 8}
    names = "-".join(f"{name}{value}" for name, value in few.items())
    place = tmp_path / folder.replace("FEW", names)
    place.parent.mkdir(parents=True)
    place.touch()
    more = [word for name, value in few.items() for word in ("--set", f"{name}={value}")]
    status, said, _ = call(command, "--track", "micro", *args, *more, "--root", str(tmp_path), cwd=tmp_path)
    assert status == 2 and f"{place} is no folder" in said


def test_the_queue_wants_the_model_and_problems_of_its_track(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "CS336_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    status, said, imported = call("run_queue", "sft", "--track", "course", "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and "no model 'Qwen/Qwen2.5-Math-1.5B'" in said and not imported & {"torch", "transformers", "vllm"}
    assert not (tmp_path / "runs").exists()


def test_what_is_published_is_not_missing(tmp_path, monkeypatch):
    """`all` is no tenth command in the help, but runs what the tables lack; with nothing to run it says so."""
    shown = call("grpo_experiments", "--help", cwd=tmp_path)[1]
    assert "│ variants " in shown and "│ all " not in shown
    home = tmp_path / "results" / "grpo_experiments_micro"
    home.mkdir(parents=True)
    (home / "runs.csv").write_text("variant,seed\nbaseline,0\nno_std,1\n")
    monkeypatch.setenv("CS336_ROOT", str(tmp_path))
    missing = lambda *more: call("grpo_experiments", "std-norm", "--track", "micro", "--seeds", "2", "--missing", *more, cwd=tmp_path)[1]
    assert [line.split(",")[0] for line in missing("--dry-run").splitlines() if line] == ["no_std: 1 seeds", "baseline: 1 seeds"]
    (home / "runs.csv").write_text("variant,seed\n" + "".join(f"{v},{k}\n" for v in ("baseline", "no_std") for k in (0, 1)))
    assert missing() == "nothing is missing: all these runs are published\n"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["grpo_experiments_micro"]



@pytest.mark.parametrize("command", [[], ["std-norm"]])
def test_overlap_without_vllm_is_refused_before_anything_is_written(command, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from cs336_alignment import grpo_experiments, vllm_engine
    monkeypatch.setattr(vllm_engine, "vllm_problem", lambda: "vLLM is not installed.")
    done = CliRunner().invoke(grpo_experiments.app, [*command, "--track", "micro", "--set", "overlap=True", "--root", str(tmp_path / "runs")])
    assert done.exit_code == 2 and "overlap needs an engine" in done.output and list(tmp_path.iterdir()) == []


def test_sweeps_that_differ_do_not_meet(monkeypatch, tmp_path):
    """What a sweep would run, from its command: all names of all these calls are different."""
    from typer.testing import CliRunner
    from cs336_alignment import grpo_experiments as grpo, sft_math_reasoning as sft, sft_math_reasoning_ei as ei
    begun = []
    for module in (sft, ei):
        monkeypatch.setattr(module, "check_runs", lambda *args: None)
        monkeypatch.setattr(module, "run_all", lambda configs, *args: begun.extend(configs))
    monkeypatch.setattr(grpo, "check_problems", lambda config, **options: None)
    monkeypatch.setattr(grpo, "run_experiment", lambda name, runs, *args: begun.extend(config for config, _ in runs))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(TRACE)
    settings = ([], ["--set", "learning_rate=1e-3"], ["--set", "n_eval=64"], ["--set", "learning_rate=1.0000001e-3"])
    calls = [(sft, ["sweep", "--seed", "0", *s]) for s in settings] + [(ei, ["sweep", "--seed", "0", *s]) for s in settings]
    calls += [(sft, ["tune", *s]) for s in ([], ["--n", "64"], ["--n", "128"], ["--set", "evaluations=4"])]
    calls += [(sft, ["quality", str(tmp_path / f"{name}.jsonl"), "--seed", "0"]) for name in "ab"]
    calls += [(grpo, ["std-norm", "--seeds", "1", *s]) for s in ([], ["--steps", "8"], ["--model", "a/b"], ["--model", "a_b"])]
    for module, args in calls:
        done = CliRunner().invoke(module.app, [*args, "--track", "micro", "--root", str(tmp_path)])
        assert done.exit_code == 0, done.output
    names = [(config.family, config.variant) for config in begun]
    assert len(names) == len(set(names)) > len(calls)


def test_runs_that_differ_have_names_that_differ():
    from cs336_alignment.grpo_experiments import grpo_command_config
    from cs336_alignment.sft_math_reasoning import sft_command_config
    grpo = lambda given={}, named=None, *settings: grpo_command_config("micro", given, None, named, list(settings)).variant
    assert grpo({}, "dapo") == "dapo" != grpo({}, "dapo", "mask_overlong=False") and grpo({}, "dapo", "mask_overlong=True") == "dapo"
    assert len({grpo({"learning_rate": lr}) for lr in (1e-4, 1.0000001e-4, 1.00000001e-4)}) == 3
    assert len({grpo({"model": m}) for m in ("a/b", "a_b", "a b", "a__b")}) == 4
    sft = lambda path: sft_command_config("micro", {"traces": path}).variant
    paths = ["a/x.jsonl", "b/x.jsonl", "a_x.jsonl", "x.jsonl", ".x.jsonl", *(f"{folder}/" * 60 + "x.jsonl" for folder in ("deep", "down"))]
    assert len({sft(path) for path in paths}) == len(paths) and max(len(sft(path)) for path in paths) < 100
    from cs336_alignment.grpo_experiments import crossed_configs, grpo_config
    from cs336_alignment.runs import policy_name
    from cs336_alignment.sft_math_reasoning import tuning_configs
    prompts = ["micro", "a/b.prompt", "a_b.prompt", "../b.prompt"]
    crossed = [policy_name(c) for c in crossed_configs([grpo_config("micro", prompt=p, variant=f"v{i}") for i, p in enumerate(prompts)])]
    assert len(set(crossed)) == len(prompts) ** 2 and "grpo_prompts_micro/v0_asked_micro_seed0" in crossed
    tuning = [c.variant for c in tuning_configs("micro", (1e-4, 1.0000001e-4, 2e-5), (32,))]
    assert len(set(tuning)) == 3 and {"lr0.0001_batch32", "lr2e-05_batch32"} < set(tuning)
    assert grpo({"prompt": "a-seed1-kl_coef1"}) != grpo({"prompt": "a"}, None, "kl_coef=1")


def test_numbers_as_python_writes_them_are_numbers():
    from cs336_alignment.grpo_experiments import grpo_command_config
    from cs336_alignment.sft_math_reasoning import sft_command_config
    assert grpo_command_config("micro", {}, None, None, ["kl_coef=.1", "n_grpo_steps=1_0"]).kl_coef == 0.1
    assert sft_command_config("micro", {"n_train": 8, "learning_rate": 0.001}).learning_rate == 0.001


def test_a_module_for_later_is_imported_by_its_first_use(tmp_path):
    code = "import sys; from cs336_alignment.cli import later; t = later('torch'); print('torch' in sys.modules); t.float32; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert shown.split() == ["False", "True"]
