"How the notebooks and modules are laid out: what tools/house.py measures, and what a notebook may store"

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("house_tool", ROOT / "tools" / "house.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)
BOOKS = sorted(p for p in (ROOT / "nbs").rglob("[!_.]*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(scope="module")
def survey():
    return house.survey()


def test_no_circle_of_imports(survey):
    assert not survey["circles"]


def test_every_notebook_has_a_number_of_its_own(survey):
    numbers = list(survey["order"].values())
    assert len(set(numbers)) == len(numbers)


def test_modules_answer_one_question(survey):
    lines, order = survey["lines"], survey["order"]
    assert not [m for m in lines if order[m] < (15, "") and lines[m] > 360]
    assert not [m for m in lines if lines[m] > 510]


def test_a_notebook_imports_only_from_lower_numbers(survey):
    assert not survey["upward"]


def test_only_the_app_knows_options_and_widgets(survey):
    below = [m for m, (number, _) in survey["order"].items() if number < 90]
    found = {m for m in below if re.search("argparse|ipywidgets", "\n".join(survey["cells"][m]))}
    assert not found


def test_few_lines_are_wide(survey):
    lines = [line for cells in survey["cells"].values() for c in cells for line in c.splitlines() if line.strip()]
    assert sum(len(line) > 120 for line in lines) <= 0.01 * len(lines)


def test_sizes_leave_out_comments_and_signatures():
    cell = 'def f(\n    a,  # One\n    b,  # Two\n):\n    "Sum"\n\n    # why\n    return a + b\n'
    assert house.size(cell) == 3


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert house.circles(graph) == [("b", "c")]


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_stores(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert len(text) < 400_000
    assert "widgets" not in notebook["metadata"]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not re.search(r"/(home|root|tmp|Users)/\w", json.dumps([o.get("text", o.get("data", {})) for o in outputs]))
