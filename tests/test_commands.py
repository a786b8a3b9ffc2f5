"""Commands answer `--help` and slips at once, which is a matter of what they have imported by then."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "vllm", "pandas", "scipy", "matplotlib", "sympy", "wandb"}
COMMANDS = ["evaluate_math", "sft_math_reasoning", "sft_math_reasoning_ei", "grpo_experiments", "grpo", "run_queue", "runs", "data",
            "data_sets", "drgrpo_grader"]
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
])
def test_slips_in_the_zero_shot_command_import_nothing_heavy(args, expected, tmp_path):
    status, said, imported = call("evaluate_math", *args, cwd=tmp_path)
    assert (status, imported) == (2, set()) and expected in said
    assert list(tmp_path.iterdir()) == []  # and leave nothing behind


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
    (SFT, ["--set", "seed=1"], "--set seed: this command has an option"), (SFT, ["--set", "n_train=16"], "--set n_train: this command"),
    (SFT, ["--set", "track=pocket"], "--set track: this command"), (EI, ["--set", "seed=1"], "--set seed: this command"),
    (EI, ["--set", "track=pocket"], "--set track: this command"), (GRPO, ["--set", "track=pocket"], "--set track: this command"),
    (GRPO, ["--lr", "nan"], "learning_rate = nan: a number is needed"), (SFT, ["--set", "temperature=Infinity"], "temperature = inf: a number"),
    (EI, ["--set", "learning_rate=NaN"], "learning_rate = nan: a number"), (GRPO, ["--set", "cliprange=-Infinity"], "cliprange = -inf: a number"),
    (SFT, ["--set", "model=nope"], "no model 'nope'"), (EI, ["--set", "model=nope"], "no model 'nope'"), (GRPO, ["--model", "nope"], "no model 'nope'"),
    (GRPO, ["--set", "model=nope"], "no model 'nope'"), (GRPO, ["--model", "runs/nope_seed0x"], "no model"),
    (SFT, ["--set", "variant=a/b"], "'a/b' cannot be part"), (EI, ["--set", "variant=a/b"], "'a/b' cannot be part"),
    (GRPO, ["--set", "variant=a/b"], "'a/b' cannot be part"), (GRPO, ["--variant", "a/b"], "'a/b' cannot be part"),
    (GRPO, ["--set", "family="], "'' cannot be part"), (EI, ["--set", "questions=99999999"], "questions = 99,999,999 a step, but micro has"),
    ("run_queue", ["nope"], "there are: tune"), ("run_queue", ["sft", "--seeds", "a"], "0,1,2,3"),
])
def test_a_setting_that_cannot_be_is_one_line_and_leaves_nothing(command, args, expected, tmp_path):
    track = [] if "--track" in args else ["--track", "micro"]
    status, said, imported = call(command, *args, *track, *([] if command == "run_queue" else ["--root", str(tmp_path / "runs")]), cwd=tmp_path)
    assert status == 2 and expected in said and not imported & {"torch", "transformers", "vllm"}
    assert said.startswith("error: ") and (len(said.strip().splitlines()) == 1 or "no model" in said)  # or all ways to name one
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[SFT], [SFT, "sweep"], [EI], [EI, "sweep"], [GRPO], [GRPO, "std-norm"]], ids=" ".join)
def test_a_file_where_run_folders_should_go_is_refused_at_once(command, tmp_path):
    (tmp_path / "file").touch()
    status, said, imported = call(*command, "--track", "micro", "--root", str(tmp_path / "file"), cwd=tmp_path)
    assert status == 2 and "is a file, but run folders" in said and not imported & {"torch", "transformers", "vllm"}


@pytest.mark.parametrize("command, option", [(c, o) for c in ([SFT], [SFT, "sweep"], [EI], [EI, "sweep"], [GRPO], [SFT, "tune"])
                                             for o in (["--replicas", "0"], ["--gpu-memory-utilization", "7"], ["--gpu-memory-utilization", "0"])]
                         + [([GRPO, "lr-sweep"], o) for o in (["--seeds", "0"], ["--processes", "0"], ["--share", "7"], ["--steps", "0"])])
def test_numbers_of_machines_that_cannot_be_are_refused(command, option, tmp_path):
    status, said, imported = call(*command, "--track", "micro", *option, "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and (option[0] in said or "n_grpo_steps = 0" in said) and not imported & {"torch", "transformers", "vllm"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [SFT, EI, GRPO])
def test_a_prompt_that_does_not_fit_the_model_leaves_nothing(command, tmp_path):
    status, said, _ = call(command, "--track", "micro", "--set", "prompt=r1_zero", "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and "but the context of micro is 256" in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[SFT, "sweep"], [SFT, "tune"], [EI, "sweep"], [GRPO, "baselines"]], ids=" ".join)
@pytest.mark.parametrize("name", ["seed", "track", "variant"])
def test_a_sweep_says_that_a_setting_is_its_own(command, name, tmp_path):
    status, said, imported = call(*command, "--track", "micro", "--set", f"{name}=1", "--root", str(tmp_path / "runs"), cwd=tmp_path)
    assert status == 2 and f"--set {name}: this command has an option" in said and not imported & {"torch", "transformers", "vllm"}


def test_runs_that_differ_have_names_that_differ():
    from pathlib import Path
    from cs336_alignment.grpo_experiments import grpo_command_config
    from cs336_alignment.sft_math_reasoning import sft_command_config
    grpo = lambda given={}, named=None, *settings: grpo_command_config("micro", given, None, named, list(settings)).variant
    assert grpo({}, "dapo") == "dapo" != grpo({}, "dapo", "mask_overlong=False") and grpo({}, "dapo", "mask_overlong=True") == "dapo"
    assert len({grpo({"learning_rate": lr}) for lr in (1e-4, 1.0000001e-4, 1.00000001e-4)}) == 3
    assert len({grpo({"model": m}) for m in ("a/b", "a_b", "a b", "a__b")}) == 4
    sft = lambda path: sft_command_config("micro", None, 0, Path(path), None, {}).variant
    assert len({sft(p) for p in ("a/x.jsonl", "b/x.jsonl", "a_x.jsonl", "x.jsonl")}) == 4


def test_numbers_as_python_writes_them_are_numbers():
    from cs336_alignment.grpo_experiments import grpo_command_config
    from cs336_alignment.sft_math_reasoning import sft_command_config
    assert grpo_command_config("micro", {}, None, None, ["kl_coef=.1", "n_grpo_steps=1_0"]).kl_coef == 0.1
    assert sft_command_config("micro", 8, 0, None, None, {"learning_rate": 0.001}).learning_rate == 0.001


def test_a_module_for_later_is_imported_by_its_first_use(tmp_path):
    code = "import sys; from cs336_alignment.cli import later; t = later('torch'); print('torch' in sys.modules); t.float32; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert shown.split() == ["False", "True"]
