"The command line as a person meets it: in a process of its own"

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from launch import terminal

from smooth_foley.app import cli
from smooth_foley.app.main import main
from smooth_foley.app.options import parse
from smooth_foley.core import mini_path
from smooth_foley.media import SR, probe, read_audio, write_video, write_wav
from smooth_foley.world.passby import LABELS

COMMAND = [sys.executable, "-m", "smooth_foley"]
HAS_MINI = (mini_path() / "model_index.json").is_file()
needs_mini = pytest.mark.skipif(not HAS_MINI, reason="the shipped model is not in the package yet")


def smooth_foley(*words, cwd=None):
    return subprocess.run([*COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture
def inside(capsys, monkeypatch):
    "The same in this process, for what needs the large libraries: they are imported once"

    def run(*words, cwd=None):
        if cwd:
            monkeypatch.chdir(cwd)
        handler = signal.getsignal(signal.SIGTERM)
        code = main([str(w) for w in words])
        assert signal.getsignal(signal.SIGTERM) is handler  # What the command did with it is undone
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "A folder of good and bad videos"
    folder = tmp_path_factory.mktemp("inputs")
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    write_video(folder / "good.mp4", noise)
    write_video(folder / "long.mp4", noise[:22], fps=2)
    write_video(folder / "one.mp4", noise[:1])
    (folder / "late.csv").write_text("label,start,end\ndog barking,1,2\ndog barking,4,5\n")
    (folder / "wrong.csv").write_text("label,start,end\ndog barking,1,2\ndog barking,soon,5\n")
    (folder / "left.csv").write_text("label,start,end,name\ndog barking,0,1,left\ntrain horning,1,2,left\n")
    (folder / "five.json").write_text('{"events": [\n{"label": "dog barking", "name": 5}\n]}')
    (folder / "near.json").write_text('{"events": [\n{"label": "dog barkin"}\n]}')
    write_wav(folder / "sound.wav", np.zeros(SR))
    (folder / "sound.mp4").write_bytes((folder / "sound.wav").read_bytes())
    (folder / "text.mp4").write_text("words\n" * 100)
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:3000])
    (folder / "empty.mp4").touch()
    (folder / "exists.mp4").write_text("precious")
    shutil.copy(Path(__file__).parent / "fixtures" / "media" / "vp8_vorbis.webm", folder / "vp8.webm")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "nothing").mkdir()
    (folder / "model").mkdir()
    return folder


WRONG = {  # name: (words, what the line must say)
    "no command": ([], "COMMAND"),
    "unknown command": (["fly"], "invalid choice"),
    "no video": (["generate"], "VIDEO"),
    "missing file": (["generate", "none.mp4"], "none.mp4: no such file"),
    "text file": (["generate", "text.mp4"], "text.mp4: cannot be read"),
    "truncated": (["generate", "cut.mp4"], "cut.mp4: cannot be read"),
    "empty file": (["generate", "empty.mp4"], "empty.mp4: cannot be read"),
    "only sound": (["generate", "sound.mp4"], "only sound"),
    "one frame": (["generate", "one.mp4"], "single picture"),
    "window too long": (["generate", "long.mp4", "--window", "11"], "--window: must be from 0.64 to 10.24, got 11"),
    "no takes": (["generate", "good.mp4", "--takes", "0"], "--takes: must be from 1 to 64, got 0"),
    "a label twice": (["generate", "good.mp4", *["--label", "dog barking"] * 2], "'dog barking': is given twice"),
    "stems of nothing": (["generate", "good.mp4", "--stems", "s"], "--label: is missing"),
    "stems into a file": (
        ["generate", "good.mp4", "--label", "dog barking", "--stems", "exists.mp4"],
        "exists.mp4: is no folder",
    ),
    "all takes of two sounds": (
        ["generate", "good.mp4", "--timeline", "late.csv", "--takes", "2", "--pick", "all"],
        "--pick all: goes with one sound",
    ),
    "a timeline and a label": (
        ["generate", "good.mp4", "--timeline", "late.csv", "--label", "dog barking"],
        "--label: does not go with --timeline",
    ),
    "spans outside of the video": (
        ["generate", "good.mp4", "--timeline", "late.csv"],
        "dog barking: a span ends at 5 s, after the clip's end at 2.00 s",
    ),
    "a wrong line of a timeline": (["generate", "good.mp4", "--timeline", "wrong.csv"], "wrong.csv: line 3: start is"),
    "one name for two things": (
        ["generate", "good.mp4", "--timeline", "left.csv"],
        "left.csv: line 3: label of 'left' differs from the row before",
    ),
    "a name that is a number": (
        ["generate", "good.mp4", "--timeline", "five.json"],
        "five.json: line 2: name is 5; give a text",
    ),
    "stems of two videos of one name": (
        ["generate", "good.mp4", "nothing/../good.mp4", *["--label", "dog barking"], "--stems", "nothing"],
        "good_dog_barking.wav: two of the videos would be written there",
    ),
    "a label that a timeline misspells": (
        ["generate", "good.mp4", "--timeline", "near.json"],
        "near.json: line 2: the model does not know 'dog barkin'; did you mean 'dog barking'?",
    ),
    "a timeline of no video": (["timeline", "text.mp4"], "text.mp4: cannot be read"),
    "a timeline of another kind": (["timeline", "good.mp4", "-o", "x.txt"], "cannot write .txt"),
    "several into a file": (
        ["generate", "good.mp4", "one.mp4", "-o", "x.mp4"],
        "several videos need an existing folder",
    ),
    "nobody's home": (["generate", "good.mp4", "--model", "~nouser/x"], "~nouser/x: nobody of that name"),
    "folder without video": (["generate", "nothing"], "no video in this folder"),
    "unknown label": (["generate", "good.mp4", "--label", "dog barkin"], "'dog barking'"),
    "empty label": (["generate", "good.mp4", "--label", "  "], "empty"),
    "no folder for the output": (["generate", "good.mp4", "-o", "none/x.mp4"], "none: no such folder"),
    "output exists": (["generate", "good.mp4", "-o", "exists.mp4"], "exists.mp4: exists already"),
    "output is the input": (["generate", "good.mp4", "-o", "good.mp4", "--overwrite"], "input itself"),
    "unwritable": (["generate", "good.mp4", "-o", "/proc/x.mp4"], "/proc/x.mp4: cannot be written"),
    "unknown format": (["generate", "good.mp4", "-o", "x.ogg"], "cannot write .ogg"),
    "container that cannot hold the picture": (["generate", "vp8.webm", "-o", "x.mp4"], ".mp4 cannot hold its picture"),
    "list from a pipe": (["data", "vggsound", "--csv", "pipe.mp4"], "pipe.mp4: is a pipe or a device"),
    "list without end": (
        ["data", "audit", "--clips", "nothing", "--csv", "/dev/zero", "--out", "a"],
        "/dev/zero: is a",
    ),
    "pipe": (["generate", "pipe.mp4"], "pipe.mp4: is a pipe; save it to a file first"),
    "output is a pipe": (["generate", "good.mp4", "-o", "pipe.mp4", "--overwrite"], "pipe.mp4: is no ordinary file"),
    "output name too long": (["generate", "good.mp4", "-o", "x" * 260 + ".mp4"], "file name too long"),
    "a URL is a name": (["generate", "http://127.0.0.1:9/x.mp4"], "no such file"),
    "plot of unknown format": (["generate", "good.mp4", "--plot", "x.txt"], "cannot write .txt"),
    "nan scale": (["generate", "good.mp4", "--frame-scale", "nan"], "--frame-scale: must be"),
    "negative scale": (["generate", "good.mp4", "--temporal-scale", "-1"], "--temporal-scale: must be"),
    "word for a number": (["generate", "good.mp4", "--guidance-scale", "much"], "got 'much'"),
    "no steps": (["generate", "good.mp4", "--steps", "0"], "--steps: must be"),
    "half a step": (["generate", "good.mp4", "--steps", "2.5"], "whole number"),
    "no fps": (["generate", "good.mp4", "--fps", "0"], "--fps: must be"),
    "backward span": (["generate", "good.mp4", "--condition", "3-2"], "ends before it starts"),
    "span behind the end": (["generate", "good.mp4", "--condition", "5-6"], "begins after"),
    "misspelt option": (["generate", "good.mp4", "--lable", "dog barking"], "--lable"),
    "unknown device": (["generate", "good.mp4", "--device", "abacus"], "no such device"),
    "absent device": (["generate", "good.mp4", "--device", "cuda:99"], "not on this machine"),
    "empty model folder": (["generate", "good.mp4", "--model", "model"], "no model_index.json"),
    "no network for a hub id": (["generate", "good.mp4", "--model", "nobody/nothing"], "nobody/nothing"),
    "unknown recipe": (["train", "maxi", "--out", "runs"], "maxi"),
    "unknown stage": (["train", "mini", "--out", "nothing", "--stages", "unet,dance"], "dance"),
    "labels of no video": (["labels", "none.mp4"], "no such file"),
    "demo exists": (["demo", "-o", "exists.mp4"], "exists already"),
    "unknown type": (["generate", "good.mp4", "--dtype", "float8"], "--dtype: invalid choice"),
    "float16 on a CPU": (["generate", "good.mp4", "--device", "cpu", "--dtype", "float16"], "use bfloat16 or float32"),
    "nothing to fetch": (["fetch", "everything"], "invalid choice"),
    "no published files": (["fetch", "full", "--from", "nothing", "--out", "full"], "nothing"),
    "unknown type of a bench": (["bench", "--dtype", "fp64"], "--dtype: invalid choice"),
    "no folder for a bench": (["bench", "--out", "none/x.json"], "none: no such folder"),
    "unknown system": (["evaluate", "--systems", "nobody", "--out", "e"], "nobody"),
    "no systems": (["evaluate", "--systems", "", "--out", "e"], "--systems: is empty"),
    "system without a name": (["evaluate", "--systems", "=ours", "--out", "e"], "'' cannot be its name"),
    "no split": (["evaluate", "--split", "", "--out", "e"], "--split: is empty"),
    "more scenes than there are": (["evaluate", "--n", "9999999", "--out", "e"], "has 1000000 test scenes"),
    "nothing was heard": (
        ["data", "shards", "passby:0-1", "--out", "s", "--heard", "nodir"],
        "nodir: nothing was heard",
    ),
    "range without end": (["data", "shards", "passby:0-99999999999", "--out", "s"], "has the seeds 0 to 3999999"),
    "range of a long number": (["data", "shards", "passby:0-" + "9" * 5000, "--out", "s"], "has the seeds 0 to"),
    "part of none": (["data", "shards", "passby:0-1", "--out", "s", "--part", "0/0"], "part: 0 of 0"),
    "unknown split": (["evaluate", "--split", "nowhere", "--out", "e"], "nowhere"),
    "one folder of sounds": (["evaluate", "--generated", "nothing"], "--reference: is missing"),
    "counterfactual of a folder": (["evaluate", "--counterfactual", "--split", "nothing"], "nothing"),
    "folders and steps": (
        ["evaluate", "--generated", "a", "--reference", "b", "--steps", "3", "--n", "2"],
        "--n, --steps: belong to generating",
    ),
    "metrics without folders": (["evaluate", "--metrics", "fad"], "--metrics: belongs to --generated and --reference"),
    "weights of judges": (
        ["evaluate", "--generated", "a", "--reference", "b", "--weights", "w.pt"],
        "the judges of the package have theirs",
    ),
    "a counterfactual in batches": (["evaluate", "--counterfactual", "--batch", "2"], "does not go with --batch"),
    "clips that lie nowhere": (["data", "vggsound", "--csv", "v.csv", "--out", "state"], "--clips: is missing"),
    "grounding from a folder": (["fetch", "grounding", "--from", "."], "--from: belongs to fetch full"),
    "half a counterfactual": (["evaluate", "--counterfactual", "--only", "measure"], "does not go with --only"),
    "no command for data": (["data"], "WHAT"),
    "no command for listen": (["listen"], "WHAT"),
    "answers that are not there": (["listen", "score", "none.json"], "none.json: no such file"),
    "a listening test into a file": (
        ["listen", "make", "--systems", "ours", "--split", "passby", "--out", "text.mp4"],
        "exists",
    ),
    "shards into a file": (["data", "shards", "passby:0-1", "--out", "text.mp4/x"], "text.mp4"),
}

OUTSIDE = {
    "no command",
    "missing file",
    "unknown label",
    "output exists",
    "nan scale",
}  # in a process of their own; the rest share this one


PYTHON = re.compile(r"=True|=False|_pretrained|`\w+=|\w\(\)")  # Words that a person at the shell has no use for


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, inputs, inside):
    words, says = WRONG[name]
    before = tree(inputs)
    r = (smooth_foley if name in OUTSIDE else inside)(*words, cwd=inputs)
    assert (r.returncode, r.stdout) == (2, ""), r.stderr
    assert r.stderr.startswith("smooth-foley: error: ") and r.stderr.count("\n") == 1 and says in r.stderr, r.stderr
    assert not PYTHON.search(r.stderr), r.stderr
    assert tree(inputs) == before


def test_videos_of_a_folder_in_any_spelling(tmp_path):
    names = ["a.MP4", "b.mts", "c.TS", "d.mpg", "e.m2ts", "f.Mkv", "g.webm", "12:30 h.mov"]
    for name in [*names, "text.txt", ".hidden.mp4", "a_foley.mp4"]:
        (tmp_path / name).touch()
    assert sorted(p.name for p in cli.find_videos([tmp_path])) == sorted(names)


def test_the_default_output_holds_the_picture(inputs, tmp_path):
    def outputs(*words):
        return [out.name for _, out, _ in cli.check_generate(parse(cli.GENERATE, words))]

    vp8, good = inputs / "vp8.webm", inputs / "good.mp4"
    assert outputs(vp8, good, "-o", tmp_path) == ["vp8_foley.mkv", "good_foley.mp4"]
    assert outputs(vp8, "-o", tmp_path / "x.MKV") == ["x.MKV"] and outputs(vp8, "-o", tmp_path / "x.wav") == ["x.wav"]


def test_help_is_quick_and_light():
    def once():
        "Seconds of processor: what it takes where nothing else runs"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        r = smooth_foley("--help")
        assert r.returncode == 0 and "generate" in r.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 1


@pytest.mark.parametrize("module", ["smooth_foley", "smooth_foley.app.main"])
def test_import_is_light(module):
    heavy = {"torch", "diffusers", "transformers", "open_clip", "matplotlib", "scipy"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_package_offers_the_pipeline():
    import smooth_foley as package
    from smooth_foley import SmoothFoleyPipeline, media, mux, pipeline

    assert (SmoothFoleyPipeline, mux) == (pipeline.SmoothFoleyPipeline, media.mux)
    assert {"SmoothFoleyPipeline", "mux"} <= set(dir(package))
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(
    "command", ["generate", "timeline", "demo", "labels", "train", "fetch", "export", "bench", "evaluate", "info"]
)
def test_every_command_explains_itself(command):
    r = smooth_foley(command, "--help")
    assert r.returncode == 0 and r.stdout.startswith(f"usage: smooth-foley {command}")


def test_labels():
    r = smooth_foley("labels")
    assert r.returncode == 0 and r.stdout.splitlines() == list(LABELS)


def test_a_reader_that_stops_early_is_no_error():
    command = f'"{sys.executable}" -m smooth_foley'
    r = subprocess.run(
        f"{command} labels | true; {command} data continuous select | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (r.stdout.count("\n"), r.stderr) == (1, "")


def test_version():
    import smooth_foley as package

    assert smooth_foley("--version").stdout.strip() == f"smooth-foley {package.__version__}"


# with the shipped model


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    "Two seconds of an airplane on a test seed, with a sound of its own"
    from smooth_foley.world.passby import scene

    frames = scene(2_000_001, audio=False).frames[:30]
    return write_video(
        tmp_path_factory.mktemp("video") / "plane.mp4", frames, fps=15, audio=np.zeros(2 * SR, np.float32)
    )


def picture(path):
    with av.open(str(path)) as f:
        return [hashlib.sha256(bytes(p)).hexdigest() for p in f.demux(f.streams.video[0]) if p.size]


@needs_mini
def test_generate(video, tmp_path):
    r = smooth_foley(
        "generate",
        video,
        "-o",
        tmp_path / "out.mp4",
        "--plot",
        tmp_path / "plot.png",
        "--keep-original",
        "--steps",
        "4",
    )
    assert r.returncode == 0 and r.stderr == "", r.stderr
    assert "CLIP sees" in r.stdout and "taken: " in r.stdout and any(label in r.stdout for label in LABELS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "plot.png"]
    assert picture(tmp_path / "out.mp4") == picture(video)
    sound = read_audio(tmp_path / "out.mp4")
    assert len(sound) == round(probe(video)["duration"] * SR) and np.abs(sound).max() > 0.005
    with av.open(str(tmp_path / "out.mp4")) as f:
        assert len(f.streams.audio) == 2
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@needs_mini
def test_a_folder_and_the_seed(video, tmp_path, inside):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in "ab":
        shutil.copy(video, tmp_path / "in" / f"{name}.mp4")
    ask = ["--label", "airplane flyby", "--steps", "2"]
    assert inside("generate", tmp_path / "in", "-o", tmp_path / "out", *ask).returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_foley.mp4", "b_foley.mp4"]
    assert inside("generate", tmp_path / "in" / "a.mp4", "-o", tmp_path / "again.mp4", *ask).returncode == 0
    assert (
        inside("generate", tmp_path / "in" / "a.mp4", "-o", tmp_path / "other.mp4", "--seed", "1", *ask).returncode == 0
    )
    first, again, other = (
        read_audio(p) for p in (tmp_path / "out" / "a_foley.mp4", tmp_path / "again.mp4", tmp_path / "other.mp4")
    )
    assert (first == again).all()  # alone or in company: the same sound
    assert not np.allclose(first, other)


@needs_mini
def test_several_sounds_takes_and_a_timeline(video, tmp_path, inside):
    ask = ["--label", "airplane flyby", "--label", "Dog Barking"]
    r = inside("timeline", video, *ask, "-o", tmp_path / "t.csv")
    assert r.returncode == 0 and (tmp_path / "t.csv").read_text().startswith("label,start,end,gain_db"), r.stderr
    (tmp_path / "t.csv").write_text("label,start,end,gain_db\nairplane flyby,0,1.5,0\ndog barking,always,,-6\n")
    how = ["--timeline", tmp_path / "t.csv", "--steps", "1", "--takes", "2", "--stems", tmp_path / "stems", "--tracks"]
    r = inside("generate", video, *how, "-o", tmp_path / "mix.mkv")
    assert r.returncode == 0 and "'airplane flyby' and 'dog barking'" in r.stdout, r.stderr
    stems = [read_audio(p) for p in sorted((tmp_path / "stems").glob("*.wav"))]
    with av.open(str(tmp_path / "mix.mkv")) as f:
        assert [s.metadata.get("title") for s in f.streams.audio] == [None, "airplane flyby", "dog barking"]
    assert len(stems) == 2 and np.corrcoef(read_audio(tmp_path / "mix.mkv")[:32000], sum(stems))[0, 1] > 0.98
    r = inside(
        "generate",
        video,
        "--label",
        "airplane flyby",
        "--steps",
        "1",
        "--takes",
        "2",
        "--pick",
        "all",
        "-o",
        tmp_path / "a.wav",
    )
    assert r.returncode == 0 and sorted(p.name for p in tmp_path.glob("a*")) == ["a_seed0.wav", "a_seed1.wav"]
    assert "seed 1: agrees with the condition" in r.stdout


@needs_mini
def test_takes_of_a_folder_go_on_and_are_no_videos_to_work_on(video, tmp_path, inside):
    for name in "ab":
        shutil.copy(video, tmp_path / f"{name}.mp4")
    ask = ["--label", "airplane flyby", "--steps", "1", "--pick", "all", "--takes"]
    assert inside("generate", tmp_path, *ask, "2").returncode == 0
    (tmp_path / "b_foley_seed1.mp4").unlink()
    kept = (tmp_path / "a_foley_seed0.mp4").stat().st_mtime_ns
    r = inside("generate", tmp_path, *ask, "3")
    assert r.returncode == 0, r.stderr
    made = [f"{name}_foley_seed{k}.mp4" for name in "ab" for k in range(3)]
    assert sorted(p.name for p in tmp_path.glob("*_foley*")) == made
    assert (tmp_path / "a_foley_seed0.mp4").stat().st_mtime_ns == kept


@needs_mini
def test_stems_touch_nothing_else_in_their_folder(video, tmp_path, inside):
    (tmp_path / "link").symlink_to(video)
    (tmp_path / "plane_dog_barking.wav").symlink_to(video)
    before = video.read_bytes()
    ask = ["--label", "dog barking", "--steps", "1", "--stems", tmp_path, "--overwrite"]
    r = inside("generate", video, *ask, "-o", tmp_path / "out.mp4")
    assert r.returncode == 0, r.stderr
    assert (tmp_path / "link").is_symlink() and video.read_bytes() == before
    assert not (tmp_path / "plane_dog_barking.wav").is_symlink()


@needs_mini
def test_one_bad_video_of_a_folder_is_named_and_the_others_are_done(video, inputs, tmp_path, inside):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a.mp4", "c.mp4"):
        shutil.copy(video, clips / name)
    for name in ("text.mp4", "cut.mp4"):
        shutil.copy(inputs / name, clips / f"b_{name}")
    words = ("generate", clips, "--label", "airplane flyby", "--steps", "2")
    r = inside(*words)
    assert r.returncode == 1 and "2 of 4 videos failed" in r.stderr.splitlines()[-1], r.stderr
    assert "b_text.mp4" in r.stderr.splitlines()[-1] and "b_cut.mp4" in r.stderr.splitlines()[-1]
    made = sorted(p.name for p in clips.iterdir() if "_foley" in p.name)
    assert made == ["a_foley.mp4", "c_foley.mp4"]
    first, age = (clips / "a_foley.mp4").read_bytes(), (clips / "a_foley.mp4").stat().st_mtime_ns
    (clips / "c_foley.mp4").unlink()
    (clips / "b_text.mp4").unlink()
    shutil.copy(video, clips / "b_cut.mp4")
    r = inside(*words)
    assert r.returncode == 0 and "1 of them have their sound already" in r.stdout, r.stderr
    assert (clips / "a_foley.mp4").stat().st_mtime_ns == age and (clips / "b_cut_foley.mp4").exists()
    assert (clips / "c_foley.mp4").exists() and (clips / "a_foley.mp4").read_bytes() == first
    (clips / "b_cut.mp4").write_text("words")
    r = inside(*words, "--overwrite")
    assert r.returncode == 1 and (clips / "a_foley.mp4").stat().st_mtime_ns != age


@needs_mini
def test_names_and_containers_of_any_kind(video, inputs, tmp_path):
    take, bytes_, long = "12:30 take.mp4", os.fsdecode(b"caf\xe9.mp4"), "é" * 120 + ".mp4"
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in (take, bytes_, long):
        shutil.copy(video, tmp_path / "in" / name)
    shutil.copy(inputs / "vp8.webm", tmp_path / "in")
    words = ["in", "-o", "out", "--label", "airplane flyby", "--steps", "1", "--keep-original"]
    r = smooth_foley("generate", *words, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    made = sorted(os.listdir(tmp_path / "out"))
    assert made == sorted([Path(n).stem + "_foley.mp4" for n in (take, bytes_, long)] + ["vp8_foley.mkv"])
    assert all(probe(tmp_path / "out" / n)["audio"] == "aac" for n in made)
    r = smooth_foley(
        "generate",
        f"in/{bytes_}",
        "-o",
        f"out/{bytes_}",
        "--plot",
        "out/plot.png",
        "--label",
        "airplane flyby",
        "--steps",
        "1",
        cwd=tmp_path,
    )
    assert r.returncode == 0 and r"wrote out/caf\udce9.mp4" in r.stdout and (tmp_path / "out" / "plot.png").exists(), (
        r.stderr
    )


@needs_mini
def test_weights_that_do_not_fit_are_named(video, tmp_path, inside):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(mini_path(), tmp_path / "model")
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_wrong.weight"] = weights.pop("conv_in.weight")
    save_file(weights, file, metadata={"format": "pt"})
    r = inside("generate", video, "-o", tmp_path / "out.mp4", "--model", tmp_path / "model")
    assert r.returncode == 2 and "conv_in.weight" in r.stderr and r.stderr.count("\n") == 1, r.stderr
    file.write_bytes(file.read_bytes()[:1000])
    r = inside("generate", video, "-o", tmp_path / "out.mp4", "--model", tmp_path / "model")
    assert r.returncode == 2 and r.stderr.count("\n") == 1, r.stderr
    assert not (tmp_path / "out.mp4").exists()


@needs_mini
def test_a_kill_leaves_nothing(video, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CI")}
    ours, theirs = terminal()
    words = ["generate", str(video), "-o", str(tmp_path / "out.mp4"), "--steps", "1000"]
    p = subprocess.Popen([*COMMAND, *words], env=env, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    while not re.search(rb"[1-9]\d*/1000", said):  # the bar tells that it has begun
        said += (more := os.read(ours, 200))
        assert more, said
    p.send_signal(signal.SIGTERM)
    assert p.wait(300) == 143
    os.close(ours)
    assert list(tmp_path.iterdir()) == []


@needs_mini
def test_demo(tmp_path, inside):
    r = inside("demo", "--steps", "2", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.mp4", "demo.png"]
    assert len(read_audio(tmp_path / "demo.mp4")) == round(probe(tmp_path / "demo.mp4")["duration"] * SR)


@needs_mini
def test_info(inside):
    r = inside("info")
    assert r.returncode == 0 and "Apache-2.0" in r.stdout and "unet" in r.stdout and "defaults" in r.stdout
    megabytes = float(r.stdout.split("together")[1].split("M parameters")[1].split()[0])
    assert 0 < megabytes <= 26
