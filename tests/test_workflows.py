"Workflows and issue forms: they are what GitHub reads, and name commands, files and extras that exist"

import os
import re
import shlex
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from smooth_foley.app.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
FLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
FORMS = sorted(p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.y*ml") if p.stem != "config")
MAKEFILE = (ROOT / "Makefile").read_text()
INSTALLED_THERE = {"twine", "gh"}  # By the workflow itself, or by GitHub
SHELL = {"test", "echo", "exit", "cd", "version", "git", "sed", "python", "pip", "make"}


def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(flow):
    return [step for job in flow["jobs"].values() for step in job["steps"]]


def commands(flow):
    "Lines that the workflow runs, without the expressions that GitHub fills in"
    text = "\n".join(step["run"] for step in steps(flow) if "run" in step)
    lines = re.split(r"\n|&&|\|\||;", re.sub(r"\$\{\{.*?\}\}", "x", text))
    return [words for line in lines if (words := shlex.split(line.replace("{", " ").replace("}", " ")))]


def test_there_are_tests_docs_and_a_release():
    assert {p.stem for p in FLOWS} == {"test", "docs", "release"}
    assert len(FORMS) >= 2


@pytest.mark.parametrize("path", FLOWS, ids=lambda p: p.stem)
def test_a_workflow_is_well_formed(path):
    flow = read(path)
    assert flow["name"] == path.stem and (flow.get("on") or flow.get(True))
    assert flow["permissions"]
    for job in flow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"]
    for step in steps(flow):
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w./-]+@v\d+", step["uses"])


@pytest.mark.parametrize("path", FLOWS, ids=lambda p: p.stem)
def test_a_workflow_runs_what_there_is(path):
    flow = read(path)
    for step in steps(flow):
        script = re.sub(r"\$\{\{.*?\}\}", "x", step.get("run", ""))
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for program, *words in commands(flow):
        name = Path(program).name
        known = name.split("=")[0] in SHELL | INSTALLED_THERE or "$RUNNER_TEMP" in program
        assert known or shutil.which(name), name
        if name == "make":
            assert re.search(rf"^{words[0]}:", MAKEFILE, re.M)
            assert all(re.search(rf"^{w.split('=')[0]} *\?=", MAKEFILE, re.M) for w in words[1:])
        if name == "smooth-foley":
            build_parser().parse_args(words)
        if name == "pip" and "-e" in words:
            extras = re.search(r"\[(.*)\]", words[-1])[1].split(",")
            assert all(f"{extra}_requirements" in settings() for extra in extras)
            assert (ROOT / words[words.index("-c") + 1]).is_file()


def test_the_tests_run_on_every_python_promised():
    flow = read(ROOT / ".github" / "workflows" / "test.yaml")
    assert flow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert settings()["min_python"] == "3.11"
    assert {words[:2][1] for words in commands(flow) if words[0] == "make"} == {"test"}


def test_the_release_reads_the_version():
    flow = read(ROOT / ".github" / "workflows" / "release.yaml")
    check = next(step["run"] for step in steps(flow) if "settings.ini" in step.get("run", ""))
    for tag, code in ((f"v{settings()['version']}", 0), ("v9.9.9", 1)):
        env = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        assert subprocess.run(["bash", "-e", "-c", check], cwd=ROOT, env=env, capture_output=True).returncode == code


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_an_issue_form_is_well_formed(path):
    form = read(path)
    assert form["name"] and form["description"] and form["body"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    for part in form["body"]:
        assert part["type"] in ("textarea", "input", "dropdown") and part["attributes"]["label"]
        assert (part["type"] == "dropdown") == ("options" in part["attributes"])


def test_make_says_how_long_its_tests_took(tmp_path):
    "With every tool replaced by `true`: what is left is the clock"
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff"):
        (tmp_path / "bin" / name).symlink_to(shutil.which("true"))
    (tmp_path / ".installed").touch()
    words = ["make", "test", f"VENV={tmp_path}", f"STAMP={tmp_path}/.installed", "-o", f"{tmp_path}/.installed"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}  # Not a make in a make
    r = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    assert r.returncode == 0 and re.search(r"make test took \d+ min \d+ s\n$", r.stdout), r.stdout + r.stderr


def test_the_changelog_has_the_version_and_what_comes_next():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heads[0] == "Unreleased" and heads[1].split()[0] == settings()["version"]
