"What is packed: a wheel holds the modules, the model and the sample, and nothing of the workshop"

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    setup = [sys.executable, "setup.py", "-q", command, "-d", "out"]
    r = subprocess.run(setup, cwd=folder, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return next((folder / "out").glob(pattern))


@pytest.fixture(scope="module")
def released(wheel, tmp_path_factory):
    "The wheel that is made from the source release"
    source, tmp = Path(wheel.filename).parent.parent, tmp_path_factory.mktemp("released")
    with tarfile.open(built(source, "sdist", "*.tar.gz")) as f:
        f.extractall(tmp, filter="data")
    return zipfile.ZipFile(built(next(tmp.iterdir()), "bdist_wheel", "*.whl"))


def test_a_wheel_made_from_the_source_release_is_the_same(wheel, released):
    assert sorted(released.namelist()) == sorted(wheel.namelist())
    assert Path(released.filename).stat().st_size < 42e6  # 41 MB of weights, compressed


@pytest.fixture(scope="module")
def installed(released, tmp_path_factory):
    "A new environment with that wheel; its dependencies are those of this environment, so that no network is needed"
    home = tmp_path_factory.mktemp("clean")
    venv.create(home / "env", with_pip=False)
    scripts = home / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(scripts / "python")]
    run(home, *pip, "install", "--no-deps", "--no-index", released.filename)
    site = run(home, scripts / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return scripts


def run(folder, *command):
    "Output of a command that must succeed, with nothing of the checkout on its path"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    r = subprocess.run([str(c) for c in command], cwd=folder, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout


def test_the_demo_runs_from_the_installed_wheel(installed, tmp_path):
    home = run(tmp_path, installed / "python", "-c", "import smooth_foley; print(smooth_foley.__file__)")
    assert Path(home.strip()).is_relative_to(installed.parent)
    run(tmp_path, installed / "smooth-foley", "demo")
    assert (tmp_path / "demo.mp4").stat().st_size > 10_000 and (tmp_path / "demo.png").is_file()


def test_the_installed_wheel_finds_what_it_requires(installed, tmp_path):
    code = """
from importlib.metadata import requires, version
from packaging.requirements import Requirement

for r in map(Requirement, requires("smooth_foley")):
    if r.marker is None and not r.specifier.contains(version(r.name), prereleases=True):
        print(f"{r}: {version(r.name)} is installed")
"""
    assert run(tmp_path, installed / "python", "-c", code) == ""


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
    assert all(f"Provides-Extra: {extra}" in meta for extra in EXTRAS)


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


EXTRAS = ("dev", "train", "data", "lora", "studio")


def requirements(*extras):
    "What settings.ini asks for: the package's own requirements, and those of extras"
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    keys = ["requirements", *(f"{extra}_requirements" for extra in extras)]
    return [Requirement(word) for key in keys for word in ini["DEFAULT"][key].split()]


def locked():
    "Name -> version of every line of constraints.txt"
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.match(r'^[\w.-]+==[\w.]+( ; sys_platform == "linux")?$', line) for line in lines)
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1].split(" ")[0] for line in lines}


def test_every_requirement_is_locked():
    versions = locked()
    for r in requirements(*EXTRAS):
        assert r.specifier.contains(versions[canonicalize_name(r.name)]), r


def test_every_requirement_has_a_lower_bound():
    for r in requirements(*EXTRAS):
        assert {s.operator for s in r.specifier} & {">=", "=="}, r


def test_an_extra_holds_what_it_is_for():
    names = {extra: {r.name for r in requirements(extra)} - {r.name for r in requirements()} for extra in EXTRAS}
    assert names["train"] == {"tensorboard", "webdataset"} and names["lora"] == {"peft"}
    assert names["studio"] == {"voila", "jupyter_server", "ipywidgets", "ipykernel"}


def test_names_of_the_package_are_lazy():
    code = """
import sys
import smooth_foley

assert {"Clip", "SmoothFoleyPipeline", "mux"} <= set(dir(smooth_foley)) and "torch" not in sys.modules
from smooth_foley import Clip, mux

assert Clip.__module__ == mux.__module__ == "smooth_foley.media" and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_merges_of_notebooks_go_to_nbdev():
    from nbdev.clean import nbdev_install_hooks

    assert (ROOT / ".gitattributes").read_text() in inspect.getsource(nbdev_install_hooks).replace("\\n", "\n")


def imported(path):
    "First names of all modules that a file imports"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_import_is_a_requirement():
    asked = {r.name for r in requirements("train", "data", "completion", "studio")}
    names = {"PIL": "pillow", "open_clip": "open_clip_torch", "yt_dlp": "yt-dlp", "yaml": "pyyaml"}
    used = {names.get(n, n) for f in (ROOT / "smooth_foley").rglob("*.py") for n in imported(f)}
    assert used - asked - set(sys.stdlib_module_names) - {"smooth_foley"} == set()
