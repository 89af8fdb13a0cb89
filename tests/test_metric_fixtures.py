"Metrics that need no network, held to the numbers of their reference implementations (tests/fixtures/metrics)"

import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from smooth_foley.core import FoleyError
from smooth_foley.metrics.clip_score import clip_cosine, clip_score, desync, ib_score
from smooth_foley.metrics.divergence import inception_score, kl_per_clip, log_softmax, mean_kl
from smooth_foley.metrics.doppler import centroid_adherence, centroid_track, f0_correlation, reference_adherence
from smooth_foley.metrics.frechet import (
    embedding_rows,
    frechet_difference,
    frechet_distance,
    frechet_draws,
    frechet_infinity,
    frechet_interval,
    kid,
)
from smooth_foley.metrics.intervals import paired_difference
from smooth_foley.metrics.timing import (
    _suppress,
    activity,
    activity_coverage,
    average_precision,
    detect_onsets,
    onset_scores,
    short_time_energy,
)

FOLDER = Path(__file__).parent / "fixtures" / "metrics"
T = load(lzma.open(FOLDER / "statistics.safetensors.xz").read())
V = json.loads((FOLDER / "statistics.json").read_text())


def get(name):
    "A tensor, whole: names that end in .2^-k hold integers"
    key = next(k for k in T if k == name or k.startswith(name + ".2^-"))
    return T[key] * 2.0 ** -int(key.partition(".2^-")[2] or 0)


def pair(name):
    if name == "same":
        return T["fad.same_x"], T["fad.same_x"]
    if name == "offset":
        return T["fad.offset_x"], T["fad.offset_x"] + np.float32(2)
    if name not in ("unit", "relu"):
        return get(f"fad.{name}_x"), get(f"fad.{name}_y")
    v, n = get(f"fad.{name}.lower"), dict(unit=150, relu=95)[name]
    k = int((8 * len(v) + 1) ** 0.5 / 2)
    L = np.zeros((k, k))
    L[np.tril_indices(k)] = v
    return L[:n], L[n:]


def test_fixtures_are_small_and_described():
    assert sum(p.stat().st_size for p in FOLDER.glob("statistics*")) < 1_000_000
    about = json.loads((FOLDER / "statistics.README.json").read_text())
    assert set(about["tensors"]) == set(T)


# Fréchet


@pytest.mark.parametrize("name", ["full", "small", "lowrank", "unit", "relu", "same", "offset"])
def test_frechet_equals_every_reference(name):
    x, y = pair(name)
    f = frechet_distance(x, y)
    assert len(V["fad"][name]) == 8 and (f.n1, f.n2, f.d) == (len(x), len(y), x.shape[1])
    for who, ref in V["fad"][name].items():
        assert f.value == pytest.approx(ref, rel=0 if name == "same" else 1e-6, abs=1e-8 if name == "same" else 0), who


def by_eigenvalues(x, y):
    "The same distance by another road: eigenvalues of the product of covariances"
    C, D = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(C @ D).real, 0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(C) + np.trace(D) - 2 * root


@pytest.mark.parametrize("seed", range(12))
def test_frechet_invariances(seed):
    rng = np.random.default_rng(seed)
    d, n1, n2 = rng.integers(2, 24), rng.integers(2, 60), rng.integers(2, 60)
    x, y = rng.normal(size=(n1, d)) @ rng.normal(size=(d, d)), rng.normal(size=(n2, d)) + rng.normal(size=d)
    base, Q = frechet_distance(x, y).value, np.linalg.qr(rng.normal(size=(d, d)))[0]
    near = dict(rel=1e-9, abs=1e-9)
    assert frechet_distance(y, x).value == pytest.approx(base, **near)
    assert frechet_distance(x @ Q, y @ Q).value == pytest.approx(base, **near)
    assert frechet_distance(rng.permutation(x), y + 0).value == pytest.approx(base, **near)
    assert frechet_distance(x - 5, y - 5).value == pytest.approx(base, **near)
    assert frechet_distance(0.1 * x, 0.1 * y).value == pytest.approx(0.01 * base, **near)
    assert frechet_distance(np.c_[x, np.zeros(n1)], np.c_[y, np.zeros(n2)]).value == pytest.approx(base, **near)
    assert frechet_distance(x, x).value < 1e-9 and base >= frechet_distance(x, y).means >= 0
    assert base == pytest.approx(by_eigenvalues(x, y), rel=1e-5, abs=1e-5)


def test_frechet_takes_tensors_and_any_precision():
    x, y = pair("small")
    assert frechet_distance(torch.tensor(x, requires_grad=True), torch.tensor(y)).value == frechet_distance(x, y).value
    assert float(frechet_distance(x, y)) == frechet_distance(x, y).value


def test_frechet_says_its_numbers():
    x, y = pair("small")
    u, v = pair("full")
    assert "n = 60 and 50, d = 128" in str(frechet_distance(x, y)) and frechet_distance(x, y).few
    assert "too large" in str(frechet_distance(x, y)) and "too large" not in str(frechet_distance(u, v))


@pytest.mark.parametrize(
    "bad,what",
    [
        (lambda x: x[:1], "more clips"),
        (lambda x: x[:0], "more clips"),
        (lambda x: x[:, :5], "same network"),
        (lambda x: x[0], r"\(n, d\)"),
        (lambda x: x[:, :0], r"\(n, d\)"),
        (lambda x: np.where(x > 2, np.nan, x), "nan or inf"),
        (lambda x: np.where(x > 2, np.inf, x), "nan or inf"),
    ],
)
@pytest.mark.parametrize("measure", [frechet_distance, frechet_infinity, frechet_draws, kid])
def test_wrong_sets_are_refused_in_one_line(bad, what, measure):
    x = np.random.default_rng(0).normal(size=(40, 8))
    for a, b in ((x, bad(x)), (bad(x), x)):
        with pytest.raises(FoleyError, match=what) as e:
            measure(a, b)
        assert "\n" not in str(e.value)


def test_nan_rows_are_named():
    x = np.zeros((30, 3))
    x[[4, 17]] = np.nan
    with pytest.raises(FoleyError, match=r"generated: 2 of 30 rows .*rows 4, 17"):
        embedding_rows(x, "generated")


def test_infinity_is_a_seeded_line_towards_less():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 16)), rng.normal(size=(300, 16))
    f = frechet_infinity(x, y)
    again, other = frechet_infinity(x, y), frechet_infinity(x, y, seed=3)
    assert f.value == again.value != other.value
    assert f.values[0] == pytest.approx(frechet_distance(x, y).value, rel=1e-9)  # at full size nothing is drawn away
    assert abs(f.value) < 0.25 * frechet_distance(x, y).value and f.slope > 0 and f.r2 > 0.9
    with pytest.raises(FoleyError, match="at least 10"):
        frechet_infinity(x[:9], y)


def test_rows_of_a_clip_stay_together():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(80, 4))
    a = frechet_draws(x, y, np.repeat(np.arange(6), 10), np.repeat(list("abcdefgh"), 10), n=20)
    order = rng.permutation(60)
    b = frechet_draws(x[order], y, np.repeat(np.arange(6), 10)[order], np.repeat(list("abcdefgh"), 10), n=20)
    assert a == pytest.approx(b, rel=1e-9) and len(set(a)) == 20
    value, low, high = frechet_interval(x, y, n=50)
    assert low < value < high and frechet_interval(x, y, n=50) == (value, low, high)


def test_interval_of_a_distance_covers_another_choice_of_clips():
    "Distances of other clips from the same source fall inside about 95 times in 100"
    rng = np.random.default_rng(0)

    def make():
        return rng.normal(size=(150, 3)), 1.5 * rng.normal(size=(150, 3)) + 0.5

    truth = 3 * 0.25 + 3 * 0.25
    hit = [low <= truth <= high for _, low, high in (frechet_interval(*make(), n=60, seed=k) for k in range(60))]
    assert 0.8 < np.mean(hit) <= 1


def test_difference_of_systems_is_paired():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(100, 6))
    a, b = y + 0.8 * rng.normal(size=y.shape), y + 0.5 * rng.normal(size=y.shape)
    d = frechet_difference(a, b, y, n=60)
    assert 0 < d["low"] < d["difference"] < d["high"]
    turned = frechet_difference(b, a, y, n=60)
    assert turned["difference"] == -d["difference"] and turned["low"] == pytest.approx(-d["high"])
    with pytest.raises(FoleyError, match="same clips"):
        frechet_difference(a[:-1], b, y)


def test_kid_equals_the_reference():
    (ref,) = V["kid"].values()
    mean, std = kid(T["kid_x"], T["kid_y"], subsets=20, subset_size=50)
    assert mean == pytest.approx(ref["kernel_inception_distance_mean"], rel=1e-5) and std == pytest.approx(
        ref["kernel_inception_distance_std"], rel=1e-5
    )


def test_kid_by_hand_and_unbiased():
    x, y = np.array([[1.0], [2.0], [4.0]]), np.array([[0.0], [3.0]])

    def k(a, b):
        return (a * b + 1) ** 3

    want = (
        (2 * (k(1, 2) + k(1, 4) + k(2, 4))) / 6
        + 2 * k(0, 3) / 2
        - 2 * sum(k(a, b) for a in (1, 2, 4) for b in (0, 3)) / 6
    )
    assert kid(x, y) == (pytest.approx(want), 0.0)
    rng = np.random.default_rng(0)
    v = [kid(rng.normal(size=(20, 5)), rng.normal(size=(30, 5)))[0] for _ in range(300)]
    assert abs(np.mean(v)) < 4 * np.std(v) / 300**0.5 and min(v) < 0 < max(v)
    with pytest.raises(FoleyError, match="from 2 to 2"):
        kid(x, y, subsets=2)


# divergence


def kl_values():
    gt, gen = get("logits_gt"), get("logits_gen")
    K = V["kl"]
    for scale, tail in ((1, ""), (6, "_peaky")):
        m = mean_kl(scale * gt, scale * gen)
        yield m["kl"], K["av_bench" + tail]["kl_softmax"]
        yield m["kl_eps"], K["audioldm_eval" + tail]["kullback_leibler_divergence_softmax"]
        yield m["kl_eps"], K["specvqgan" + tail]["kullback_leibler_divergence"]
        yield m["kl"], K["float64_definition_softmax_no_eps" + tail]
        yield m["kl_eps"], K["float64_definition_softmax_eps1e-6_in_log_of_generated" + tail]
        yield mean_kl(scale * gen, scale * gt)["kl"], K["swapped_direction_av_bench_softmax" + tail]
    yield (
        mean_kl(get("logits309_gt"), get("logits309_gen_3_per_video"))["kl_eps"],
        K["specvqgan_309_multisample"]["kullback_leibler_divergence"],
    )


def test_kl_equals_every_reference():
    values = list(kl_values())
    assert len(values) == 13
    for ours, ref in values:
        assert ours == pytest.approx(ref, rel=1e-5)
    assert kl_per_clip(get("logits_gt"), get("logits_gen")) == pytest.approx(
        V["kl"]["per_pair_float64_no_eps"], rel=2e-4
    )
    assert mean_kl(get("logits309_gt"), get("logits309_gen_3_per_video"))["samples"] == 3


@pytest.mark.parametrize("seed", range(8))
def test_kl_properties(seed):
    rng = np.random.default_rng(seed)
    a, b = 4 * rng.normal(size=(2, 30, rng.integers(2, 40)))
    kl = kl_per_clip(a, b)
    assert (kl > 0).all() and kl_per_clip(a, a + 3) == pytest.approx(np.zeros(30), abs=1e-12)
    assert kl_per_clip(a, b + rng.normal(size=(30, 1))) == pytest.approx(kl)
    order = rng.permutation(a.shape[1])
    assert kl_per_clip(a[:, order], b[:, order]) == pytest.approx(kl)
    ref = torch.nn.functional.kl_div(torch.tensor(b).log_softmax(1), torch.tensor(a).softmax(1), reduction="none").sum(
        1
    )
    assert kl == pytest.approx(ref.numpy())  # torch's argument order is (generated, real)
    assert (kl_per_clip(a, b, 1e-6) <= kl + 1e-4).all() and (
        kl_per_clip(50 * a, 50 * b, 1e-6) < np.log(1e6) + 1e-3
    ).all()
    twice = kl_per_clip(a, np.stack([b, a], 1).reshape(60, -1))
    assert twice == pytest.approx(kl / 2)


def test_direction_matters_where_a_class_is_missing():
    both, one = np.array([[0.0, 0.0, -30.0]]), np.array([[0.0, -30.0, -30.0]])
    assert kl_per_clip(both, one)[0] > 10 > 1 > kl_per_clip(one, both)[0]  # a sound left out costs more than one added


@pytest.mark.parametrize(
    "real,gen,what",
    [
        ((4, 5), (4, 6), "same classifier"),
        ((4, 5), (6, 5), "same clips"),
        ((4, 5), (2, 5), "same clips"),
        ((0, 5), (0, 5), "at least 1"),
        ((5,), (5,), r"\(n, d\)"),
    ],
)
def test_wrong_logits_are_refused(real, gen, what):
    with pytest.raises(FoleyError, match=what):
        mean_kl(np.zeros(real), np.zeros(gen))


def test_nan_logits_are_refused():
    x = np.zeros((4, 5))
    x[2, 2] = np.nan
    for a, b in ((x, x * 0), (np.zeros((4, 5)), x)):
        with pytest.raises(FoleyError, match="rows 2"):
            kl_per_clip(a, b)
    with pytest.raises(FoleyError, match="rows 2"):
        inception_score(x, 2)


def test_inception_score_equals_every_reference():
    x, isc = get("isc_logits"), V["isc"]
    for key in ("av_bench(splits=10,shuffle,rng_seed=2020)", "audioldm_eval(splits=10,shuffle,rng_seed=2020)"):
        assert inception_score(x) == pytest.approx(
            (isc[key]["inception_score_mean"], isc[key]["inception_score_std"]), rel=1e-5
        )
    assert inception_score(x, 1, None) == (
        pytest.approx(isc["av_bench(splits=1,noshuffle)"]["inception_score_mean"], rel=1e-5),
        0.0,
    )


def test_inception_score_bounds():
    rng = np.random.default_rng(0)
    for c in (2, 7, 30):
        x = 3 * rng.normal(size=(60, c))
        assert 1 <= inception_score(x, 1, None)[0] <= c
        assert inception_score(np.zeros((60, c)))[0] == pytest.approx(1)
        assert inception_score(99 * np.eye(c), 1, None)[0] == pytest.approx(c)
        assert inception_score(x, 1, None)[0] == pytest.approx(
            inception_score(x, 1, 5)[0]
        )  # one part: order does not matter
    with pytest.raises(FoleyError, match="from 1 to 9"):
        inception_score(np.zeros((9, 3)))
    assert np.exp(log_softmax(1e4 * rng.normal(size=(5, 9)))).sum(1) == pytest.approx(np.ones(5))


# scores of audio and picture


def test_clip_scores_equal_the_references():
    a, f, C = T["wav2clip_audio_feats"], T["clip_frame_feats"], V["clip_score"]
    s = clip_score(a, f)
    assert s["cosine"] == pytest.approx(C["cos_mean_of_raw_frame_feats(FoleyCrafter issue 22)"], abs=1e-6)
    assert clip_score(a, f, "unit")["cosine"] == pytest.approx(C["cos_mean_of_l2normalised_frame_feats"], abs=1e-6)
    assert clip_score(a, f, "cosine")["cosine"] == pytest.approx(C["mean_of_per_frame_cos"], abs=1e-6)
    assert s["100cos"] == pytest.approx(C["score_100cos"], rel=1e-5)
    assert s["50+50cos"] == pytest.approx(C["score_50_plus_50cos(explains Smooth-Foley ~54)"], rel=1e-5)
    assert 250 * np.maximum(s["cosine"], 0).mean() == pytest.approx(
        C["score_2.5max0cos_x100(Hessel CLIPScore)"], rel=1e-5
    )
    assert ib_score(T["imagebind_video"], T["imagebind_audio"]).mean() == pytest.approx(
        V["ib_score(av_bench: mean cosine)"], rel=1e-5
    )
    assert desync(T["sync_logits_first14"], T["sync_logits_last14"]).mean() == pytest.approx(
        V["desync(av_bench)"], rel=1e-5
    )


@pytest.mark.parametrize("over", ["raw", "unit", "cosine"])
def test_cosines_ignore_length_rotation_and_order(over):
    rng = np.random.default_rng(0)
    a, f = rng.normal(size=9), rng.normal(size=(7, 9))
    Q = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    c = clip_cosine(a, f, over)
    assert -1 <= c <= 1
    for b, g in ((5 * a, f), (a, 3 * f), (a @ Q, f @ Q), (a, f[::-1]), (torch.tensor(a), torch.tensor(f))):
        assert clip_cosine(b, g, over) == pytest.approx(c, abs=1e-12)
    assert clip_cosine(-a, f, over) == pytest.approx(-c) and clip_cosine(f[0], f[:1], over) == pytest.approx(1)


def test_a_clip_of_one_frame_and_clips_of_different_length():
    rng = np.random.default_rng(0)
    a, f = rng.normal(size=(3, 4)), [rng.normal(size=(n, 4)) for n in (1, 5, 9)]
    assert clip_score(a, f)["cosine"] == pytest.approx([clip_cosine(x, y) for x, y in zip(a, f)])
    for bad, what in (
        (lambda: clip_score(a, f[:2]), "same clips"),
        (lambda: clip_score([], []), "no clips"),
        (lambda: clip_cosine(a[0], np.zeros((3, 4))), "no direction"),
        (lambda: clip_cosine(a[0], np.zeros((0, 4))), "at least 1"),
        (lambda: clip_cosine(a[0], np.zeros((3, 5))), "trained to agree"),
        (lambda: ib_score(a, a[:2]), "same clips"),
        (lambda: desync(), "per window"),
        (lambda: desync(np.eye(21), np.eye(21)[:3]), "every window"),
    ):
        with pytest.raises(FoleyError, match=what):
            bad()


# onsets


def test_onsets_equal_the_references():
    mm, cf, mean = V["onsets"]["mmaudio_eval_onsets(delta=0.3)"], V["onsets"]["condfoleygen_eval_onsets(delta=0.1)"], []
    for i in range(3):
        gen, gt = get(f"gen_wav_{i}"), get(f"gt_wav_{i}")
        for w, k in ((gen, "gen"), (gt, "gt")):
            assert (np.round(detect_onsets(w, 22050) * 22050) == T[f"{k}_onsets_librosa_delta0.3_{i}"]).all()
        r = onset_scores(gen, 22050, T[f"gt_times_{i}"], "mmaudio")
        mean.append([r["accuracy"], r["ap"], r["f1"]])
        assert mean[-1] == pytest.approx([mm[f"clip{i}"][k] for k in ("accuracy", "AP", "F1")], abs=6e-5)
        assert r["found"] == len(T[f"gen_onsets_after_nms_{i}"])
        r = onset_scores(gen, 22050, detect_onsets(gt, 22050), "condfoleygen")
        assert [r["accuracy"], r["ap"]] == pytest.approx([cf[f"clip{i}"][k] for k in ("acc", "ap")], abs=1e-9)
    assert np.mean(mean, 0) == pytest.approx([mm["all"][k] for k in ("accuracy", "AP", "F1")], abs=6e-5)


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_equals_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 30)
    y, s = np.r_[True, rng.random(n) < 0.5], np.round(rng.random(n + 1), 1)
    assert average_precision(y, s) == pytest.approx(metrics.average_precision_score(y, s))


def test_of_near_onsets_the_strongest_stays():
    at, strength = [0, 1000, 2000, 3000, 9000], [0.1, 0.9, 0.2, 0.3, 0.1]
    assert _suppress(at, strength, every_second=False) == [1000, 3000, 9000]
    assert _suppress(at, strength, every_second=True) == [1000, 3000, 9000]
    assert _suppress([0, 1000, 2000], [0.1, 0.9, 0.2], every_second=False) == [1000]
    assert _suppress([0, 1000, 2000], [0.1, 0.9, 0.2], every_second=True) == [1000, 2000]


def clicks(times, sr, seconds=3.0, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * sr)) / sr
    return (
        sum((t >= s) * np.exp(-np.maximum(t - s, 0) * 30) * rng.standard_normal(len(t)) for s in times) * 0.2
        + 1e-3 * rng.standard_normal(len(t))
    ).astype(np.float32)


@pytest.mark.parametrize("sr", [8000, 16000, 48000])
def test_onsets_at_any_rate_and_level(sr):
    times = [0.4, 1.1, 1.8, 2.4]
    x = clicks(times, sr)
    for gain in (1, 0.01):
        r = onset_scores(gain * x, sr, times)
        assert (r["accuracy"], r["ap"], r["f1"]) == (1, 1, 1)
    assert (
        onset_scores(x, sr, [0.75, 1.45])["accuracy"] == 0 and onset_scores(x, sr, np.add(times, 0.08))["accuracy"] == 1
    )


def test_onsets_of_nothing():
    for x in (np.zeros(16000), np.zeros(1), np.zeros(0), 1e-9 * np.ones(16000)):
        r = onset_scores(x, 16000, [0.5])
        assert (r["accuracy"], r["ap"], r["f1"]) == (0, 0, 0)
        assert np.isnan(onset_scores(x, 16000, [])["ap"])
    for bad, what in (
        ((np.zeros((2, 9)), 16000, [0.1]), "mono"),
        ((np.full(9000, np.nan), 16000, [0.1]), "not numbers"),
        ((np.zeros(9), 16000, [np.nan]), "without nan"),
    ):
        with pytest.raises(FoleyError, match=what):
            onset_scores(*bad)


# activity


def test_coverage_is_a_share_of_the_truth():
    x = clicks([0.5], 16000) * 0
    x[16000:32000] = np.random.default_rng(0).standard_normal(16000)
    true = np.zeros(300, bool)
    true[:200] = True
    assert activity_coverage(x, 16000, true) == pytest.approx(0.5, abs=0.02)
    assert activity_coverage(x[:24000], 16000, true) == pytest.approx(
        0.25, abs=0.02
    )  # what is missing at the end is not filled
    assert activity_coverage(x, 16000, true[:150]) == pytest.approx(1 / 3, abs=0.02) and np.isnan(
        activity_coverage(x, 16000, true * 0)
    )
    for n in (0, 1):
        assert activity_coverage(x[:n], 16000, true) == 0
    with pytest.raises(FoleyError, match="100 Hz"):
        activity_coverage(x, 16000, true[None])


def test_nan_audio_is_refused():
    x = np.zeros(16000)
    x[5] = np.nan
    for f in (short_time_energy, activity):
        with pytest.raises(FoleyError, match="not numbers"):
            f(x, 16000)


# pairs


def test_sign_flips_are_exact_for_few_clips():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        a, b = rng.normal(size=(2, n))
        d = a - b
        sums = [abs(np.dot(s, d)) for s in itertools.product((-1, 1), repeat=n)]
        assert paired_difference(a, b)["p"] == np.mean(np.array(sums) >= abs(d.sum()) - 1e-9)


def test_paired_difference_agrees_with_the_t_test():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    b = a + 0.2 * rng.normal(size=40) + 0.07
    r, t = paired_difference(a, b), stats.ttest_rel(a, b)
    assert r["p"] == pytest.approx(t.pvalue, abs=0.02)
    low, high = t.confidence_interval()
    assert (r["low"], r["high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01)) and r["n"] == 40


def test_paired_difference_of_odd_input():
    a = np.array([1.0, np.nan, 3.0, 4.0])
    b = np.array([0.0, 1.0, np.nan, 2.0])
    assert paired_difference(a, b)["n"] == 2 and paired_difference(a, b)["difference"] == 1.5
    assert paired_difference([], [])["n"] == 0 and np.isnan(paired_difference([np.nan], [1.0])["p"])
    assert paired_difference([1.0, 1.0], [1.0, 1.0])["p"] == 1
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50))
    assert paired_difference(x, y, seed=1) == paired_difference(x, y, seed=1)
    assert paired_difference(x, y)["difference"] == -paired_difference(y, x)["difference"]
    for u, v in ((x, y[:-1]), (x[:, None], y[:, None])):
        with pytest.raises(FoleyError, match="same clips"):
            paired_difference(u, v)


# spectral centroid


@pytest.mark.parametrize("sr", [16000, 22050, 44100])
def test_centroid_follows_a_shifted_spectrum(sr):
    t = np.arange(3 * sr) / sr
    ratio = 1.1 - 0.07 * t
    x = sum(np.sin(2 * np.pi * f * np.cumsum(ratio) / sr + i) for i, f in enumerate((300, 700, 1500)))
    r = centroid_adherence(x, sr, ratio[:: sr // 100][:300])
    assert r["correlation"] > 0.995 and r["slope"] == pytest.approx(1, abs=0.03)
    assert centroid_adherence(x[::-1], sr, ratio[:: sr // 100][:300])["correlation"] < -0.99
    half = np.arange(300) < 150
    assert centroid_adherence(x, sr, ratio[:: sr // 100][:300], half)["frames"] <= 150


def test_reference_adherence_is_of_tracks():
    t = np.arange(48000) / 16000
    f = 300 * 2 ** (-t / 4)

    def voice(g):
        return sum(np.sin(2 * np.pi * h * np.cumsum(g) / 16000) / h for h in (1, 2, 3))

    for track in ("f0", "centroid"):
        assert reference_adherence(0.1 * voice(f), voice(f), 16000, track)["correlation"] > 0.999
        assert reference_adherence(voice(f[::-1]), voice(f), 16000, track)["correlation"] < -0.98
    assert np.isnan(reference_adherence(np.zeros(48000), voice(f), 16000)["correlation"])
    assert np.isnan(reference_adherence(voice(f)[:100], voice(f), 16000)["correlation"])
    assert np.isnan(f0_correlation(centroid_track(voice(f) * 0, 16000), np.ones(300))["correlation"])
    with pytest.raises(FoleyError, match="choose one of"):
        reference_adherence(voice(f), voice(f), 16000, "pitch")
