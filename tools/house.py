"""Measure how the notebooks and modules are laid out.

python tools/house.py            the table
python tools/house.py --modules  the same for each module

Exported cells are counted in lines of code: blank lines, comments, and the lines of a signature that hold one
argument each are left out.
"""

import ast
import json
import re
import sys
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "smooth_foley"


def notebooks():
    "Every notebook under nbs/ that exports a module: path, its number, its module"
    for path in sorted((ROOT / "nbs").rglob("[!_.]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        named = re.search(r"^#\s*\|\s*default_exp\s+(\S+)", "\n".join(code), re.M)
        if named:
            number = re.match(r"(\d+)([a-z]?)", path.stem)
            yield path, (int(number[1]), number[2]), f"{PACKAGE}.{named[1]}", code


def exported(code):
    "Exported cells, without their first line"
    found = [c for c in code if re.search(r"^#\s*\|\s*exports?\b", c, re.M)]
    return [re.sub(r"^#\s*\|.*\n", "", c, flags=re.M) for c in found]


def argument_lines(tree):
    "Numbers of the lines that hold one argument of a function each"
    lines = set()
    for f in ast.walk(tree):
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = range(f.lineno + 1, f.body[0].lineno)
            lines.update(inside)
    return lines


def size(cell):
    "Lines of code of a cell"
    skip = argument_lines(ast.parse(cell))
    numbered = enumerate(cell.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for i, line in numbered if i not in skip)


def public_names(module):
    "What a module offers, as its `__all__` says"
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def imports(name, path, modules):
    "Modules of the package that a module imports, inside functions as well"
    found, package = set(), name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update([origin, *(f"{origin}.{a.name}" for a in node.names)])
    return {m for m in found if m in modules and m != name}


def circles(graph):
    "Pairs of modules that reach each other"

    def reach(start):
        seen, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    everything = {m: reach(m) for m in graph}
    return sorted((a, b) for a in graph for b in everything[a] if a < b and a in everything[b])


def survey():
    "All that is measured"
    books = list(notebooks())
    order = {module: number for _, number, module, _ in books}
    files = {module: ROOT / (module.replace(".", "/") + ".py") for module in order}
    graph = {m: imports(m, f, order) for m, f in files.items()}
    cells = {m: exported(code) for _, _, m, code in books}
    return dict(
        order=order,
        files=files,
        cells=cells,
        names={m: public_names(f) for m, f in files.items()},
        lines={m: len(f.read_text(encoding="utf-8").splitlines()) for m, f in files.items()},
        circles=circles(graph),
        upward=sorted((m, o) for m in graph for o in graph[m] if order[o] >= order[m]),
    )


def table(s):
    "The rows as markdown"
    sizes = [size(c) for cells in s["cells"].values() for c in cells]
    nine_tenths = quantiles(sizes, n=10)[-1]
    lines = [line for cells in s["cells"].values() for c in cells for line in c.splitlines() if line.strip()]
    wide = sum(len(line) > 120 for line in lines)
    names = [len(n) for n in s["names"].values()]
    longest = max(s["lines"], key=s["lines"].get)
    most = max(s["names"], key=lambda m: len(s["names"][m]))
    rows = {
        "exported cell: median / 90 % / longest": f"{median(sizes):g} / {nine_tenths:.0f} / {max(sizes)} lines",
        "exported lines": f"{len(lines)}",
        "lines over 120 columns": f"{100 * wide / len(lines):.1f} %",
        "public names of a module: median / most": f"{median(names):g} / {len(s['names'][most])} ({most})",
        "longest module": f"{s['lines'][longest]} lines ({longest})",
        "circles of imports": len(s["circles"]),
        "imports that run up": len(s["upward"]),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def main(argv):
    if argv not in ([], ["--modules"]):
        sys.exit(__doc__)
    s = survey()
    print(table(s))
    for a, b in s["circles"]:
        print(f"circle: {a} and {b}")
    for a, b in s["upward"]:
        print(f"runs up: {a} imports {b}")
    if argv:
        for m in sorted(s["order"], key=s["order"].get):
            longest = max(map(size, s["cells"][m]), default=0)
            print(f"{m}: {s['lines'][m]} lines, {len(s['names'][m])} names, longest cell {longest}")


if __name__ == "__main__":
    main(sys.argv[1:])
