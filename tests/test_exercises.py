"""The exercise edition: every exercise fails when it is new and passes once it is solved; commands refuse before they write."""
import ast
import json
import re
from pathlib import Path

import pytest
from cs336_alignment import exercises
from cs336_alignment.exercises import EXERCISES, check, definition, notebooks, solution, write_edition

from .test_commands import call
from .test_house import dead

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "edition"
    write_edition(folder)
    return folder


def write(folder: Path, name: str, body: str) -> None:
    """The cell that defines `name` gets `body`, a whole definition, in its place."""
    path = folder / f"{EXERCISES[name][0]}.ipynb"
    nb = json.loads(path.read_text("utf-8"))
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and (node := definition(source, name)):
            cell["source"] = source.replace(ast.get_source_segment(source, node), body)
    path.write_text(json.dumps(nb), "utf-8")


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_fails_until_it_is_solved(edition, name):
    """Others stay unwritten: each is checked alone. The check calls the student's function: the unwritten one fails."""
    assert check(edition, name) == "not written yet"
    empty = source_of(edition, name)
    write(edition, name, solution(name))
    assert check(edition, name) == ""
    write(edition, name, empty)  # for whoever comes next


def source_of(folder: Path, name: str) -> str:
    cells = exercises.sources(folder / f"{EXERCISES[name][0]}.ipynb")
    source = next(source for source in cells if definition(source, name))
    return ast.get_source_segment(source, definition(source, name))
