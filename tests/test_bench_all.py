"""bench/all.py: benches run in their order, each on GPUs of its own, and only what one has measured is stored."""
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer

BENCH = Path(__file__).resolve().parent.parent / "bench"
spec = importlib.util.spec_from_file_location("bench_all", BENCH / "all.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

STANDIN = '''
import json, os, sys, time
words, out = sys.argv[1:-2], sys.argv[-1]
result = json.load(open(out)) if os.path.exists(out) else {}
time.sleep(float(words[1]))
result.setdefault(words[0], {})["gpus"] = os.environ["CUDA_VISIBLE_DEVICES"]
json.dump(result, open(out, "w"))
sys.exit(int(words[2]))
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BENCH", tmp_path)
    (tmp_path / "standin.py").write_text(STANDIN)
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "one.json").write_text(json.dumps({"a": {"old": 1, "gpus": "?"}, "other": 3}))
    return tmp_path, tmp_path / "stored"


def test_jobs_have_gpus_of_their_own_and_store_what_they_measured(place):
    job = lambda gpus, key, seconds=0.0, status=0, limit=30: bench.Job(gpus, limit, "one", f"standin.py {key} {seconds} {status}")
    jobs = {"a": job(1, "a", 1.0), "b": job(1, "b", 1.0), "both": job(2, "c"), "last": job(1, "d"), "wrong": job(1, "e", 0, 3),
            "late": job(1, "f", 60, limit=1)}
    begin = time.monotonic()
    failed = bench.run_all(jobs, ["2", "GPU-5e"], *place, tick_s=0.05)
    assert failed == {"wrong": "exit code 3", "late": "ran past its 1 s"} and time.monotonic() - begin < 20
    stored = json.loads((place[1] / "one.json").read_text())
    assert stored["a"] == {"old": 1, "gpus": "2"} and stored["b"] == {"gpus": "GPU-5e"} and stored["other"] == 3
    assert {*stored["c"]["gpus"].split(",")} == {"2", "GPU-5e"} and "e" not in stored and "f" not in stored
    assert {file.stem for file in place[0].glob("*.done")} == {"a", "b", "both", "last"}


def test_after_ctrl_c_nothing_stays_on_a_gpu(place, monkeypatch):
    """What a job has started neither, though it is in a session of its own, as accelerate's workers are."""
    (place[0] / "parent.py").write_text("import subprocess, sys, time\n"
                                        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
                                        f"open({str(place[0] / 'child')!r}, 'w').write(str(child.pid))\ntime.sleep(60)\n")

    def interrupted(seconds, sleep=time.sleep):
        while not (place[0] / "child").exists() or not (place[0] / "child").read_text():
            sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run_all({"a": bench.Job(1, 30, "one", "parent.py")}, ["0"], *place)
    monkeypatch.undo()
    child, patience = int((place[0] / "child").read_text()), time.monotonic() + 10
    gone = lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    while not gone() and time.monotonic() < patience:
        time.sleep(0.05)
    assert gone()


def test_two_that_write_one_file_do_not_undo_each_other():
    before, first, second = {"x": {"a": 1, "b": 1}}, {"x": {"a": 2, "b": 1}}, {"x": {"a": 1, "b": 3}, "y": [1]}
    both = before
    for after in (first, second):
        both = bench.joined(both, bench.changed(before, after))
    assert both == {"x": {"a": 2, "b": 3}, "y": [1]}


@pytest.mark.parametrize("name", bench.JOBS)
def test_every_job_is_a_bench_that_knows_its_words(name, monkeypatch, tmp_path):
    script, *words = bench.JOBS[name].words.split()
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module(script.removesuffix(".py"))
    words += ["--out", str(tmp_path / "x.json")]
    app = typer.Typer()
    app.command()(module.main)
    read = getattr(module, "parse", None) or (lambda words: typer.main.get_command(app).make_context(script, words))
    read(words)  # not run; a word that it does not know raises


def test_the_list_says_what_there_is():
    done = subprocess.run([sys.executable, BENCH / "all.py", "--list"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in bench.JOBS)


def test_without_a_gpu_nothing_runs(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "all.py", "--folder", str(tmp_path / "new")], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "no GPU here" in done.stderr and not (tmp_path / "new").exists()
