"""How Sphinx makes the site from the notebooks as they are stored; `docs/build` runs it. Sources are the repository's own files: its root is Sphinx's source folder."""
import json, re
from functools import partial
from importlib.resources import files
from pathlib import Path

import math_core
from docutils import nodes
from myst_parser.slugs import github_slugify
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
TOC = {"The course": "nbs/[01]*.ipynb", "The supplement": "nbs/2*.ipynb", "The engine room": "nbs/[!0-9]*.ipynb",
       "The project": ["README.zh.md", "CONTRIBUTING.md", "LOG.md", "results/README.md", "data/README.md"]}

project = html_title = "CS336 assignment 5, executable"
copyright, html_show_copyright, html_show_sphinx, language = "", False, False, "en"
root_doc = "README"
include_patterns = ["README.md", "nbs/*.ipynb", *TOC["The project"]]
exclude_patterns = [".*", "_build", "results/runs"]
extensions = ["myst_nb"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # links in outputs lead to pages, too
nb_ipywidgets_js = {}               # no notebook stores a widget; the default would ask a CDN for scripts
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6

html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "use_fullscreen_button": False, "navbar_persistent": []}
html_static_path = ["site.css", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_sourcelink_suffix = ""
html_use_index = html_domain_indices = False
html_math_renderer = "mathml"
to_mathml = math_core.LatexToMathML(fancy_error=False).convert_with_local_state

SEARCH = """document.addEventListener("DOMContentLoaded", () => {
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;  // a page on the disk may not fetch another
  const read = Search.htmlToText;  // excerpts from the article, without the buttons and menus above it
  Search.htmlToText = (html, anchor) => read(html.replace(/(role="main"[^>]*>)[^]*?(?=<article)/, "$1"), anchor);
});"""


def natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def toctrees() -> str:
    """The course map as the site's menu."""
    found = {caption: [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob(names), key=natural)] if isinstance(names, str) else names
             for caption, names in TOC.items()}
    return "".join(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n" + "\n".join(names) + "\n```\n" for caption, names in found.items())


def source(app, docname: str, content: list[str]) -> None:
    """What the site adds to a file before it is parsed: the menu, the kind of its anchors, a language, cells to unfold."""
    path = Path(app.env.doc2path(docname))
    app.env.myst_config.heading_slug_func = partial(re.sub, " ", "-") if path.suffix == ".ipynb" else github_slugify  # JupyterLab's, GitHub's
    runs = lambda m: f"]({m[1]}/runs.csv)" if (path.parent / m[1] / "runs.csv").is_file() else m[0]  # a site does not show folders
    content[0] = re.sub(r"\]\(([\w./]+)\)", runs, content[0])
    if docname == root_doc:
        content[0] += toctrees()
    if path.suffix == ".ipynb":
        nb = json.loads(content[0])
        nb["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        for cell in nb["cells"]:
            if re.match(r"#\|\s*hide\b", "".join(cell["source"])):
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-cell"]
        content[0] = json.dumps(nb)


def math(display: bool):
    def visit(self, node):
        try:
            html = to_mathml(node.astext(), displaystyle=display)
        except math_core.LatexError as error:
            logging.getLogger(__name__).warning("%s in %s", error, node.astext(), location=node)
            html = self.encode(node.astext())
        self.body.append(f'<div class="math">{html}</div>' if display else html)
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.connect("source-read", source)
    app.connect("html-page-context", lambda app, page, *_: app.add_js_file(None, body=SEARCH) if page == "search" else None)
    app.add_html_math_renderer("mathml", inline_renderers=math(False), block_renderers=math(True))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
