"""The exercise edition: an exercise fails while it is unwritten and passes once it is solved; commands refuse before they write."""
import ast
import json
import shutil
import time
from pathlib import Path

import nbformat
import pytest

from cs336_alignment.exercises import (EXERCISES, check, checks_of, definition, known, notebooks, run_checks, solution, sources,
                                       without_body, write_edition)

from . import adapters
from .test_commands import call
from .test_house import HANDOUT, dead


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "edition"
    write_edition(folder)
    return folder


def fill(folder: Path, name: str, body: str) -> str:
    """Puts `body`, a whole definition, where the edition defines `name`; returns what stood there."""
    path = folder / f"{EXERCISES[name][0]}.ipynb"
    nb = json.loads(path.read_text("utf-8"))
    cell, = [c for c in nb["cells"] if c["cell_type"] == "code" and definition("".join(c["source"]), name)]
    source = "".join(cell["source"])
    before = ast.get_source_segment(source, definition(source, name))
    cell["source"] = source.replace(before, body)
    path.write_text(json.dumps(nb), "utf-8")
    return before


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_fails_until_it_is_solved(edition, name):
    """All others stay unwritten, so each is checked alone; and the student's function is what is checked."""
    assert check(edition, name) == "not written yet"
    stub = fill(edition, name, solution(name))
    assert check(edition, name) == ""
    fill(edition, name, stub)


WRONG = {  # exercise: a slip, and what the check says
    "compute_entropy": (("log_p.clamp_min(torch.finfo(log_p.dtype).min)", "log_p"), "close: nan"),
    "padded_batch": (("mask[:, 1:]}", "mask[:, :-1]}"), "fails at the check"),
    "sft_microbatch_train_step": (("    loss.backward()\n", ""), "lp.grad"),
    "compute_grpo_clip_loss": (("-torch.minimum", "-torch.maximum"), "close(loss"),
    "masked_mean": (("tensor.masked_fill(~mask, 0.0)", "(tensor * mask)"), "AssertionError"),
    "group_normalize": ((".masked_fill(equal, 0.0)", ""), "# exactly"),
    "grpo_microbatch_train_step": (("/ len(policy_log_probs) ", "/ 2 / len(policy_log_probs) "), "close("),
    "grpo_train_loop": (("        engine.load_weights(policy)\n", ""), "fails at the check"),
    "read_r1_zero": (("    if", "    iff"), "Python cannot read your cell"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_slip_is_named(edition, name):
    (right, wrong), expected = WRONG[name]
    assert right in solution(name)
    stub = fill(edition, name, solution(name).replace(right, wrong))
    said = check(edition, name)
    broken = edition / f"{EXERCISES[name][0]}.ipynb"  # may no longer parse: put the stub back as text
    broken.write_text(broken.read_text("utf-8").replace(json.dumps(solution(name).replace(right, wrong))[1:-1], json.dumps(stub)[1:-1]))
    assert expected in said, said
    assert check(edition, name) == "not written yet"


def test_own_helpers_and_imports_count(edition, tmp_path):
    edition = shutil.copytree(edition, tmp_path / "own")
    head = solution("masked_normalize").partition("    return")[0]
    fill(edition, "masked_normalize", head + "    return np.divide(1, normalize_constant) * kept(tensor, mask, dim)")
    path = edition / "06_sft_helpers.ipynb"
    nb = json.loads(path.read_text("utf-8"))
    assert "NameError: name" in check(edition, "masked_normalize")
    more = "import numpy as np\n\ndef kept(tensor, mask, dim):\n    return tensor.masked_fill(~mask.bool(), 0).sum(dim)"
    nb["cells"].insert(3, {"cell_type": "code", "source": more, "outputs": []})
    path.write_text(json.dumps(nb), "utf-8")
    assert check(edition, "masked_normalize") == ""


def test_a_check_that_does_not_call_the_function_fails():
    cells = ["#| export\nclass Pair:\n    def both(self):\n        return 2", "#| export\ndef two():\n    return 2",
             "assert Pair().both() == 2", "assert two() == 2  # two"]
    assert run_checks("Pair", cells, [cells[0]]) == 1
    with pytest.raises(NotImplementedError):
        run_checks("Pair", cells, [without_body(cells[0], "Pair")])
    with pytest.raises(AssertionError, match="no check called"):
        run_checks("two", [*cells[:3], "f = two\nassert f"], [cells[1]])
    with pytest.raises(ValueError, match="no cell checks two"):
        checks_of(cells[:3], "two")


def test_every_hook_of_the_course_is_an_exercise():
    hooks = {getattr(adapters, name).__name__ for name in dir(adapters) if name.startswith(("run_", "get_"))}
    assert hooks <= set(EXERCISES), f"add a hint to E13: {hooks - set(EXERCISES)}"


def test_the_edition_is_the_course_without_its_solutions(edition):
    for path in sorted(notebooks().glob("*.ipynb")):
        ours, theirs = (nbformat.read(p, 4) for p in (path, edition / path.name))
        nbformat.validate(theirs)
        assert not dead(edition / path.name)
        assert [c.id for c in ours.cells] == [c.id for c in theirs.cells if c.id in {c.id for c in ours.cells}]
        names = [name for name, (notebook, _) in EXERCISES.items() if notebook == path.stem]
        for name in names:
            body = ast.unparse(definition(solution(name), name).body[1:])
            assert not any(body in ast.unparse(ast.parse(c.source)) for c in theirs.cells if c.cell_type == "code"), name
            assert sum(f"**Exercise: `{name}`.**" in c.source for c in theirs.cells) == 1
        told = [t.removeprefix("answer:") for c in ours.cells for t in c.metadata.get("tags", []) if t.startswith("answer:")]
        assert set(told) <= set(HANDOUT) and all(sum(f"**`{n}`, in writing.**" in c.source for c in theirs.cells) for n in told)
        if "01" <= path.name < "18":
            assert sum(c.source.startswith("## Three questions") for c in ours.cells) == 1, path.name


def test_the_command_refuses_before_it_writes(edition, tmp_path):
    began = time.perf_counter()
    status, said, imported = call("exercises", "--help", cwd=tmp_path)
    assert (status, imported) == (0, set()) and "--solution" in said and time.perf_counter() - began < 2
    (tmp_path / "mine.txt").write_text("my work")
    for args, expected in [([str(tmp_path)], "is not empty"), ([str(tmp_path / "mine.txt")], "is not empty"),
                           (["--solution", "compute_entropi"], "there are: read_r1_zero, "), ([], "Usage"),
                           (["check", str(edition), "compute_entropi"], "there are: read_r1_zero, "),
                           (["check", str(tmp_path)], "is it a folder that this command wrote?")]:
        status, said, imported = call("exercises", *args, cwd=tmp_path)
        assert (status, imported) == (2, set()) and expected in said, (args, said)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "my work"
    assert known("masked_mean") and "def masked_mean" in call("exercises", "--solution", "masked_mean", cwd=tmp_path)[1]
    assert call("exercises", "new", cwd=tmp_path)[0] == 0 and (tmp_path / "new" / "06_sft_helpers.ipynb").is_file()
    assert "# YOUR CODE HERE" in "".join(sources(tmp_path / "new" / "06_sft_helpers.ipynb"))
