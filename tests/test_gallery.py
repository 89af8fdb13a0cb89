"The gallery: a page that plays from a disk, written whole or not at all"

import re
import signal
from dataclasses import replace
from pathlib import Path

import av
import pytest

from smooth_foley.app.main import main
from smooth_foley.compare.systems import load_with_folder
from smooth_foley.core import mini_path
from smooth_foley.media import SR, probe, read_audio
from smooth_foley.paper.gallery import SCENES, find_scene, write_gallery
from smooth_foley.players import loudness
from smooth_foley.world import passby

pytestmark = pytest.mark.skipif(not (mini_path() / "model_index.json").is_file(), reason="needs the shipped model")


def command(*words):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return main(["demo", *map(str, words)])
    finally:
        signal.signal(signal.SIGTERM, handler)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "gallery"
    assert command("--gallery", folder, "--steps", 1) == 0
    return folder


def test_the_page_and_its_films(gallery):
    page = (gallery / "index.html").read_text(encoding="utf-8")
    films = re.findall(r'src="([^"]+)"', page)
    assert len(films) == len(set(films)) == 18 and page.count("<video") == 18
    assert sorted([*films, "index.html"]) == sorted(p.name for p in gallery.iterdir())
    assert not re.search(r"https?:|//\w|<link|@import", re.sub(r"data:[^\"]+", "", page))
    assert all(wanted.title in page for wanted in SCENES) and page.count("timing F1") == 18


def test_every_film_plays(gallery):
    for file in gallery.glob("*.mp4"):
        facts = probe(file)
        assert (facts["codec"], facts["audio"], facts["frames"]) == ("h264", "aac", 153)
        with av.open(str(file)) as f:
            assert f.streams.video[0].pix_fmt == "yuv420p" and sum(1 for _ in f.decode(video=0)) == 153
        assert abs(len(read_audio(file)) / SR - passby.DURATION) < 0.15


def test_the_gallery_is_small(gallery):
    assert sum(p.stat().st_size for p in gallery.iterdir()) < 2_000_000


def test_the_true_sound_is_the_scene(gallery):
    for wanted in SCENES[:2]:
        audio = read_audio(gallery / f"{wanted.name}-truth.mp4")
        assert loudness(audio, SR) == pytest.approx(-20, abs=1.5)


@pytest.mark.parametrize("wanted", SCENES, ids=lambda w: w.name)
def test_scenes_are_test_scenes_with_the_property(wanted):
    seed = find_scene(wanted)
    s = passby.scene(seed, wanted.split, frames=False, audio=False)
    assert 2_000_000 <= seed < 3_000_000 and wanted.has(s) and wanted.label in (None, s.label)
    assert seed == find_scene(wanted)


WRONG = {  # name: (what is there, words, what the line says)
    "a file": ("file", [], "exists and is no gallery"),
    "a folder": ("folder", [], "exists and is no gallery"),
    "a folder with --overwrite": ("folder", ["--overwrite"], "exists and is no gallery"),
    "an empty folder": ("empty", [], "exists and is no gallery"),
    "another page": ("page", ["--overwrite"], "exists and is no gallery"),
    "a link to a gallery": ("link", ["--overwrite"], "exists and is no gallery"),
    "a gallery": ("gallery", [], "is a gallery already"),
    "a gallery with a file of its owner": ("more", ["--overwrite"], "holds notes.txt"),
    "no folder around it": ("none", [], "no such folder"),
    "a scale": (None, ["--guidance-scale", 3], "--guidance-scale: does not go with --gallery"),
    "another output": (None, ["-o", "x.mp4"], "--out: does not go with --gallery"),
    "no steps": (None, ["--steps", 0], "--steps: must be"),
    "no model": (None, ["--model", "nothing/there"], "nothing/there"),
}


def put(kind, target, gallery):
    "Something at the place of the gallery"
    if kind == "file":
        target.write_text("precious")
    if kind in ("folder", "empty", "page"):
        target.mkdir()
    if kind == "folder":
        (target / "precious.mp4").write_text("precious")
    if kind == "page":
        (target / "index.html").write_text("<html>my page</html>")
    if kind == "link":
        target.symlink_to(gallery)
    if kind in ("gallery", "more"):
        target.mkdir()
        for p in gallery.iterdir():
            (target / p.name).write_bytes(p.read_bytes())
    if kind == "more":
        (target / "notes.txt").write_text("precious")
    return target / "deeper" / "still" if kind == "none" else target


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, tmp_path, gallery, capsys):
    kind, words, says = WRONG[name]
    target = put(kind, tmp_path / "g", gallery)
    before = tree(tmp_path)
    capsys.readouterr()
    assert command("--gallery", target, *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and says in said.err, said.err
    assert tree(tmp_path) == before and (tmp_path / "g").is_symlink() == (kind == "link")


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path):
    def stop(s):
        raise KeyboardInterrupt

    loaded = load_with_folder()
    scenes = (SCENES[4], replace(SCENES[0], has=stop))
    with pytest.raises(KeyboardInterrupt):
        write_gallery(tmp_path / "g", loaded, steps=1, scenes=scenes)
    assert list(tmp_path.iterdir()) == []
    write_gallery(tmp_path / "g", loaded, steps=1, scenes=scenes[:1])
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_gallery(tmp_path / "g", loaded, seed=1, steps=1, overwrite=True, scenes=scenes)
    assert tree(tmp_path) == before
    write_gallery(tmp_path / "g", loaded, seed=1, steps=1, overwrite=True, scenes=scenes[:1])
    after = tree(tmp_path)
    assert set(after) == set(before) and after["g/strikes-ours.mp4"] != before["g/strikes-ours.mp4"]
