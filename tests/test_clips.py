"Real footage, where the folder ../shared/clips is there"

import csv
import hashlib
from pathlib import Path

import av
import numpy as np
import pytest

from smooth_foley.core import FoleyError
from smooth_foley.media import SR, mux, probe, read_audio, read_clip

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
if not (CLIPS / "clips.csv").is_file():
    pytest.skip(f"no real clips: {CLIPS.name}/ is absent", allow_module_level=True)
ROWS = list(csv.DictReader((CLIPS / "clips.csv").open(encoding="utf-8")))
VIDEOS = [r for r in ROWS if r["file"].endswith(".mp4")]


def packets(path):
    with av.open(str(path)) as f:
        return [hashlib.sha256(bytes(p)).hexdigest() for p in f.demux(f.streams.video[0]) if p.size]


@pytest.mark.parametrize("row", VIDEOS, ids=lambda r: r["file"])
def test_read(row):
    clip, seconds = read_clip(CLIPS / row["file"], size=64), float(row["duration_s"])
    assert abs(clip.duration - seconds) < 0.1
    assert clip.frames.shape == (round(clip.duration * 15), 64, 64, 3)
    assert np.allclose(np.diff(clip.times), 1 / 15)
    assert clip.frames.std() > 5  # a picture, not a blank
    assert (probe(CLIPS / row["file"])["audio"] is not None) == (row["has_audio"] == "True")


@pytest.mark.parametrize("row", VIDEOS, ids=lambda r: r["file"])
def test_mux(row, tmp_path):
    source = CLIPS / row["file"]
    out = mux(
        source, np.random.default_rng(0).uniform(-0.1, 0.1, 15 * SR), SR, tmp_path / "out.mp4", keep_original=True
    )
    assert packets(source) == packets(out)
    assert len(read_audio(out)) == round(probe(source)["duration"] * SR)
    with av.open(str(out)) as f:
        assert len(f.streams.audio) == 1 + (row["has_audio"] == "True")


def test_longer_than_the_model_covers():
    with pytest.raises(FoleyError, match="10.67 s, and at most 10.24"):
        read_clip(CLIPS / "foleycrafter_case5.mp4", size=64, max_duration=10.24)


@pytest.mark.parametrize("row", [r for r in ROWS if r["file"].endswith(".wav")], ids=lambda r: r["file"])
def test_sound_alone(row):
    assert abs(len(read_audio(CLIPS / row["file"])) / SR - float(row["duration_s"])) < 0.1
    with pytest.raises(FoleyError, match="only sound"):
        read_clip(CLIPS / row["file"])
