"What is packed: a wheel holds the modules, the model and the sample, and nothing of the workshop"

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    tmp = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "CITATION.cff"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp / name)
    shutil.copytree(ROOT / "smooth_foley", tmp / "smooth_foley", ignore=shutil.ignore_patterns("__pycache__"))
    return zipfile.ZipFile(built(tmp, "bdist_wheel", "*.whl"))


def built(folder, command, pattern):
    "What setuptools makes of a folder"
    run = [sys.executable, "setup.py", "-q", command, "-d", "out"]
    r = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return next((folder / "out").glob(pattern))


def test_a_wheel_made_from_the_source_release_is_the_same(wheel, tmp_path):
    source = Path(wheel.filename).parent.parent
    with tarfile.open(built(source, "sdist", "*.tar.gz")) as f:
        f.extractall(tmp_path, filter="data")
    again = zipfile.ZipFile(built(next(tmp_path.iterdir()), "bdist_wheel", "*.whl"))
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    mine = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "smooth_foley").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.name != ".DS_Store"
    }
    packed = set(wheel.namelist())
    assert mine - packed == set()
    assert {n for n in packed if not n.startswith(("smooth_foley/", "smooth_foley-"))} == set()
    assert any(n.endswith("NOTICE") for n in packed) and any(n.endswith("LICENSE") for n in packed)


def test_the_wheel_says_what_settings_say(wheel):
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    meta = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert f"Version: {ini['DEFAULT']['version']}" in meta
    assert ini["DEFAULT"]["console_scripts"] in points.replace(" ", "")
    assert "Provides-Extra: dev" in meta and "Provides-Extra: train" in meta


def test_the_console_script_is_there():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    name, place = ini["DEFAULT"]["console_scripts"].split("=")
    assert name == "smooth-foley"
    assert callable(EntryPoint(name, place, "console_scripts").load())


def test_an_export_keeps_the_lazy_names(tmp_path):
    "nbdev writes the version into `__init__.py` and leaves the rest of it alone"
    from nbdev.config import update_version

    shutil.copy(ROOT / "smooth_foley" / "__init__.py", tmp_path)
    update_version(tmp_path)
    assert (tmp_path / "__init__.py").read_text() == (ROOT / "smooth_foley" / "__init__.py").read_text()


def test_every_requirement_is_locked():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")

    def plain(name):
        return re.split(r"[<>=!~\[; ]", name)[0].lower().replace("_", "-")

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.match(r'^[\w.-]+==[\w.]+( ; sys_platform == "linux")?$', line) for line in lines)
    asked = {
        plain(w)
        for key in ("requirements", "dev_requirements", "train_requirements")
        for w in ini["DEFAULT"][key].split()
    }
    assert asked - {plain(line) for line in lines} == set()


def imported(path):
    "First names of all modules that a file imports"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_import_is_a_requirement():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    asked = {
        re.split("[<>=]", w)[0]
        for key in ("requirements", "train_requirements", "data_requirements", "completion_requirements")
        for w in ini["DEFAULT"][key].split()
    }
    names = {"PIL": "pillow", "open_clip": "open_clip_torch", "sklearn": "scikit-learn", "yt_dlp": "yt-dlp"}
    used = {names.get(n, n) for f in (ROOT / "smooth_foley").rglob("*.py") for n in imported(f)}
    assert used - asked - set(sys.stdlib_module_names) - {"smooth_foley"} == set()
