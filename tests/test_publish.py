"""Published results say what the run folders said, whichever is read, and publishing again changes nothing."""
import math, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

from cs336_alignment.data import DataMissing
from cs336_alignment.runs import (append_jsonl, load_rollouts, load_runs, move_aside, publish, read_summary, run_folder,
                                  run_folders, run_table, summarise_log, write_json)

QUESTIONS = [f"A conversation.\nUser: {i} + {i} = ?\nAssistant: <think>" for i in range(6)]


def make_run(root, variant="a", seed=0, steps=12, every=2, finished=True, **changes):
    """The files of a small run, with all that is odd in real ones: NaN, counts, whole floats, more text than is kept."""
    config = {"family": "made", "track": "toy", "variant": variant, "seed": seed, "learning_rate": 1e-5 / 3, "eval_data": "held_out",
              "n_eval": 64, "temperature": 1.0, "model": "x/y", "note": None} | changes
    folder, lines = run_folder(config, root), []
    for step in range(steps + 1):
        if step:
            lines.append({"step": step, "wall_s": 123.456 + step, "train/loss": 1 / (step + seed + 3), "train/samples": 32 * step,
                          "train/tokens": 153412.0, "train/answer_accuracy": seed / 7})
        if step % every == 0:
            lines.append({"step": step, "wall_s": 123.5 + step, "eval/answer_accuracy": (step + seed) / 37, "eval/n": 64,
                          "eval/counts": {"(1,1)": step, "(0,0)": 64 - step}, "eval/ci95": [0.1, 1 / 3],
                          "eval/mean_tokens_correct": math.nan if step == 0 else 100 / 3, "eval/truncated": 0.0})
            for i, prompt in enumerate(QUESTIONS if finished else []):
                append_jsonl(folder / "rollouts.jsonl", {
                    "step": step, "prompt": prompt, "response": f" √{step}</think> <answer> {2 * i} </answer>", "ground_truth": str(2 * i),
                    "format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0, "n_tokens": 3, "token_entropy": 1 / 7,
                    "entropies": [0.0, 1 / 3, 2.0], "token_lengths": [1, 2, 3]})
    write_json(folder / "config.json", config)
    write_json(folder / "environment.json", {"commit": "0123456", "date": "2026-01-02", "versions": {"torch": "2"}, "gpu": None, "cpu_count": 2})
    for line in lines:
        append_jsonl(folder / "metrics.jsonl", {k: "NaN" if v != v else v for k, v in line.items()})
    if finished:
        summary = summarise_log(config, lines) | {"n_train": 1024, "gpu": None}
        summary["final"] = {k: "NaN" if v != v else v for k, v in summary["final"].items()}
        write_json(folder / "summary.json", summary)
    return folder


@pytest.fixture
def family(tmp_path):
    for variant in ("a", "b.old", "16"):
        for seed in range(2):
            make_run(tmp_path / "runs", variant, seed)
    make_run(tmp_path / "runs", "unfinished", finished=False)
    return tmp_path / "runs" / "made_toy"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def finished_only(frame):
    return frame[frame.variant != "unfinished"].reset_index(drop=True)


def test_published_twice_is_published_once(family, tmp_path):
    out = publish("made_toy", family, tmp_path / "results" / "made_toy")
    first = contents(out.parent)
    assert sorted(map(str, first)) == ["README.md"] + [f"made_toy/{name}" for name in ("metrics.csv", "rollouts.jsonl", "runs.csv")]
    publish("made_toy", family, out)
    assert contents(out.parent) == first
    for folder in run_folders(family)[::2]:  # another machine: some of the folders are not there
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    publish("made_toy", family, out)
    assert contents(out.parent) == first


def test_tables_are_the_same_from_folders_and_from_what_is_published(family, tmp_path):
    out = publish("made_toy", family, tmp_path / "made_toy")
    a, b = run_table(family), run_table(out)
    pd.testing.assert_frame_equal(a, b, check_exact=True)  # every digit
    assert list(a.variant) == ["16", "16", "a", "a", "b.old", "b.old"] and a.seed.tolist() == [0, 1] * 3
    row = b[b.variant == "a"].iloc[1]
    assert row.answer_accuracy == 13 / 37 and row.counts == {"(1,1)": 12, "(0,0)": 52} and row.ci95 == [0.1, 1 / 3]
    assert (row.eval_data, row.n_eval, row.steps, row.n_train, row.gpu, row.commit) == ("held_out", 64, 12, 1024, None, "0123456")
    assert row.config["learning_rate"] == 1e-5 / 3 and row.config["note"] is None and row.environment["versions"] == {"torch": "2"}


def test_curves_are_the_same_to_five_digits(family, tmp_path):
    out = publish("made_toy", family, tmp_path / "made_toy")
    a, b = finished_only(load_runs(family)), load_runs(out)
    pd.testing.assert_frame_equal(a[b.columns], b, rtol=5e-5, atol=0)
    assert set(a) == set(b) and len(b) == 6 * (12 + 7)
    assert b.wall_s.equals(a.wall_s) and b["train/tokens"].dropna().unique().tolist() == [153412.0]
    at = b[(b.variant == "a") & (b.seed == 0)]
    assert at[(at.step == 4) & at["eval/n"].notna()].samples.tolist() == [128] and at[at.step == 0].samples.tolist() == [0]
    assert "unfinished" in set(load_runs(family).variant)


def test_long_runs_keep_every_kth_step_and_all_evaluations(tmp_path):
    folder = make_run(tmp_path / "runs", steps=1001, every=143)
    out = publish("made_toy", folder.parent, tmp_path / "made_toy")
    a, b = load_runs(folder), load_runs(out)
    steps = set(range(0, 1002, 5)) | set(range(0, 1002, 143))
    assert set(b.step) == steps
    kept = a[a.step.isin(steps)].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept[b.columns], b, rtol=5e-5)


def test_a_few_rollouts_are_kept_whole(family, tmp_path):
    out = publish("made_toy", family, tmp_path / "made_toy")
    kept = load_rollouts(out)
    assert {(r["variant"], r["seed"]) for r in kept} == {("16", 0), ("a", 0), ("b.old", 0)}
    some = load_rollouts(out, variant="a", seed=0)
    assert [r["step"] for r in some] == [s for s in (0, 4, 6, 8, 12) for _ in range(4)]
    all_ = load_rollouts(family, variant="a", seed=0)
    assert len(all_) == 7 * len(QUESTIONS)
    short = {"entropies": [0, 0.33, 2], "token_entropy": 0.14286}
    assert load_rollouts(out, "a", 0, step=8) == [r | short for r in all_ if r["step"] == 8][:4]  # prompts too
    with pytest.raises(DataMissing, match=r"no rollouts of variant c in .*there are: {'variant': \['16', 'a', 'b.old'\]}"):
        load_rollouts(out, "c")


def test_rollouts_of_runs_evaluated_once_are_all_kept(tmp_path):
    for seed in range(2):
        make_run(tmp_path / "runs", seed=seed, steps=0)
    out = publish("made_toy", tmp_path / "runs" / "made_toy", tmp_path / "made_toy")
    assert [(r["seed"], r["prompt"]) for r in load_rollouts(out)] == [(seed, q) for seed in range(2) for q in QUESTIONS]


def test_of_many_runs_evaluated_once_one_policy_of_a_kind_keeps_its_rollouts(tmp_path):
    """Also rollouts whose prompt is not published (None of them must be taken for that of another)."""
    names = [f"quiz-model{k}_seed{seed}.0a1b{seed}c" for k in range(4) for seed in range(4)]
    for name in names:
        folder = make_run(tmp_path / "runs", name, steps=0)
        lines = (folder / "rollouts.jsonl").read_text().splitlines()
        (folder / "rollouts.jsonl").write_text("".join(line.replace('"prompt": ', '"hint": ') + "\n" for line in lines[:2]) + lines[2] + "\n")
    published = publish("made_toy", tmp_path / "runs" / "made_toy", tmp_path / "results" / "made_toy")
    rollouts = load_rollouts(published)
    assert sorted({r["variant"] for r in rollouts}) == names[::4]
    assert [("prompt" in r, "hint" in r) for r in rollouts[:3]] == [(False, True), (False, True), (True, False)]


def test_a_run_replaces_its_published_one_and_no_other(family, tmp_path):
    out = publish("made_toy", family, tmp_path / "made_toy")
    before = run_table(out)
    again = make_run(tmp_path / "later", "a", 1, steps=4)
    publish("made_toy", again.parent, out)
    after = run_table(out)
    assert after.steps.tolist() == [12, 12, 12, 4, 12, 12]
    others = [i for i in range(6) if i != 3]
    pd.testing.assert_frame_equal(after.loc[others], before.loc[others])
    assert load_runs(out).groupby(["variant", "seed"]).step.max()["a"].tolist() == [12, 4]


def test_moved_aside_is_no_run_but_any_name_is(tmp_path):
    kept, gone = make_run(tmp_path, "lr1.old1"), make_run(tmp_path, "b", steps=2)
    move_aside(gone)
    gone.rmdir()
    for source in (tmp_path, kept.parent):
        assert [f.name for f in run_folders(source)] == ["lr1.old1_seed0"]
        assert run_table(source).variant.tolist() == ["lr1.old1"]
    assert read_summary(kept.parent / "old" / "b_seed0.1")["steps"] == 2  # still there to look at
    assert [f.name for f in run_folders(kept.parent / "old")] == ["b_seed0.1"]
    make_run(tmp_path, "b", steps=4), move_aside(gone)
    assert read_summary(kept.parent / "old" / "b_seed0.2")["steps"] == 4


def test_names_are_looked_up(family, tmp_path, monkeypatch):
    monkeypatch.setenv("CS336_ROOT", str(tmp_path / "repo"))
    monkeypatch.chdir(tmp_path)
    working = tmp_path / "repo" / "results" / "runs" / "made_toy"
    working.parent.mkdir(parents=True)
    family.rename(working)
    assert len(run_table("made_toy")) == 6  # nothing published: the run folders
    publish("made_toy")
    (working / "a_seed0" / "summary.json").unlink()
    assert len(run_table("made_toy")) == 6 and len(run_table("runs/made_toy")) == 5
    assert len(run_table(tmp_path / "repo" / "results")) == 6  # all that is published
    assert run_table("made_toy").drop_duplicates(["family", "track"])[["family", "track"]].values.tolist() == [["made", "toy"]]
    with pytest.raises(DataMissing, match="no finished runs in nowhere_toy: run the experiment first"):
        run_table("nowhere_toy")


def test_the_command(family, tmp_path):
    root = tmp_path / "repo"
    (root / "results" / "runs").mkdir(parents=True)
    family.rename(root / "results" / "runs" / "made_toy")
    write_json(root / "results" / "families.json", {"made_toy": {"question": "Why?", "notebook": "E4_runs.ipynb", "heading": "Made", "command": "make it"}})
    env = {"CS336_ROOT": str(root), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = lambda *args: subprocess.run([sys.executable, "-m", "cs336_alignment.runs", *args], env=env, capture_output=True, text=True, cwd=tmp_path)
    done = run("publish", "made_toy")
    assert done.returncode == 0 and "6 runs" in done.stdout, done.stderr
    line = (root / "results" / "README.md").read_text().splitlines()[-1]
    assert line == ("| [made_toy](made_toy) | Why? | [E4_runs](../nbs/E4_runs.ipynb), Made | `make it` | "
                    "6: 3 variants, seeds 0–1 | 2 CPU cores | 2026-01-02 |")
    wrong = run("publish", "nothing_toy")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no finished runs in") and len(wrong.stderr.splitlines()) == 1
