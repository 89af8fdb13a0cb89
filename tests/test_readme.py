"README.md is nbs/index.ipynb, and what it points to is there"

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("nbs_tool", ROOT / "tools" / "nbs.py")
nbs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nbs)


def notebook(tmp_path, *cells):
    path = tmp_path / "index.ipynb"
    path.write_text(json.dumps({"cells": list(cells)}))
    return path


def code(source, *outputs):
    return {"cell_type": "code", "source": source, "outputs": list(outputs)}


def text(source):
    return {"cell_type": "markdown", "source": source}


def shown(**data):
    return {"output_type": "display_data", "data": data}


def test_readme_is_the_export_of_the_index():
    assert nbs.readme_differs() == [], "run `make readme`"


def test_a_changed_readme_is_noticed(tmp_path, monkeypatch):
    for name in ("nbs/index.ipynb", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for p in (ROOT / nbs.FIGURES).glob("*"):
        (tmp_path / nbs.FIGURES).mkdir(exist_ok=True)
        (tmp_path / nbs.FIGURES / p.name).write_bytes(p.read_bytes())
    original = nbs.readme_export
    monkeypatch.setattr(nbs, "ROOT", tmp_path)
    monkeypatch.setattr(nbs, "readme_export", lambda: original(tmp_path / "nbs" / "index.ipynb"))
    assert nbs.readme_differs() == []
    (tmp_path / "README.md").write_text("something else")
    assert nbs.readme_differs() == ["README.md"]


def test_export(tmp_path):
    path = notebook(
        tmp_path,
        text("# Title\n\nWords."),
        code("#| hide\nimport secret"),
        code("#| echo: false\nprint(1)", {"output_type": "stream", "name": "stdout", "text": "said\n"}),
        code("x = 1\nx", shown(**{"text/plain": "1"})),
        code("plot()", shown(**{"image/png": "aGk=", "text/plain": "<Figure>"})),
        code("table()", shown(**{"text/markdown": "|[a](06_a.ipynb)|\n|-|", "text/plain": "a"})),
        code("noise()", {"output_type": "stream", "name": "stderr", "text": "warning"}),
    )
    md, files = nbs.readme_export(path)
    assert files == {"index_files/figure-1.png": b"hi"}
    assert (
        md.split("\n\n", 1)[1]
        == """# Title

Words.

    said

```python
x = 1
x
```

    1

```python
plot()
```

![](index_files/figure-1.png)

```python
table()
```

|[a](nbs/06_a.ipynb)|
|-|

```python
noise()
```
"""
    )


def test_links_of_the_readme_are_there():
    md = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", md)]
    local = [link for link in links if link and "://" not in link and not link.startswith("mailto:")]
    gone = [link for link in local if not (ROOT / link).exists()]
    assert gone == []


def test_python_of_the_readme_compiles():
    md = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", md, re.S):
        compile(block, "README.md", "exec")


PAGES = sorted(p for p in (ROOT / "nbs").rglob("[!_.]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CARDS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "results" / "README.md"]
CARDS += sorted((ROOT / "data_cards").glob("*.md"))


def prose_of(path):
    "Markdown of a page or a card"
    written = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return written
    cells = json.loads(written)["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=lambda p: p.stem)
def test_links_of_a_page_are_there(path):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(path))]
    local = [link for link in links if link and "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_links_are_moved_to_the_root():
    page = "[a](06_a.ipynb), [b](../LICENSE), [c](app/91_c.ipynb#d), [d](#e), [e](https://f.g/h)"
    moved = "[a](nbs/06_a.ipynb), [b](LICENSE), [c](nbs/app/91_c.ipynb#d), [d](#e), [e](https://f.g/h)"
    assert nbs.from_the_root(page) == moved


def index_cells():
    return json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]


def git_url():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]["git_url"]


@pytest.mark.parametrize("in_colab", [True, False])
def test_the_front_page_installs_the_package_in_colab_only(in_colab, monkeypatch):
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: asked.append(words))
    if in_colab:
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    cell = next("".join(c["source"]) for c in index_cells() if "google.colab" in "".join(c["source"]))
    exec(cell, {})
    assert asked == [[sys.executable, "-m", "pip", "install", "-q", f"git+{git_url()}"]] * in_colab


def test_the_colab_link_opens_the_front_page():
    md = (ROOT / "README.md").read_text(encoding="utf-8")
    place = git_url().removeprefix("https://github.com/")
    assert f"](https://colab.research.google.com/github/{place}/blob/main/nbs/index.ipynb)" in md


def test_the_front_page_runs_without_a_checkout(tmp_path, monkeypatch):
    "As in Colab: the notebook alone, and the package installed"
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "nbs" / "index.ipynb", tmp_path)
    book = nbformat.read(tmp_path / "index.ipynb", 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "sample_foley.mp4").stat().st_size > 10_000


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1400
