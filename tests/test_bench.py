"""The bench: complete numbers, and the reference's way that arrives at the same latents"""

import json

import numpy as np
import pytest
import torch

from smooth_foley.app import bench as b
from smooth_foley.app.bench_command import bench_summary, save_plot, write_bench
from smooth_foley.core import FoleyError
from smooth_foley.pipeline import SmoothFoleyPipeline


@pytest.fixture(scope="module")
def result():
    return b.bench(steps=2, seconds=1.0, device="cpu", reference=True)


def test_every_stage_is_measured(result, tmp_path):
    saved = json.loads(write_bench(result, tmp_path / "bench.json").read_text())
    assert saved == result and saved["schema"] == 1
    for way, stages in (("ours", b.TIMED), ("reference", b.TIMED[1:])):
        assert set(saved[way]) == {*stages, "total"}
        assert all(r["seconds"] > 0 and r["peak_gb"] > 0.01 for r in saved[way].values())
        assert all(saved[way][n]["gflop"] > 0 for n in ("frames", "text", "denoise", "vae", "total"))
        assert saved[way]["total"]["seconds"] == pytest.approx(
            sum(r["seconds"] for n, r in saved[way].items() if n not in ("load", "total")), abs=1e-3
        )
    assert saved["peak"]["fp32"]["best"] > 0 and saved["machine"]["threads"] > 0
    assert saved["settings"] | dict(scale="mini", steps=2, seconds=1.0, frames=15, dtype="fp32") == saved["settings"]


def test_nothing_names_the_machine(result):
    import getpass
    import platform

    text = json.dumps(result)
    assert (
        platform.node() not in text
        and "/" not in json.dumps(result["settings"]) + json.dumps(result["machine"])
        and f'"{getpass.getuser()}"' not in text
    )


def test_both_ways_agree(result):
    assert result["difference"]["max_abs"] < 1e-4 * result["difference"]["reference_max_abs"]


def both(pipe, tmp_path, steps=3, change=lambda c: c):
    video = b.drifting_video(tmp_path / "clip.mp4", 1.0)
    ours, condition = b.run_ours(pipe, video, tmp_path, b.Meter(), steps)
    return b._difference(ours, b.run_reference(pipe, video, tmp_path, b.Meter(), change(condition), 15, steps))


def test_random_pipeline_agrees_and_the_comparison_can_fail(tmp_path):
    from smooth_foley.temporal_condition import TemporalCondition

    pipe = SmoothFoleyPipeline.from_random()
    for p in pipe.temporal_adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    same = both(pipe, tmp_path)["relative_rms"]
    other = both(pipe, tmp_path, change=lambda c: TemporalCondition(c.times, c.similarity, ~c.active, c.duration))[
        "relative_rms"
    ]
    assert same < 1e-5 and other > 100 * same


def test_operations_grow_with_the_steps(tmp_path):
    pipe, video, flops = SmoothFoleyPipeline.from_random(), b.drifting_video(tmp_path / "clip.mp4", 1.0), {}
    for steps in (1, 2, 4):
        meter = b.Meter(flops=True)
        b.run_ours(pipe, video, tmp_path, meter, steps)
        flops[steps] = {n: s["flops"] for n, s in meter.stages.items()}
    step = flops[2]["denoise"] - flops[1]["denoise"]
    assert step > 0 and flops[4]["denoise"] - flops[2]["denoise"] == 2 * step and flops[1]["denoise"] < 2 * step
    assert flops[4]["frames"] == flops[1]["frames"] and flops[4]["vae"] == flops[1]["vae"]


def test_fast_layers_give_the_networks_back():
    pipe = SmoothFoleyPipeline.from_random()
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    before = pipe.frame_encoder.encode_frames(frames)
    with b.fast_on(pipe):
        assert torch.allclose(pipe.frame_encoder.encode_frames(frames), before, atol=1e-5, rtol=1e-4)
        assert any("forward" in vars(m) for m in pipe.unet.modules())
    assert not any("forward" in vars(m) for net in (pipe.unet, pipe.frame_encoder) for m in net.modules())
    assert torch.equal(pipe.frame_encoder.encode_frames(frames), before)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="minutes on a CPU without bfloat16")
def test_bfloat16_runs_and_states_its_error():
    r = b.bench(random_weights=True, steps=1, seconds=0.5, device="cpu", dtype="bf16", reference=True)
    assert set(r["peak"]) == {"bf16", "fp32"} and 0 < r["difference"]["relative_rms"] < 0.2


def test_compilation_is_not_timed(monkeypatch, tmp_path):
    "Once counted, which leaves networks as they are, once to compile, then timed; the reference has nothing to compile"
    plan = b._Plan("mini", True, "cpu", "fp32", 1, 0.5, 15.0, True, True, 16, None)
    counted = {"ours": [], "reference": []}

    def way(name):
        def run(pipe, video, folder, meter, *how):
            counted[name].append(meter.flops)
            with meter("denoise"):
                return name

        return run

    monkeypatch.setattr(b, "_compile", lambda pipe: None)
    monkeypatch.setattr(b, "run_ours", way("ours"))
    monkeypatch.setattr(b, "run_reference", way("reference"))
    pipe = SmoothFoleyPipeline.from_random()
    assert b._measure_ours(pipe, plan, None, tmp_path)[0] == "ours"
    b._measure_reference(pipe, plan, None, tmp_path, None, 1)
    assert counted == {"ours": [True, False, False], "reference": [True, False]}


@pytest.mark.parametrize("repeats, runs", [(0, [True]), (1, [True, False])])
def test_the_reference_is_timed_as_points_are(repeats, runs, monkeypatch):
    counted, real = [], b.run_reference

    def run(pipe, video, folder, meter, *how):
        counted.append(meter.flops)
        return real(pipe, video, folder, meter, *how)

    monkeypatch.setattr(b, "run_reference", run)
    point = [b.points()[0]]
    how = dict(random_weights=True, device="cpu", seconds=0.5, repeats=repeats, which=point, reference=True)
    assert [row["kind"] for row in b.bench_points(**how)][-1] == "reference" and counted == runs


def test_table_and_plot(result, tmp_path):
    text = bench_summary(result)
    assert all(name in text for name in (*b.TIMED, "total", "as fast as the reference")) and "nan" not in text
    assert save_plot(result, tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(scale="huge"), "mini"),
        (dict(dtype="fp8"), "bf16"),
        (dict(dtype="fp16", device="cpu"), "bf16"),
        (dict(steps=0), "1 or more"),
        (dict(seconds=11.0), "10.24"),
        (dict(fps=0), "120"),
    ],
)
def test_wrong_options_are_one_line(wrong, words):
    with pytest.raises(FoleyError) as e:
        b.bench(**{"device": "cpu", **wrong})
    assert words in str(e.value) and "\n" not in str(e.value)
