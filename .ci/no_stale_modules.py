"""Every module of the package must be the export of a notebook: nbdev_export never deletes old ones."""
import json, pathlib, re, sys

exported = {"__init__", "_modidx"}
for path in pathlib.Path("nbs").glob("*.ipynb"):
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    exported |= set(re.findall(r"^#\|\s*default_exp\s+(\w+)", text, re.M)) | set(re.findall(r"^#\|\s*export\s+(\w+)", text, re.M))
stale = sorted(p.name for p in pathlib.Path("cs336_alignment").glob("*.py") if p.stem not in exported)
sys.exit(f"no notebook exports {stale}: delete them or name them in a default_exp" if stale else 0)
