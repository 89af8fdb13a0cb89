"Metrics: what is no story"

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from smooth_foley.compare.folders import summarise, write_results
from smooth_foley.compare.measure import COLUMNS
from smooth_foley.core import FoleyError
from smooth_foley.listen.judges import JUDGES, judge_mels, judge_path, load_judge, recognise
from smooth_foley.metrics.doppler import doppler_adherence, f0_correlation, f0_range, f0_track
from smooth_foley.metrics.intervals import bootstrap_interval, exchange_difference
from smooth_foley.metrics.physics import (
    as_heard,
    closest_approach,
    dropouts,
    level_adherence,
    level_track,
    same_shift,
    turned,
)
from smooth_foley.metrics.timing import (
    activity,
    counts,
    frame_scores,
    scores,
    short_time_energy,
)
from smooth_foley.paper import tables
from smooth_foley.world import passby

rng = np.random.default_rng(0)


# timing


def test_scores_are_bounded_and_ordered():
    for _ in range(200):
        s = frame_scores(rng.random(30) < rng.random(), rng.random(30) < rng.random())
        assert all(0 <= v <= 1 for v in s.values()) and s["iou"] <= s["f1"] + 1e-12
        assert min(s["precision"], s["recall"]) - 1e-12 <= s["f1"] <= max(s["precision"], s["recall"]) + 1e-12


def test_counts_add_up():
    p, t = rng.random(100) < 0.4, rng.random(100) < 0.6
    tp, fp, fn = counts(p, t)
    assert tp + fp == p.sum() and tp + fn == t.sum()


@pytest.mark.parametrize("sr", [8000, 16000, 22050, 44100])
def test_timeline_has_a_hundred_steps_a_second_at_any_rate(sr):
    x = np.sin(2 * np.pi * 300 * np.arange(int(3.21 * sr)) / sr) * (np.arange(int(3.21 * sr)) > sr)
    assert len(short_time_energy(x, sr)) == len(activity(x, sr)) == 321
    assert abs(np.argmax(activity(x, sr)) - 100) <= 2


@pytest.mark.parametrize("n", [0, 1, 100, 400])
def test_very_short_sounds(n):
    x = np.ones(n, np.float32)
    assert len(short_time_energy(x, 16000)) == round(n / 160)
    if n >= 160:
        assert activity(x, 16000).all()


def test_stereo_is_refused():
    with pytest.raises(FoleyError, match="mono"):
        activity(np.zeros((2, 16000)), 16000)


def test_a_mover_25_db_down_is_still_heard():
    t = np.arange(16000 * 8) / 16000
    x = np.sin(2 * np.pi * 500 * t) * 10 ** (-25 / 20 * np.abs(t - 4) / 4) + 1e-3 * rng.standard_normal(len(t))
    assert activity(x, 16000).all()


def test_bootstrap_covers():
    "95% intervals hold the true mean about 95 times in 100"
    hit = [lo <= 0 <= hi for _, lo, hi in (bootstrap_interval(rng.normal(size=40), n=400, seed=k) for k in range(200))]
    assert 0.88 < np.mean(hit) <= 1


def test_bootstrap_of_rows_leaves_nan_out():
    c = np.array([[1, 0, 1], [np.nan] * 3, [3, 1, 0]])
    assert bootstrap_interval(c, of="f1")[0] == pytest.approx(scores(4, 1, 1)["f1"])
    assert all(np.isnan(bootstrap_interval([np.nan])))


# pitch


def harmonic(f, sr=16000, amps=(1, 0.5, 0.3, 0.2)):
    return sum(a * np.sin(2 * np.pi * (h + 1) * np.cumsum(f) / sr) for h, a in enumerate(amps))


@pytest.mark.parametrize("amps", [(1, 0.5, 0.3, 0.2), (0, 1, 1, 1, 1), (0.2, 1, 0.8, 0.9, 0.6), (1, 0, 0.5, 0, 0.35)])
def test_missing_and_weak_fundamentals(amps):
    f = np.linspace(180, 230, 32000)
    track = f0_track(harmonic(f, amps=amps), 16000, 100, 400)
    assert np.nanmedian(np.abs(1200 * np.log2(track / f[::160]))) < 10


@pytest.mark.parametrize("sr", [16000, 44100])
def test_pitch_in_noise(sr):
    f = np.linspace(300, 200, 2 * sr)
    x = harmonic(f, sr)
    track = f0_track(x + 0.5 * x.std() * rng.standard_normal(len(x)), sr, 120, 500)
    r = f0_correlation(track, f[:: sr // 100][: len(track)])
    assert r["frames"] > 150 and r["correlation"] > 0.99


def test_silence_between_is_unvoiced():
    f = np.full(16000, 250.0)
    track = f0_track(np.r_[harmonic(f), np.zeros(16000), harmonic(f)], 16000, 150, 500)
    assert np.isnan(track[110:190]).all() and np.isfinite(track[10:90]).all() and np.isfinite(track[210:290]).all()


@pytest.mark.parametrize("n", [0, 10, 160, 500])
def test_short_sounds_have_a_track(n):
    assert len(f0_track(np.zeros(n), 16000, 100, 200)) == round(n / 160)


def test_ranges_hold_every_true_pitch():
    for label in passby.TONAL:
        lo, hi = f0_range(label)
        for i in range(40):
            f = passby.scene(1_000_600 + i, label=label, frames=False, audio=False).truth["f0"]
            assert not np.isfinite(f).any() or (lo < np.nanmin(f) and np.nanmax(f) < hi), (label, i)


def test_wrong_pitch_is_found_wrong():
    s = passby.scene(1_000_700, frames=False, label="airplane flyby")
    assert doppler_adherence(s.audio[::-1], s.sr, s.label, s.truth["f0"])["correlation"] < 0


# the judge


def test_judge_is_small_and_plain():
    files = {p.name for p in judge_path().iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "log.csv", "training.json"}
    assert sum(p.stat().st_size for p in judge_path().iterdir()) < 1.5e6
    about = json.loads((judge_path() / "training.json").read_text())
    assert about["first_seed"] == JUDGES and about["first_seed"] + about["n_scenes"] <= 4_000_000
    steps = [int(r["step"]) for r in csv.DictReader(open(judge_path() / "log.csv"))]
    assert steps == sorted(set(steps)) and steps[-1] == about["config"]["max_train_steps"]


def test_judge_does_not_depend_on_the_batch():
    J, x = load_judge(), np.stack([passby.scene(1_000_000 + i, frames=False).audio for i in range(3)])
    together = J.classify(x)
    assert torch.allclose(together, torch.cat([J.classify(r[None]) for r in x]), atol=1e-5)
    assert recognise(J, x)[0][0] == passby.scene(1_000_000, frames=False, audio=False).label


def test_missing_judge_is_one_line(tmp_path):
    with pytest.raises(FoleyError, match="train_judge"):
        load_judge(tmp_path)


def test_cache_is_read_again(tmp_path):
    a = judge_mels(tmp_path, 2)
    when = [p.stat().st_mtime_ns for p in tmp_path.iterdir()]
    b = judge_mels(tmp_path, 2)
    assert when == [p.stat().st_mtime_ns for p in tmp_path.iterdir()] and np.array_equal(a["mel"], b["mel"])


def test_the_test_of_pooled_scores_can_tell_and_can_be_silent():
    rng = np.random.default_rng(1)
    n = 80

    def counts_of(q):
        right = rng.binomial(150, q, n)
        return np.stack([right, rng.binomial(150, 0.1, n), 150 - right], 1)

    real = exchange_difference(counts_of(0.9), counts_of(0.8), "f1")
    none = exchange_difference(counts_of(0.8), counts_of(0.8), "f1")
    assert real["p"] < 0.01 and real["low"] > 0 and none["p"] > 0.05 and none["low"] < 0 < none["high"]


# physics


def passage(**dials):
    return passby.scene(
        1_000_010, "passby_continuous", frames=False, label="race car, auto racing", active=((-9, 99),), **dials
    )


def test_level_knows_nothing_of_gain_and_everything_of_time():
    s = passage(t_nearest=3.0)
    law, _ = as_heard(s.truth["distance"])
    loud, soft, back = (level_adherence(level_track(x, s.sr), law) for x in (s.audio, 0.01 * s.audio, s.audio[::-1]))
    assert loud["slope"] == pytest.approx(soft["slope"], abs=1e-3) and loud["slope"] == pytest.approx(1, abs=0.03)
    assert back["correlation"] < 0.3


def test_compressed_loudness_has_a_smaller_slope_but_the_same_correlation():
    s = passage(t_nearest=3.0)
    law, _ = as_heard(s.truth["distance"])
    gain = np.interp(
        np.arange(len(s.audio)) / s.sr, s.truth["t"], 10 ** (-0.5 * (np.nan_to_num(law, nan=np.nanmin(law)) + 30) / 20)
    )
    r = level_adherence(level_track(s.audio * gain, s.sr), law)
    assert r["slope"] == pytest.approx(0.5, abs=0.05) and r["correlation"] > 0.98


@pytest.mark.parametrize("sr", [8000, 16000, 44100])
def test_dropouts_at_any_rate(sr):
    t = np.arange(5 * sr) / sr
    x = np.sin(2 * np.pi * 300 * t) * ~((t > 1) & (t < 1.4))
    r = dropouts(x, sr, np.ones(500))
    assert r["per_second"] == pytest.approx(0.2) and r["share"] == pytest.approx(0.08, abs=0.006)
    silent_there = np.ones(500)
    silent_there[95:145] = 0
    assert dropouts(x, sr, silent_there)["per_second"] == 0


def test_closest_approach_is_asked_only_where_it_can_be_heard():
    s = passage(t_nearest=5.0)

    def ask(distance, sounding):
        return closest_approach(s.audio, s.sr, distance, sounding)["level"]

    r, on = s.truth["distance"], s.truth["sounding"]
    assert ask(r, on) < 0.1
    assert np.isnan(ask(np.full_like(r, 20.0), on)), "nothing moves"
    assert np.isnan(ask(r, s.truth["t"] > 5.2)), "it sounds only after it has passed"
    assert np.isnan(ask(np.linspace(200, 20, len(r)), on)), "it is nearest when the clip ends"


def test_a_shape_that_both_sounds_have_does_not_turn():
    rng_ = np.random.default_rng(1)
    true = np.linspace(0, 10, 300)
    right = []
    for _ in range(400):
        own, a, b = 20 * rng_.standard_normal(300), *0.5 * rng_.standard_normal((2, 300))
        right.append(turned(own + a, own + b, true, true[::-1])["right"])
    assert abs(np.mean(right) - 0.5) < 0.08, "noise turns right in half of the cases"
    assert turned(own + 0.1 * true, own + 0.1 * true[::-1], true, true[::-1])["slope"] == pytest.approx(0.1)
    assert turned(-true, -true[::-1], true, true[::-1])["right"] == 0
    assert same_shift(1, 2, 4, 3) == 0 and same_shift(2, 1, 4, 3) == 1


# tables

SYSTEMS = [s for s in tables.ROWS.values() if s]
SPLITS = ("passby_continuous", "passby")


def made_up(folder, n=12):
    "An evaluation with known numbers: only `ours` is always right, FoleyCrafter is never recognised"
    keys, rows = ("cond_tp", "cond_fp", "cond_fn", "act_tp", "act_fp", "act_fn"), []
    for split in SPLITS:
        for i in range(n):
            for s in SYSTEMS:
                good = s in ("ours", "paper", "ours-clipwise")
                r = dict(
                    split=split,
                    clip=f"{split}-{i}",
                    label=passby.TONAL[i % 6],
                    system=s,
                    heard="x",
                    prob=0.5,
                    right=float(s != "foleycrafter"),
                    kl=0.1 * (1 + i) + (not good),
                    clip_score=0.5 + 0.01 * i,
                    f0_adherence=0.1 * (s == "ours") + 0.01 * i,
                    closest_level=9.0 if i == 0 else 0.01 * i,
                )
                rows.append(
                    {
                        **dict.fromkeys(COLUMNS, ""),
                        **r,
                        **{k: (10 + i % 3 if good else 5) if k.endswith("tp") else 0 if good else 5 for k in keys},
                    }
                )
    write_results(folder / "clips.csv", rows, list(rows[0]))
    summarise(folder)
    return folder


def test_tables_of_made_up_rows(tmp_path):
    folder = made_up(tmp_path)
    here = tables.cells(folder)
    assert here["passby", "condition F1", "paper"]["value"] == 1 and here["passby", "condition F1", "foleycrafter"][
        "value"
    ] == pytest.approx(0.5)
    for text in (tables.paper_table(folder, tables.TABLE_1), tables.timing_table(folder), tables.results_table(folder)):
        assert len({line.count("|") for line in text.split("\n")}) == 1 and "nan" not in text
    first = tables.paper_table(folder, tables.TABLE_1)
    assert "(paper 1.558)" in first and "(paper 52.867)" in first
    assert f"{50 + 50 * here['passby', 'CLIP score', 'paper']['value']:.3g} [" in first


def test_one_clip_far_off_does_not_decide_the_closest_approach(tmp_path):
    here = tables.cells(made_up(tmp_path))
    r = here["passby", "closest approach by level (s)", "ours"]
    assert r["value"] == pytest.approx(0.065) and 0.01 <= r["low"] < r["value"] < r["high"] < 1


def test_tables_show_what_has_been_measured_and_nothing_else(tmp_path):
    folder = made_up(tmp_path)
    text = tables.timing_table(folder, tables.PHYSICS)
    assert (
        "closest approach by level" in text and "level adherence" not in text and "true sound through the VAE" in text
    )
    with open(folder / "summary.csv", newline="") as f:
        kept = [r for r in csv.DictReader(f) if r["system"] != "truth-vae" and "closest" not in r["measure"]]
    write_results(folder / "summary.csv", kept, list(kept[0]))
    assert tables.timing_table(folder, tables.PHYSICS) == tables.films_results(folder) == "not measured yet"
    assert "VAE" not in tables.results_table(folder) + tables.paper_table(folder, tables.TABLE_1) + tables.timing_table(
        folder
    )


def test_claims_follow_the_numbers(tmp_path):
    found = {(r["claim"], r["split"]): r for r in tables.claims(made_up(tmp_path))}

    def words(part):
        return {r["verdict"] for (c, _), r in found.items() if part in c}

    assert words("the label finds the sound") == {"holds"} and words("closer in meaning than FoleyCrafter") == {"holds"}
    assert words("better timed than clip-wise") == {"not shown"} and words(
        "the prompt helps FoleyCrafter to be recognised"
    ) == {"reversed"}
    assert words("time order follow the Doppler shift better than clip-wise") == {"holds"}
    assert all(r["n"] == 12 for r in found.values())


def test_shipped_results_are_of_two_hundred_clips():
    folder = Path(__file__).parent.parent / "results" / "evaluate"
    counts_ = {}
    for r in csv.DictReader(open(folder / "clips.csv", newline="")):
        counts_[r["split"], r["system"]] = counts_.get((r["split"], r["system"]), 0) + 1
    assert all(counts_[split, s] >= 200 for split in SPLITS for s in SYSTEMS)


def test_without_results_the_command_says_so_in_one_line(tmp_path):
    r = subprocess.run(
        [sys.executable, "-m", "smooth_foley.app.paper_commands"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        r.returncode
        and "Traceback" not in r.stderr
        and "smooth-foley evaluate" in r.stderr
        and r.stderr.count("\n") == 1
    )
