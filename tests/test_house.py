"""The order of the house: how notebooks are stored, where their links lead, what the tree holds. Runs no notebook."""
import ast
import importlib.machinery
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import typer

from cs336_alignment import runs

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [*sorted((ROOT / "nbs").glob("*.ipynb")), ROOT / "README.ipynb"]
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}

HANDOUT = """math_baseline tokenize_prompt_and_output compute_entropy get_response_log_probs masked_normalize sft_microbatch_train_step
    log_generations sft_experiment expert_iteration_experiment compute_group_normalized_rewards compute_naive_policy_gradient_loss
    compute_grpo_clip_loss compute_policy_gradient_loss masked_mean grpo_microbatch_train_step grpo_train_loop grpo_learning_rate grpo_baselines
    think_about_length_normalization grpo_length_normalization grpo_group_standard_deviation grpo_off_policy grpo_off_policy_sweep
    grpo_off_policy_clip_ablation grpo_prompt_ablation leaderboard
    mmlu_baseline gsm8k_baseline alpaca_eval_baseline sst_baseline look_at_sft data_loading sft_script sft mmlu_sft gsm8k_sft alpaca_eval_sft
    sst_sft red_teaming look_at_hh dpo_loss dpo_training""".split()

TWICE = {"app", "main"}  # names that several modules may define: every command line has one of each

NOT_FOR_READERS = [  # idioms, history and sources that a reader does not have, paths of a machine
    r"told from", r"before that change", r"spec of §", r"grader-notes", r"(?<![\w.])/(?:work|root|home)/\w", r"/tmp/(?!\.\.\.)\w"]


def text(value) -> str:
    return value if isinstance(value, str) else "".join(value)


def cells(path: Path, kind: str | None = None) -> list[tuple[int, dict]]:
    found = enumerate(json.loads(path.read_text("utf-8"))["cells"])
    return [(i, cell) for i, cell in found if kind in (None, cell["cell_type"])]


def shown(path: Path) -> list[tuple[int, str, str]]:
    """(cell, what it is, text) of all that a reader of the notebook sees as text."""
    found = []
    for i, cell in cells(path):
        found.append((i, cell["cell_type"], text(cell["source"])))
        for out in cell.get("outputs", []):
            found.append((i, "output", text(out.get("text", ""))))
            found += [(i, mime, text(data)) for mime, data in out.get("data", {}).items() if mime.startswith("text/")]
    return found


def prose(path: Path) -> str:
    """All Markdown of a file or a notebook, without blocks of code."""
    source = path.read_text("utf-8") if path.suffix == ".md" else "\n\n".join(text(c["source"]) for _, c in cells(path, "markdown"))
    return re.sub(r"^```.*?^```", "", source, flags=re.M | re.S)


def headings(path: Path) -> list[tuple[int, str]]:
    """(level, text) of every heading, as a reader sees it."""
    found = re.findall(r"^(#{1,6}) +(.+)$", prose(path), re.M)
    return [(len(level), re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", h).strip()) for level, h in found]


def anchors(path: Path) -> set[str]:
    """Ids of headings: JupyterLab's (the heading's text, blanks as dashes) in a notebook, GitHub's in a Markdown file."""
    found = [heading for _, heading in headings(path)]
    if path.suffix == ".md":
        return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}
    return {h.replace(" ", "-") for h in found}


def links(path: Path) -> list[tuple[str, str]]:
    """(label, target) of every link to a file or a heading, and of every image: in Markdown, and in HTML that stands in it or in an output."""
    texts = [path.read_text("utf-8")] if path.suffix == ".md" else [
        t for _, kind, t in shown(path) if kind in ("markdown", "text/markdown", "text/html")]
    texts = [re.sub(r"`[^`\n]*`(?!\])", "", re.sub(r"^```.*?^```", "", t, flags=re.M | re.S)) for t in texts]
    found = [m for t in texts for m in re.findall(r"\[([^]\n]*)\]\(([^)\s]+)(?: \"[^\"]*\")?\)", t)]
    found += [m for t in texts for m in re.findall(r"^ {0,3}\[([^]\n]+)\]: *(\S+)", t, re.M)]
    found += [m for t in texts for m in re.findall(r"<(a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']*)", t)]
    return [(label, target) for label, target in found if not re.match(r"[a-z]+:", target)]


def dead(path: Path) -> list[str]:
    """Links of a file that lead nowhere."""
    found = []
    for _, target in links(path):
        name, _, anchor = unquote(target).partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file)):
            found.append(target)
    return found


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.name)


@each(NOTEBOOKS)
def test_opens_without_a_question(path):
    assert json.loads(path.read_text("utf-8"))["metadata"] == {"kernelspec": KERNELSPEC}, "run .ci/run_notebooks --clean"


@each(NOTEBOOKS)
def test_stored_outputs(path):
    for i, cell in cells(path, "code"):
        kinds = [(out["output_type"], out.get("name")) for out in cell["outputs"]]
        assert "error" not in [kind for kind, _ in kinds], f"cell {i} failed"
        pieces = [a for a, b in zip(kinds, kinds[1:]) if a == b and a[0] == "stream"]
        assert not pieces, f"cell {i}: a stream in pieces"
        for out in cell["outputs"]:
            data = out.get("data", {})
            assert "widget-view" not in str([*data]), f"cell {i}: a widget"
            assert not re.search(r"\d+%\|.*\|", text(out.get("text", "")) + text(data.get("text/plain", ""))), f"cell {i}: a progress bar"
            assert not re.search(r'id="T_[0-9a-f]{5}"', text(data.get("text/html", ""))), f"cell {i}: a table with a random id"


@each(NOTEBOOKS)
def test_cells_fit_on_a_screen(path):
    for i, cell in cells(path, "code"):
        lines = text(cell["source"]).splitlines()
        one_view = 45 if re.match(r"(#.*\n)?(@dataclass\n)?class ", text(cell["source"])) else 28  # a class is one view
        assert len(lines) <= one_view, f"cell {i} has {len(lines)} lines"
        wide = [f"{len(line)}: {line}" for line in lines if len(line) > 120]
        assert not wide, f"cell {i}: {wide}"


@each(NOTEBOOKS)
def test_says_only_what_a_reader_can_follow(path):
    found = [(i, m[0]) for i, kind, t in shown(path) if kind != "text/html" for p in NOT_FOR_READERS for m in [re.search(p, t)] if m]
    assert not found


@each([*NOTEBOOKS, *sorted(ROOT.glob("*.md")), ROOT / "data" / "README.md", ROOT / "results" / "README.md"])
def test_no_dead_link(path):
    assert not dead(path)


tops = SimpleNamespace(**runpy.run_path(str(ROOT / ".ci" / "tops")))


@each(NOTEBOOKS[:-1])
def test_top_is_the_one_of_the_course_map(path):
    (_, _), (_, cell), *_ = cells(path)
    made = tops.top(path.stem, path.parent)
    assert (cell["id"], text(cell["source"])) == (made["id"], made["source"]), "run .ci/tops"
    assert len(made["source"].encode()) <= 3100


def test_stale_tops_are_seen(tmp_path):
    folder = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs", folder)

    def change(name, old, new):
        path = folder / f"{name}.ipynb"
        before = path.read_text("utf-8")
        assert old in before
        path.write_text(before.replace(old, new), "utf-8")

    change("11_grpo_helpers", "# 11 · GRPO helpers", "# 11 · Helpers")
    change("00_course_map", '(\\"E8_speed\\", ', '(\\"E9_speed\\", ')
    (folder / "E8_speed.ipynb").rename(folder / "E9_speed.ipynb")
    for name in ("12_grpo", "E9_speed", "E7_loop_in_earnest"):
        with pytest.raises(AssertionError, match="run .ci/tops"):
            test_top_is_the_one_of_the_course_map(folder / f"{name}.ipynb")
        assert tops.write(name, folder) and not tops.write(name, folder)
        test_top_is_the_one_of_the_course_map(folder / f"{name}.ipynb")


def problem_rows() -> list[list[str]]:
    """[problems, place, status] of every row of the map's table."""
    table, = [t for _, kind, t in shown(ROOT / "nbs" / "00_course_map.ipynb") if kind == "text/markdown" and t.startswith("| problem |")]
    return [row.split("|")[1:-1] for row in table.splitlines()[2:]]


def test_map_names_every_problem():
    path, rows = ROOT / "nbs" / "00_course_map.ipynb", problem_rows()
    named = [name for problems, *_ in rows for name in re.findall(r"`(\w+)`", problems)]
    assert sorted(named) == sorted(HANDOUT)
    for problems, place, status in rows:  # done and measured have a place, and what has none says so
        assert "](" in place or status.strip().startswith("not yet"), problems
    notebooks = {target.partition("#")[0] for _, target in links(path)}
    assert {p.name for p in NOTEBOOKS[:-1] if p.name[0].isdigit()} - {path.name} <= notebooks


@each([path for path in NOTEBOOKS if path.name != "README.ipynb"])  # which makes two pages
def test_headings_make_a_table_of_contents(path):
    (first, title), *rest = headings(path)
    assert first == 1 and text(cells(path)[0][1]["source"]).startswith(f"# {title}"), "begin with a title"
    levels, names = [first, *(level for level, _ in rest)], [title, *(name for _, name in rest)]
    assert levels.count(1) == 1, "one title"
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:])), "a level is skipped"
    assert len(set(names)) == len(names), "a heading repeats"
    assert not [name for name in names if len(name) > 70]


@each(NOTEBOOKS)
def test_no_sentence_stands_twice(path):
    said = [line for _, cell in cells(path, "markdown") for line in text(cell["source"]).splitlines() if len(line) > 100]
    assert not [line for line in set(said) if said.count(line) > 1]


def results_of(path: Path) -> list[list[float]]:
    """The numbers that a notebook's outputs show, one list an output, row by row where it is a table."""
    found = []
    for _, cell in cells(path, "code"):
        for out in cell["outputs"]:
            data = out.get("data", {})
            html = re.sub(r"<[^>]*>", " ", text(data.get("text/html", "")))
            said = html or text(data.get("text/markdown", "")) or text(data.get("text/plain", "")) or text(out.get("text", ""))
            found.append([float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", said)])
    return found


def unfounded(path: Path) -> list[list[str]]:
    """Results "a ± b" and "a% [b, c]" of a notebook's prose, in the outputs' units or in percent of them, that no output shows side by side, nor one
    of a notebook that the same cell links."""
    found = []
    for _, cell in cells(path, "markdown"):
        source = text(cell["source"])
        linked = [path.parent / name for name in re.findall(r"\]\((\w+\.ipynb)", source)]
        shown = [numbers for place in [path, *linked] for numbers in results_of(place)]
        fits = lambda x, word: any(abs(x * k - float(word)) < 0.5001 * 10 ** -len(word.partition(".")[2]) for k in (1, 100))
        number = r"(\d+(?:\.\d+)?)"
        said = re.findall(rf"{number} ± {number}()|{number}% \[{number}, {number}\]", source)
        for words in ([word for word in match if word] for match in said):
            if not any(fits(x, words[0]) and all(any(fits(y, word) for y in row[i + k:i + k + 2]) for k, word in enumerate(words) if k)
                       for row in shown for i, x in enumerate(row)):
                found.append(words)
    return found


@each(NOTEBOOKS)
def test_results_in_prose_stand_in_an_output(path):
    assert not unfounded(path)


@each([*NOTEBOOKS, ROOT / "README.md", ROOT / "README.zh.md", ROOT / "results" / "families.json"])
def test_stages_of_the_queue_exist(path):
    from cs336_alignment.run_queue import STAGES
    named = re.findall(r"run_queue\.py((?: [a-z][a-z0-9_]*)+)", path.read_text("utf-8"))
    assert not {stage for stages in named for stage in stages.split()} - set(STAGES) - {"of"}


def unlinked(answer: str, problems: list[str]) -> list[str]:
    """What the text under a heading that answers problems of the handout lacks."""
    return [name for name in problems if f"`{name}`" not in answer] + ([] if tops.HANDOUT in answer else ["a link to the handout"])


@pytest.mark.parametrize("problems, place, _", problem_rows(), ids=lambda cell: "".join(re.findall(r"`(\w+)`", cell)[:1]))
def test_every_answer_names_its_problem_and_links_the_handout(problems, place, _):
    file, anchor = re.search(r"\((\w+\.ipynb)#([^)]*)\)", place).groups()
    parts = re.split(r"^#+ +(.+)$", prose(ROOT / "nbs" / file), flags=re.M)
    answer, = [h + below for h, below in zip(parts[1::2], parts[2::2]) if re.sub(r"[`*]", "", h).strip().replace(" ", "-") == anchor]
    assert not unlinked(answer, re.findall(r"`(\w+)`", problems))
    assert unlinked(answer.replace(tops.HANDOUT, ""), ["nothing"]) == ["nothing", "a link to the handout"]


def test_public_names_have_one_meaning():
    owners = {}
    for path in (ROOT / "cs336_alignment").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                   and not any(ast.unparse(d).startswith("app.") for d in node.decorator_list)}  # a command has its module before its name
        defined |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__" and isinstance(node.value, ast.List):
                for name in ast.literal_eval(node.value):
                    if name in defined:
                        owners.setdefault(name, []).append(path.stem)
    assert owners, "no module has an __all__"
    twice = {name: sorted(where) for name, where in owners.items() if len(where) > 1 and name not in TWICE}
    assert not twice, twice


def upward(modules: dict[str, str], layers: list[str]) -> list[tuple[str, str]]:
    """(module, what it imports later) where `later("cs336_alignment.…")`, which lint-imports does not see, goes up the layers."""
    rank = {name: i for i, layer in enumerate(reversed(layers)) for name in re.findall(r"\w+", layer)}
    found = [(module, name) for module, t in modules.items() for name in re.findall(r'later\("cs336_alignment\.(\w+)"\)', t)]
    return [(module, name) for module, name in found if rank[name] >= rank[module]]


def test_late_imports_keep_the_layers():
    contract, = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = {path.stem: path.read_text("utf-8") for path in (ROOT / "cs336_alignment").glob("*.py")}
    assert not upward(modules, contract["layers"])
    planted = {"inference": 'grpo = later("cs336_alignment.grpo")', "grpo": 'inference = later("cs336_alignment.inference")'}
    assert upward(planted, contract["layers"]) == [("inference", "grpo")]


def test_index_of_results_is_the_one_that_publish_writes(tmp_path):
    for path in [ROOT / "results" / "families.json", *(ROOT / "results").glob("*/runs.csv")]:
        copy = tmp_path / path.relative_to(ROOT / "results")
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    runs.write_index(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (ROOT / "results" / "README.md").read_text("utf-8")


def test_every_family_has_its_figure_and_its_command():
    about = json.loads((ROOT / "results" / "families.json").read_text("utf-8"))
    assert sorted(about) == [path.name for path in runs.published_families(ROOT / "results")]
    for family, said in about.items():
        place = ROOT / "nbs" / said["notebook"]
        assert said["heading"].replace(" ", "-") in anchors(place), (family, said["heading"])
        assert any(family in text(cell["source"]) for _, cell in cells(place, "code")), f"{family}: {place.name} does not read it"
        script, *rest = said["command"].removeprefix("python ").split()
        module = importlib.import_module("cs336_alignment." + Path(script).stem)
        options = [word for word in rest if word.startswith("--")]
        known = {o for command in typer_options(module) for o in command}
        assert (ROOT / script).exists() and set(options) <= known, (family, set(options) - known)


def typer_options(module) -> list[list[str]]:
    """The option names of every command of a module."""
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    group = typer.main.get_command(app)
    commands = [group, *getattr(group, "commands", {}).values()]
    return [[o for p in c.params for o in p.opts] for c in commands]


def facts(page: str) -> dict[str, Counter]:
    """What no translation changes: numbers, commands and code, links (each page's own figures count as the other's)."""
    page = page.replace(".zh.", ".")
    return {"numbers": Counter(re.findall(r"\d+(?:[.,]\d+)*%?", page)), "links": Counter(re.findall(r"\]\(([^)\s]+)\)", page)),
            "code": Counter(re.findall(r"```.*?```|`[^`\n]+`", page, re.S))}


def untranslated(english: str, chinese: str) -> dict[str, Counter]:
    """Facts that one of two pages lacks, or says less often."""
    here, there = facts(english), facts(chinese)
    return {kind: found for kind in here if (found := (here[kind] - there[kind]) + (there[kind] - here[kind]))}


def front_pages() -> list[str]:
    return [(ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md")]


def test_front_pages_say_the_same():
    assert not untranslated(*front_pages()), "each cell tagged en in README.ipynb has its zh beside it: change both, then .ci/readme"


def test_a_front_page_that_lacks_a_number_is_seen():
    english, chinese = front_pages()
    number, = re.findall(r"\+\d+\.\d ± \d+\.\d", chinese)[:1]
    assert untranslated(english, chinese.replace(number, "", 1)).keys() == {"numbers"}
    assert untranslated(english, chinese.replace("`uv run jupyter lab`", "uv", 1)).keys() == {"code"}
    assert "links" in untranslated(english.replace("](nbs/08_sft.ipynb)", "](nbs/09_expert_iteration.ipynb)", 1), chinese)


def test_tree_is_small():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout  # nothing in a copy without git
    files = [ROOT / name for name in tracked.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) <= 250
    assert sum(file.stat().st_size for file in files) <= 18e6  # most of it results


# The checks above can fail: each kind of disorder, made on purpose.
def plant(tmp_path, *new_cells, metadata=None):
    nb = {"cells": [{"id": str(i), "metadata": {}, **cell} for i, cell in enumerate(new_cells)],
          "metadata": {"kernelspec": KERNELSPEC} if metadata is None else metadata, "nbformat": 4, "nbformat_minor": 5}
    path = tmp_path / "00_planted.ipynb"
    path.write_text(json.dumps(nb))
    return path


def code(source="1", *outputs):
    return {"cell_type": "code", "source": source, "outputs": list(outputs)}


def said(words, name="stdout"):
    return {"output_type": "stream", "name": name, "text": words}


def markdown(source):
    return {"cell_type": "markdown", "source": source}


DISORDER = {
    "no kernelspec": (test_opens_without_a_question, [], {}),
    "a stream in pieces": (test_stored_outputs, [code("1", said("a"), said("b"))], None),
    "an error": (test_stored_outputs, [code("1", {"output_type": "error", "ename": "E", "evalue": "", "traceback": []})], None),
    "a widget": (test_stored_outputs, [code("1", {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}})], None),
    "a bar": (test_stored_outputs, [code("1", said("  0%|          | 0/20 [00:00<?, ?it/s]", "stderr"))], None),
    "a difference that no output shows": (test_results_in_prose_stand_in_an_output, [markdown("better by 5.6 ± 1.0"), code("1", said("5.6 ± 1.2"))], None),
    "an interval that no output shows": (test_results_in_prose_stand_in_an_output, [markdown("right: 2.0% [1.3, 2.9]"), code("1", said("2.0 [1.3, 2.8]"))], None),
    "a random id": (test_stored_outputs, [code("1", {"output_type": "execute_result", "data": {"text/html": '<table id="T_0a1b2">'}})], None),
    "a wide line": (test_cells_fit_on_a_screen, [code("x" * 121)], None),
    "a long cell": (test_cells_fit_on_a_screen, [code("x\n" * 29)], None),
    "an idiom": (test_says_only_what_a_reader_can_follow, [markdown("cannot be told from zero")], None),
    "a machine's path": (test_says_only_what_a_reader_can_follow, [code("1", said("saved to /tmp/tmpab12/x"))], None),
    "no title": (test_headings_make_a_table_of_contents, [markdown("## Here")], None),
    "two titles": (test_headings_make_a_table_of_contents, [markdown("# Here\n# There")], None),
    "a level skipped": (test_headings_make_a_table_of_contents, [markdown("# Here\n### There")], None),
    "a heading twice": (test_headings_make_a_table_of_contents, [markdown("# Here\n## There\n## There")], None),
    "a long heading": (test_headings_make_a_table_of_contents, [markdown("# Here\n## " + "h" * 71)], None),
    "a dead file": (test_no_dead_link, [markdown("[x](13_nothing.ipynb)")], None),
    "a dead heading": (test_no_dead_link, [markdown("# Here\n[x](00_planted.ipynb#There)")], None),
    "a dead heading in the same notebook": (test_no_dead_link, [markdown("# Here\n[x](#There)")], None),
    "a link that is named below": (test_no_dead_link, [markdown("[x][y]\n\n[y]: no.md")], None),
    "an image that is not there": (test_no_dead_link, [markdown("![x](no.png)")], None),
    "a dead link in HTML": (test_no_dead_link, [code("1", {"output_type": "execute_result", "data": {"text/html": "<a class='x' href='no.md'>x</a>"}})], None),
    "a dead link in an output": (test_no_dead_link, [code("1", {"output_type": "execute_result", "data": {"text/markdown": "[x](no.md)"}})], None),
}


@pytest.mark.parametrize("disorder", DISORDER)
def test_disorder_is_seen(disorder, tmp_path):
    check, new_cells, metadata = DISORDER[disorder]
    with pytest.raises(AssertionError):
        check(plant(tmp_path, *new_cells, metadata=metadata))


def test_order_is_not_disorder(tmp_path):
    path = plant(tmp_path, markdown("# Here we are\n## `f` *and* more\n```\n# no heading\n[x](no.md)\n```\n### Deeper\n## Up\n"
                                    "[a](#Here-we-are) [b](00_planted.ipynb#f-and-more) [c](https://x.y) [d](#Here-we-are)\n`f[0](no)`, 5.6 ± 1.0 points, 2.0% [1.3, 2.9]"),
                 code("x" * 120, said("100% of 20, gap 0.0561, half 0.0098; 0.02 from 0.013 to 0.029", "stdout"), said("b", "stderr")))
    for check in (test_opens_without_a_question, test_stored_outputs, test_cells_fit_on_a_screen, test_says_only_what_a_reader_can_follow,
                  test_no_dead_link, test_headings_make_a_table_of_contents, test_results_in_prose_stand_in_an_output):
        check(path)


@pytest.fixture(scope="session")
def build():
    loader = importlib.machinery.SourceFileLoader("build_site", str(ROOT / "docs" / "build"))
    loader.exec_module(module := importlib.util.module_from_spec(importlib.util.spec_from_loader("build_site", loader)))
    return module


@pytest.mark.parametrize("html, wrong", [
    ('<a href="no.html">', "no such file"), ('<a href="b.html#no">', "no such heading"), ('<a href="#no">', "no such heading"),
    ('<img src="no.png">', "no such file"), ('<img src="https://example.org/x.png">', "fetched from elsewhere"),
    ('<script src="//cdn.example.org/x.js">', "fetched from elsewhere"), ('<link rel="stylesheet" href="https://example.org/x.css">', "fetched from elsewhere"),
    ('<a href="https://nowhere/x">', "no address"), ('<a href="htp://example.org/x">', "no address")])
def test_site_with_a_fault(build, tmp_path, html, wrong):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h1 id="here">')
    fault, = build.faults(tmp_path)
    assert fault.startswith("a.html: ") and fault.endswith(wrong)


def test_site_without_a_fault(build, tmp_path):
    (tmp_path / "a b.html").write_text('<a href="sub/b.html#Caf%C3%A9"><a href="https://example.org/x#y"><a href="#"><img src="data:image/png;base64,AA">')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="Café"><a href="../a%20b.html">')
    (tmp_path / "site.css").write_text("a {background: url(data:x)} @font-face {src: url('x.ttf')}")
    assert not build.faults(tmp_path)
    (tmp_path / "site.css").write_text("@import 'https://example.org/x.css'; a {background: url(//example.org/x.png)}")
    assert len(build.faults(tmp_path)) == 2
