"Habits of a command line: examples in every help, quiet runs, JSON, standard streams, where results go, completion"

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import terminal

from smooth_foley.app import filter_commands, judge_commands
from smooth_foley.app.main import build_parser, main
from smooth_foley.core import FoleyError, mini_path
from smooth_foley.media import read_audio, write_video
from smooth_foley.world.passby import LABELS

COMMAND = [sys.executable, "-m", "smooth_foley"]
PACKAGE = mini_path().parents[1]
needs_mini = pytest.mark.skipif(
    not (mini_path() / "model_index.json").is_file(), reason="the shipped model is not in the package yet"
)


def leaves(parser):
    "The parser and all parsers of its subcommands, by what one types"
    yield parser.prog, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from leaves(below)


PARSERS = dict(leaves(build_parser()))
WITH_OPTIONS = [name for name, p in PARSERS.items() if p.get_default("run")]


def examples(text):
    "The commands a help shows, as the shell would split them"
    whole = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in whole.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("smooth-foley ")]


@pytest.fixture
def said(capsys):
    "Exit code, stdout and stderr of a command in this process"

    def run(*words):
        code = main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "plane.mp4"
    return write_video(path, np.random.default_rng(0).integers(0, 255, (15, 64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_has_examples_that_parse(name):
    shown = PARSERS[name].format_help()
    found = examples(PARSERS[name].epilog or "")
    assert found, f"{name} --help shows no example"
    assert "examples:" in shown
    for words in found:
        if "--help" not in words:
            args = PARSERS["smooth-foley"].parse_args(words[1:])
            assert callable(args.run)
    own = name.split()
    assert any(words[: len(own)] == own for words in found)


def test_an_example_that_does_not_parse_is_found():
    words = examples('examples:\n  smooth-foley generate "a b.mp4" \\\n      --steps 0   # none\n')[0]
    assert words == ["smooth-foley", "generate", "a b.mp4", "--steps", "0"]
    with pytest.raises(FoleyError, match="--steps"):
        PARSERS["smooth-foley"].parse_args(words[1:])


@pytest.mark.parametrize("module", [judge_commands, filter_commands])
def test_examples_of_module_commands_parse(module):
    for name, parser in leaves(module._parser()):
        if parser.get_default("run") or name.endswith("train"):
            words = shlex.split(parser.epilog.removeprefix("example: "))
            assert words[:3] == ["python", "-m", module.__name__]
            module._parser().parse_args(words[3:])


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_every_command_can_be_quiet(name):
    assert "-q, --quiet" in PARSERS[name].format_help()


@needs_mini
def test_quiet_says_nothing(said, video, tmp_path):
    words = ["generate", video, "--label", next(iter(LABELS)), "--steps", 1]
    code, out, err = said(*words, "-o", tmp_path / "loud.wav")
    assert (code, out.startswith("wrote "), err) == (0, True, "")
    assert said(*words, "-o", tmp_path / "quiet.wav", "-q") == (0, "", "")
    assert (read_audio(tmp_path / "loud.wav") == read_audio(tmp_path / "quiet.wav")).all()


def test_quiet_keeps_results_and_errors(said):
    assert said("labels", "--quiet") == (0, "\n".join(LABELS) + "\n", "")
    code, out, err = said("generate", "none.mp4", "-q")
    assert (code, out) == (2, "") and "no such file" in err


def test_quiet_leaves_the_environment_as_it_was(said, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    said("labels", "-q")
    assert os.environ["TQDM_DISABLE"] == ""


@needs_mini
def test_info_as_json(said):
    facts = json.loads(said("info", "--json")[1])
    assert facts["model"] == "mini" and facts["defaults"]["fps"] > 0 and "Apache-2.0" in facts["licence"]
    assert facts["bytes"] == sum(p["bytes"] for p in facts["parts"]) > 0
    assert {"name", "class", "parameters", "bytes"} == set(facts["parts"][0])


@needs_mini
def test_labels_as_json(said, video):
    assert json.loads(said("labels", "--json")[1]) == list(LABELS)
    code, out, err = said("labels", video, "--json")
    ranked = json.loads(out)
    assert sorted(r["label"] for r in ranked) == sorted(LABELS)
    assert [r["score"] for r in ranked] == sorted((r["score"] for r in ranked), reverse=True)


def test_bench_as_json(said, tmp_path):
    words = ["--random-weights", "--steps", 1, "--seconds", 1, "--fps", 2, "--device", "cpu", "--json"]
    code, out, err = said("bench", *words, "--out", tmp_path / "b.json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "b.json").read_text())
    assert json.loads(out)["ours"]["total"]["seconds"] > 0


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
@pytest.mark.parametrize("command", [["generate"], ["labels"], ["data", "grounding", "--phrase", "a train"]])
def test_standard_input_is_refused(said, command, name):
    code, out, err = said(*command, name)
    assert (code, out) == (2, "") and "save it to a file" in err and err.count("\n") == 1


def test_standard_output_is_refused(said, video):
    code, out, err = said("generate", video, "-o", "-")
    assert code == 2 and "give the name of a file" in err and err.count("\n") == 1


def test_a_pipe_of_the_shell_is_refused(video):
    r = subprocess.run(
        ["bash", "-c", f"{shlex.join(COMMAND)} generate <(cat {shlex.quote(str(video))})"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert r.returncode == 2 and "save it to a file first" in r.stderr and r.stderr.count("\n") == 1, r.stderr


def files(folder):
    return sorted(p for p in Path(folder).rglob("*") if "__pycache__" not in p.parts)


def test_nothing_is_written_into_the_package(said, video, monkeypatch):
    before, inside = files(PACKAGE), PACKAGE / "assets"
    sample = next(inside.glob("*.mp4"))
    commands = [
        ["generate", sample],
        ["generate", video, "-o", inside],
        ["generate", video, "--plot", inside / "x.png"],
        ["demo", "-o", inside / "demo.mp4"],
        ["train", "mini", "--out", inside / "run"],
        ["bench", "--out", inside / "x.json"],
        ["evaluate", "--out", inside / "e"],
        ["fetch", "full", "--out", inside / "full"],
        ["data", "vggsound", "--passby", 1, "--out", inside / "p"],
        ["data", "audit", "--clips", video.parent, "--out", inside / "a"],
        ["data", "continuous", "filter", video.parent, "--out", inside / "c"],
        ["data", "shards", "passby:0-1", "--out", inside / "s"],
    ]
    for words in commands:
        code, out, err = said(*words)
        assert (code, out) == (2, "") and "inside the installed package" in err and err.count("\n") == 1, (words, err)
    monkeypatch.chdir(inside)
    assert said("demo")[0] == 2
    assert files(PACKAGE) == before


def test_results_go_beside_the_input_from_anywhere(tmp_path, video, monkeypatch):
    from smooth_foley.app import cli
    from smooth_foley.app.options import parse

    (tmp_path / "in").mkdir()
    shutil.copy(video, tmp_path / "in" / "a.mp4")
    monkeypatch.chdir(tmp_path)
    (_, out, plot), *_ = cli.check_generate(parse(cli.GENERATE, ["in/a.mp4"]))
    assert (out, plot) == (Path("in/a_foley.mp4"), None)


def test_errors_name_options(said, video, tmp_path):
    (tmp_path / "x.mp4").write_text("precious")
    code, out, err = said("generate", video, "-o", tmp_path / "x.mp4")
    assert code == 2 and "pass --overwrite or" in err and "overwrite=" not in err and "`" not in err
    code, out, err = said("bench", "--random-weights", "--device", "cpu", "--dtype", "fp16")
    assert code == 2 and "--dtype is 'fp16'" in err and "`" not in err


def on_a_terminal(words, cwd):
    "What a command writes to stderr when that is a terminal"
    ours, theirs = terminal()
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CI", "TQDM_DISABLE")}
    running = subprocess.Popen([*COMMAND, *words], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as f:
        while more := f.read(4096):
            written += more
    assert running.wait(600) == 0, written
    return written.decode(errors="replace")


def test_bars_appear_on_a_terminal_only(tmp_path):
    words = ["data", "vggsound", "--passby", "1", "--seconds", "1"]
    assert "passby clips: 100%" in on_a_terminal([*words, "--out", "a"], tmp_path)
    assert on_a_terminal([*words, "--out", "b", "-q"], tmp_path) == ""
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CI", "TQDM_DISABLE")}
    piped = subprocess.run([*COMMAND, *words, "--out", "c"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (piped.returncode, piped.stderr) == (0, "")


def completions(line):
    "What argcomplete offers at the end of a line: it writes to file descriptor 8"
    asked = dict(_ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n", COMP_LINE=line, COMP_POINT=str(len(line)))
    r = subprocess.run(
        ["bash", "-c", f"{shlex.join(COMMAND)} 8>&1 9>/dev/null >/dev/null 2>&1"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return [word.strip() for word in r.stdout.split("\n")]


@pytest.mark.skipif(not importlib.util.find_spec("argcomplete"), reason="argcomplete is not installed")
def test_the_shell_completes():
    assert "generate" in completions("smooth-foley gen")
    assert "--guidance-scale" in completions("smooth-foley generate x.mp4 --gui")
    assert "continuous" in completions("smooth-foley data con")


def test_completion_is_not_asked_for_in_a_plain_run():
    code = "import sys; from smooth_foley.app.main import main; main(['labels']); print('argcomplete' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).endswith("False\n")
