"`smooth-foley data`: every example of every help text runs as it stands, and wrong input ends as one line"

import re
import shlex
from pathlib import Path

import pytest

from smooth_foley.app.data_commands import DATA
from smooth_foley.app.main import main

COMMANDS = {command.name: command for command in DATA}


def examples(text):
    "Command lines of a help text, without the remarks beside them"
    text = re.sub(r"\s*\\\n\s*", " ", text)
    lines = re.findall(r"^ +(?:smooth-foley) (data .*)$", text, re.M)
    return [re.split(r"\s{2,}", line)[0] for line in lines]


def tried(line):
    "Whether an example needs neither clips of VGGSound nor downloaded weights"
    return "passby" in line or "select" in line or "--verify" in line


EXAMPLES = {name: examples(command.more) for name, command in COMMANDS.items()}
HERE = {name: list(filter(tried, lines)) for name, lines in EXAMPLES.items()}


def test_most_examples_can_be_tried():
    here, every = sum(HERE.values(), []), sum(EXAMPLES.values(), [])
    assert all(HERE.values()) and len(here) > 0.7 * len(every) and len(set(here)) == len(here)


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in sum(HERE.values(), []):
        line = line.replace("--passby 24", "--passby 8").replace("passby:0-99", "passby:0-1")
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        assert code == 0, (line, err)
        assert out.strip(), line
    for made in (
        "state/present.csv",
        "audit/faults.csv",
        "grounded.csv",
        "passby/continuous/vggsound_continuous_train.csv",
        "sweep.png",
        "shards/index.json",
        "timed/index.json",
        "heard/index.json",
    ):
        assert (tmp_path / made).stat().st_size > 0, made


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples(name, capsys):
    with pytest.raises(SystemExit):
        main(["data", name, "--help"])
    said = capsys.readouterr().out
    assert set(EXAMPLES[name]) <= set(examples(said)) and COMMANDS[name].text in " ".join(said.split())


@pytest.mark.parametrize(
    "line, words",
    [
        ("data", "WHAT"),
        ("data nothing", "invalid choice"),
        ("data vggsound", "--csv: is needed"),
        ("data grounding", "no file"),
        ("data grounding a.wav", "--label"),
        ("data continuous filter", "FOLDER"),
        ('data continuous select --label "sea wave"', "sea waves"),
        ("data shards", "source and --out"),
        ("data shards passby:0-9 --out x --part 3", "--part"),
        ("data shards --verify nowhere", "nowhere"),
        ("data audit --clips nowhere --out x", "nowhere"),
        ("data vggsound --csv none.csv", "none.csv"),
        ('data continuous select --label "car passing"', "car passing by"),
        ("data audioset none.tsv --names none.tsv", "none.tsv"),
        ('data grounding none.wav --label "skidding" --threshold 2', "--threshold"),
        ("data shards passby:9-0 --out x", "passby:9-0"),
        ("data vggsound --passby 3 --out passby --wrong nan", "--wrong"),
        ("data shards passby:0-1 --out s --content frames --per-label", "--per-label: no clip has a timeline"),
    ],
)
def test_wrong_input(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    err = capsys.readouterr().err
    assert err.startswith("smooth-foley: error: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    [
        "vggsound --passby 1 --out file/x",
        "audit --clips passby/video --out file/x",
        "audioset passby/audioset_strong.tsv --names passby/mid_to_display_name.tsv --seconds 1 --out file/x.csv",
        "grounding --list passby/vggsound.csv --clips passby/video --csv file/x.csv",
        "continuous filter passby --out file/x",
        "shards passby:0-1 --out file/x",
        "shards passby/vggsound.csv --clips passby/video --out passby/vggsound.csv",
    ],
)
def test_nowhere_to_write(line, tmp_path, monkeypatch, capsys):
    from smooth_foley.world.as_vggsound import passby_folder

    monkeypatch.chdir(tmp_path)
    passby_folder("passby", 1, seconds=1.0)
    (tmp_path / "file").write_text("no folder")
    before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
    assert main(["data", *shlex.split(line)]) == 2
    err = capsys.readouterr().err
    assert (
        err.splitlines()[-1].startswith("smooth-foley: error: ")
        and ("file" in err or "vggsound.csv" in err)
        and "Traceback" not in err
    )
    assert {p: p.stat().st_size for p in tmp_path.rglob("*")} == before


def test_a_folder_to_try_things_on_replaces_no_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("vggsound.csv").write_text("mine")
    assert main(shlex.split("data vggsound --passby 1 --seconds 0.5 --out .")) == 2
    assert "holds clips or lists already" in capsys.readouterr().err and Path("vggsound.csv").read_text() == "mine"
