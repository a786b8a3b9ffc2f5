"""Commands answer `--help` and slips at once, which is a matter of what they have imported by then."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "vllm", "pandas", "scipy", "matplotlib", "sympy", "wandb"}
COMMANDS = ["evaluate_math"]
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


def test_a_module_for_later_is_imported_by_its_first_use(tmp_path):
    code = "import sys; from cs336_alignment.cli import later; t = later('torch'); print('torch' in sys.modules); t.float32; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert shown.split() == ["False", "True"]
