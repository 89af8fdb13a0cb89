"Players: small, equally loud, without external files, and other people's text stays text"

import base64
import io
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from nbdev.clean import clean_nb

from smooth_foley.core import FoleyError
from smooth_foley.media import SR, Clip
from smooth_foley.output import FoleyOutput
from smooth_foley.players import LONGEST, as_html, card, hear, loudness, match_loudness, player, side_by_side, small_mp4
from smooth_foley.temporal_condition import TemporalCondition
from smooth_foley.world.passby import scene

BOOKS = Path(__file__).resolve().parent.parent / "nbs"
WITH_PLAYERS = ("03_vocoder", "12_pipeline", "compare/70_foleycrafter", "paper/81_figures", "world/20_passby")
EVIL = "<img src=x onerror=alert(1)>\" ' & \x1b[2J\n.mp4"


def embedded(page, kind):
    "What the data URIs of a page hold"
    return [base64.b64decode(data) for data in re.findall(rf"data:{kind};base64,([^\"']+)", page)]


def sound_of(data):
    with av.open(io.BytesIO(data)) as f:
        rate = f.streams.audio[0].rate
        return np.concatenate([x.to_ndarray()[0] for x in f.decode(audio=0)]), rate


def pictures_of(data):
    with av.open(io.BytesIO(data)) as f:
        return [x.to_ndarray(format="rgb24") for x in f.decode(video=0)]


def tone(seconds, f=440.0):
    return (0.3 * np.sin(2 * np.pi * f * np.arange(round(seconds * SR)) / SR)).astype(np.float32)


def clip(seconds=2.0, size=(48, 64), path="clip.mp4"):
    n = round(15 * seconds)
    frames = np.random.default_rng(0).integers(0, 255, (n, *size, 3), np.uint8)
    return Clip(frames, np.arange(n) / 15, seconds, Path(path))


def output(n=1, seconds=2.0, **changes):
    condition = TemporalCondition.from_intervals([(0.5, 1.0)], seconds)
    facts = dict(labels=["train"] * n, prompts=["train"] * n, conditions=[condition] * n, proposals=[None] * n)
    facts |= dict(audios=[tone(seconds)] * n, latents=torch.zeros(n, 8, 8, 64), mels=torch.zeros(n, 16, 1024))
    facts |= dict(clips=[clip(seconds)] * n, sample_rate=SR, durations=[seconds] * n)
    return FoleyOutput(**{**facts, **changes})


def test_a_take_is_a_film_with_its_sound():
    page = output()._repr_html_()
    (film,) = embedded(page, "video/mp4")
    (picture,) = embedded(page, "image/png")
    audio, rate = sound_of(film)
    assert rate == SR and abs(len(audio) / SR - 2.0) < 0.15 and np.abs(audio).max() > 0.05
    assert len(pictures_of(film)) == 30 and picture[:4] == b"\x89PNG"
    assert "sounds 0.50 of 2.00 s" in page and "http" not in page


def test_takes_stand_side_by_side_equally_loud():
    page = output(3, audios=[tone(2.0), 0.2 * tone(2.0), tone(2.0, 200)])._repr_html_()
    levels = [loudness(*sound_of(film)) for film in embedded(page, "video/mp4")]
    assert len(levels) == 3 and np.ptp(levels) < 0.5


def test_names_and_labels_stay_text():
    proposals = [[(EVIL, 0.7), ("train", 0.3)]]
    evil = output(labels=[EVIL], prompts=[EVIL + "?"], clips=[clip(path=EVIL)], proposals=proposals)
    for page in (evil._repr_html_(), as_html(card(EVIL, facts=EVIL)), as_html(side_by_side([], EVIL))):
        assert "<img src=x" not in page and "&lt;img src=x" in page
        assert "\x1b" not in page and "\n.mp4" not in page


@pytest.mark.parametrize("kind", ["mel", "latent", "text"])
def test_parts_that_are_missing(kind):
    without = dict(mel=dict(audios=None), latent=dict(audios=None, mels=None), text=dict(clips=None))[kind]
    if kind == "text":
        without |= dict(labels=[None], conditions=[None], prompts=["a bell"])
    page = output(**without)._repr_html_()
    assert ("<video" in page, "<audio" in page) == (kind != "text", kind == "text")
    if kind == "text":
        assert "a bell" in page


def test_a_long_film_is_cut_and_says_so():
    page = output(seconds=20.0)._repr_html_()
    (film,) = embedded(page, "video/mp4")
    assert len(pictures_of(film)) == 15 * LONGEST and abs(len(sound_of(film)[0]) / SR - LONGEST) < 0.15
    assert "the first 12 s" in page


@pytest.mark.parametrize("size", [(63, 65), (300, 401), (1080, 1920)])
def test_pictures_of_any_size(size):
    film = small_mp4(clip(0.4, size).frames, np.arange(6) / 15, 0.4, tone(0.4))
    shown = pictures_of(film)
    assert len(shown) == 6 and max(shown[0].shape[:2]) <= 256 and all(side % 2 == 0 for side in shown[0].shape[:2])


def test_nothing_to_play():
    assert player(None, [], 2.0) is None
    with pytest.raises(FoleyError, match="begin before the end"):
        hear({"a": tone(1.0), "b": tone(5.0)}, SR, start=2.0)
    with pytest.raises(FoleyError):
        hear({}, SR)


def test_silence_stays_silent_and_nothing_clips():
    silence, loud = match_loudness([np.zeros(SR), np.sign(tone(1.0))], SR)
    assert not silence.any() and 0 < np.abs(loud).max() <= 0.991
    assert match_loudness([], SR) == []


def test_a_scene_shows_itself():
    page = scene(2_000_001, size=32)._repr_html_()
    (film,) = embedded(page, "video/mp4")
    assert abs(len(sound_of(film)[0]) / SR - 10.24) < 0.15 and "seed 2000001" in page and len(page) < 200_000
    mixed = scene(2_000_003, "passby_mixed", frames=False)
    page = mixed._repr_html_()
    assert "<audio" in page and all(label in page for label in mixed.truths)


@pytest.mark.parametrize("name", WITH_PLAYERS)
def test_stored_players(name):
    "At most 3 s each, equally loud within a cell, and kept by nbdev_clean"
    book = json.loads((BOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    pages = [
        "".join(o["data"]["text/html"])
        for c in book["cells"]
        for o in c.get("outputs", [])
        if "text/html" in o.get("data", {})
    ]
    rows = [[sound_of(data) for data in embedded(page, "audio/mpeg")] for page in pages]
    rows = [row for row in rows if row]
    assert rows
    for row in rows:
        assert all(len(audio) / rate <= 3.05 for audio, rate in row)
        assert np.ptp([loudness(audio, rate) for audio, rate in row]) < 1.5
    before = json.dumps(book["cells"])
    clean_nb(book)
    assert json.dumps(book["cells"]) == before
