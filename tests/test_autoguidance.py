"A weaker model guides: what a call then computes, in clips of any length, and what it refuses"

import numpy as np
import pytest
import torch

from smooth_foley.app.main import main
from smooth_foley.backbone import make_unet
from smooth_foley.core import FoleyError
from smooth_foley.media import Clip
from smooth_foley.pipeline import SmoothFoleyPipeline


@pytest.fixture
def pipe():
    p = SmoothFoleyPipeline.from_random()
    p.set_progress_bar_config(disable=True)
    return p


def weak_unet(pipe, **kw):
    torch.manual_seed(1)
    context = pipe.unet.config.cross_attention_dim
    return make_unet(block_out_channels=(8, 8, 16), norm_num_groups=8, cross_attention_dim=context, **kw)


def latents(pipe, seconds=4.0, **call):
    n = round(15 * seconds)
    frames = np.random.default_rng(0).integers(0, 255, (n, 64, 64, 3), np.uint8)
    clip = Clip(frames, np.arange(n) / 15, seconds, "noise.mp4")
    return pipe(clip, label="siren", condition=[(1, 3)], output_type="latent", **call).latents


@pytest.mark.parametrize("seconds", [4.0, 14.0])
def test_at_scale_one_nothing_guides_and_at_others_the_weak_model_does(pipe, seconds):
    alone = latents(pipe, seconds, guidance_scale=1.0)
    plain = latents(pipe, seconds, guidance_scale=3.0)
    pipe.enable_autoguidance(weak_unet(pipe))
    assert torch.equal(latents(pipe, seconds, guidance_scale=1.0), alone)
    guided = latents(pipe, seconds, guidance_scale=3.0)
    assert not torch.allclose(guided, alone, atol=1e-2) and not torch.allclose(guided, plain, atol=1e-2)
    pipe.disable_autoguidance()
    assert torch.equal(latents(pipe, seconds, guidance_scale=3.0), plain)


def test_the_same_with_and_without_reuse(pipe):
    pipe.enable_autoguidance(weak_unet(pipe))
    known, anew = (latents(pipe, guidance_scale=3.0, reuse=reuse) for reuse in (True, False))
    assert torch.allclose(known, anew, atol=1e-3)


def test_the_full_model_as_its_own_weak_one_guides_frames_and_condition_only(pipe):
    pipe.enable_autoguidance(pipe.unet)
    without = dict(frame_scale=0.0, temporal_scale=0.0)
    one, seven = (latents(pipe, guidance_scale=w, **without) for w in (1.0, 7.0))
    assert torch.allclose(one, seven, atol=1e-3)
    assert not torch.allclose(latents(pipe, guidance_scale=7.0), latents(pipe, guidance_scale=1.0), atol=1e-2)


def test_an_interval_leaves_the_weak_model_out(pipe):
    alone = latents(pipe, guidance_scale=1.0)
    pipe.enable_autoguidance(weak_unet(pipe))
    assert torch.equal(latents(pipe, guidance_scale=3.0, guidance_interval=(0, 0)), alone)


@pytest.mark.parametrize("asked", [dict(negative_prompt="wind"), dict(frame_guidance_scale=2.0)])
def test_what_would_have_no_effect_is_refused(pipe, asked):
    pipe.enable_autoguidance(weak_unet(pipe))
    with pytest.raises(FoleyError, match="has no effect while a weaker model guides"):
        latents(pipe, **asked)


def test_a_model_of_other_latents_is_refused(pipe):
    with pytest.raises(FoleyError, match="in_channels 4, the pipeline's UNet 8"):
        pipe.enable_autoguidance(weak_unet(pipe, channels=4))
    assert pipe.weak == {}


@pytest.mark.parametrize(
    "system, told",
    [
        ("x=ours:weak_unet=nowhere", "config.json"),
        ("x=foleycrafter:weak_unet=nowhere", "weak_unet guides ours"),
        ("x=truth-vae:weak_unet=nowhere", "weak_unet guides ours"),
    ],
)
def test_wrong_systems_are_one_line(tmp_path, capsys, system, told):
    code = main(["evaluate", "--systems", system, "--n", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and told in said[-1]
