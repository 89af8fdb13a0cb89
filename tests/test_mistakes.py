"""The parity checks can fail: each deliberate mistake drives all checks named with it beyond their tolerance.

A mistake is a system in which one thing is changed. The worst of its checks misses its tolerance at least `factor`
times, which is about half of what was measured. Where equality is asked for, any difference counts as infinitely many
times.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from parity import CHECKS, error, load_system
from torchvision.transforms import v2
from transformers import CLIPTextModel, SpeechT5HifiGan

from smooth_foley.clip import FrameEncoder
from smooth_foley.core import FoleyError
from smooth_foley.frame_adapter import FrameAdapter
from smooth_foley.mel import MelTransform

RUN, SOUND = ("pipe_clip_steps", "pipe_clip_image"), ("pipe_clip_wav",)


@pytest.fixture(scope="module")
def system():
    return load_system()


@dataclass
class Mistake:
    make: Callable  # system -> the wrong system
    checks: tuple  # Checks that look at it
    factor: float  # All of them miss their tolerance, the worst at least so many times


MISTAKES = {}


def mistake(*checks, factor):
    def register(f):
        MISTAKES[f.__name__] = Mistake(f, checks, factor)
        return f

    return register


def changed(s, part, f):
    "A copy of a component, changed in place"
    other = copy.deepcopy(getattr(s.pipe, part))
    f(other)
    return s.but(**{part: other})


def retyped(s, part, cls, **config):
    "The component's weights in another class or configuration"
    old = getattr(s.pipe, part)
    new = cls.from_config({**old.config, **config})
    new.load_state_dict(old.state_dict())
    return s.but(**{part: new.eval()})


def reconfigured(s, part, cls, **config):
    "The same for classes of `transformers`"
    old = getattr(s.pipe, part)
    new = cls(type(old.config)(**{**old.config.to_dict(), **config}))
    new.load_state_dict(old.state_dict())
    return s.but(**{part: new.eval()})


# Guidance, sampling, text


@mistake(*RUN, factor=5000)
def halves_of_the_guidance_swapped(s):
    def swap(m, args, out):
        out.sample = torch.cat(out.sample.chunk(2)[::-1])
        return out

    return changed(s, "unet", lambda m: m.register_forward_hook(swap))


@mistake(*RUN, factor=150)
def guidance_of_7_instead_of_7_5(s):
    return s.but(guidance_scale=7.0)


@mistake("pipe_clip_image", "pipe_noctrl_latents", factor=5000)
def ddim_instead_of_pndm(s):
    return s.but(scheduler=DDIMScheduler.from_config(s.pipe.scheduler.config))


@mistake(*RUN, factor=25)
def last_alpha_set_to_one(s):
    return s.but(scheduler=PNDMScheduler.from_config(s.pipe.scheduler.config, set_alpha_to_one=True))


@mistake("timesteps25", "pipe_clip_steps", factor=100)
def timesteps_without_offset(s):
    return s.but(scheduler=PNDMScheduler.from_config(s.pipe.scheduler.config, steps_offset=0))


@mistake(*RUN, "text_embeds", factor=4000)
def negative_prompt_forgotten(s):
    return s.but(negative="")


@mistake(*RUN, "text_embeds", factor=5000)
def prompts_swapped(s):
    return s.but(negative=s.prompt, prompt=s.negative)


@mistake("text_embeds", "unet_ip1", factor=50)
def text_encoder_with_gelu(s):
    return reconfigured(s, "text_encoder", CLIPTextModel, hidden_act="gelu")


@mistake("unet_ip1", *RUN, factor=40)
def unet_weights_in_bfloat16(s):
    def rounded(m):
        for p in m.parameters():
            p.data = p.data.bfloat16().float()

    return changed(s, "unet", rounded)


@mistake("pipe_seed42_image", factor=2500)
def noise_of_another_seed(s):
    return s.but(seed=43)


# Frames


@mistake("unet_ip1", "ip_tokens_clip", *RUN, factor=5000)
def empty_tokens_instead_of_projected_zeros(s):
    def forget(m, args, out):
        return [o * (e.abs().sum(-1) > 0).to(o.dtype).reshape(*e.shape[:2], 1, 1) for o, e in zip(out, args[0])]

    return changed(s, "frame_adapter", lambda m: m.image_proj.register_forward_hook(forget))


@mistake("unet_ip1", "unet_ipframes", factor=300)
def frames_weighed_with_0_9(s):
    return s.but(ip_scale=0.9)


@mistake("unet_ipframes", "pipe_frames_steps", factor=2000)
def mean_of_the_frames_where_each_counts(s):
    return s.but(frame_wise=False)


@mistake("unet_ip1", "unet_ipframes", factor=5000)
def keys_and_values_of_the_frames_swapped(s):
    sd = s.pipe.frame_adapter.to_ip_adapter_state_dict()
    other = {k.replace("_k_", "_x_").replace("_v_", "_k_").replace("_x_", "_v_"): v for k, v in sd.items()}
    return s.but(frame_adapter=FrameAdapter.from_ip_adapter_state_dict(other).eval())


@mistake("unet_ip1", "unet_ipframes", factor=2500)
def two_cross_attentions_exchanged(s):
    sd, n = s.pipe.frame_adapter.to_ip_adapter_state_dict(), {3: 5, 5: 3}  # both in the up blocks, of equal shape

    def renumber(k):
        head, _, tail = k.removeprefix("ip_adapter.").partition(".")
        return f"ip_adapter.{n.get(int(head), head)}.{tail}" if k.startswith("ip_adapter.") else k

    return s.but(frame_adapter=FrameAdapter.from_ip_adapter_state_dict({renumber(k): v for k, v in sd.items()}).eval())


class Torchvision(FrameEncoder):
    "Pictures resized as tensors, as `CLIPImageProcessor` does by default, instead of by PIL"

    def preprocess(self, frames):
        c = self.config.preprocess_cfg
        x = v2.functional.resize(
            torch.from_numpy(frames).permute(0, 3, 1, 2),
            [self.image_size],
            v2.InterpolationMode.BICUBIC,
            antialias=True,
        )
        return v2.functional.normalize(v2.functional.center_crop(x, [self.image_size] * 2) / 255, c["mean"], c["std"])


def encoder_as(s, cls, **cfg):
    c = s.pipe.frame_encoder.config
    new = cls({**c.model_cfg, **cfg}, c.preprocess_cfg)
    new.load_state_dict(s.pipe.frame_encoder.state_dict())
    return s.but(frame_encoder=new.eval())


@mistake("clip_pixel_values_crop", "clip_image_embeds", factor=30)
def pictures_resized_by_torchvision(s):
    return encoder_as(s, Torchvision)


@mistake("clip_image_embeds", factor=40)
def image_encoder_with_quick_gelu(s):
    return encoder_as(s, FrameEncoder, quick_gelu=True)


class Normalised(FrameEncoder):
    def encode_frames(self, frames, *args, **kw):
        return torch.nn.functional.normalize(super().encode_frames(frames, *args, **kw), dim=-1)


@mistake("clip_image_embeds", "clip_image_embeds_mean", factor=3000)
def embeddings_normalised(s):
    return encoder_as(s, Normalised)


# Time


class ZeroOne(MelTransform):
    def condition_image(self, *columns):
        return (super().condition_image(*columns) + 1) / 2


@mistake("controlnet_mid", *(f"controlnet_down_{i}" for i in range(4)), *RUN, factor=70)
def mask_of_0_and_1(s):
    return retyped(s, "mel", ZeroOne)


@mistake("controlnet_mid", "unet_ip1_controlnet", *RUN, factor=2000)
def temporal_scale_of_0_3(s):
    return s.but(temporal_scale=0.3)


@mistake("controlnet_down_0", "controlnet_mid", *RUN, factor=70)
def mask_played_backwards(s):
    return s.but(inputs={**s.inputs, "time_condition": s.inputs["time_condition"].flip(-1)})


@mistake("mask1024_dur6p3", factor=1)
def mask_of_100_columns_a_second(s):
    return s.but(compat=False)


@mistake("det_logits_asis", "det_logits_train_div255", factor=20000)
def detector_in_evaluation_mode(s):
    return s.but(own_statistics=False)


@mistake("det_input_mean_std", factor=5000)
def detector_pixels_divided_by_255(s):
    return s.but(divide_by_255=True)


# Image and sound


@mistake("vae_decode", "pipe_clip_image", factor=3000)
def scaling_factor_of_the_vae_missed(s):
    return retyped(s, "vae", type(s.pipe.vae), scaling_factor=1.0)


@mistake("denorm", "vocoder_wav", *SOUND, factor=8000)
def rows_of_the_image_not_flipped(s):
    return retyped(s, "mel", MelTransform, flip=False)


@mistake("denorm", "vocoder_wav", factor=1500)
def range_of_the_log_mel_starts_at_1e_minus_4(s):
    return retyped(s, "mel", MelTransform, log_min=math.log(1e-4))


@mistake("vocoder_wav", *SOUND, factor=2000)
def slope_of_the_vocoder_0_01(s):
    return reconfigured(s, "vocoder", SpeechT5HifiGan, leaky_relu_slope=0.01)


@mistake("mel", "mel_img", factor=4000)
def window_as_long_as_the_fft(s):
    return s.but(full_mel=dict(win_length=2048))


@mistake("mel", "mel_img", factor=3000)
def mel_up_to_7600_hz(s):
    return s.but(full_mel=dict(fmax=7600.0))


@mistake("wav_norm", "mel", factor=250)
def sound_brought_to_a_peak_of_1(s):
    return s.but(peak=1.0)


@mistake("mel_img", "mel_img_padded", factor=1900)
def training_image_not_flipped(s):
    return s.but(full_mel=dict(flip=False))


@torch.no_grad()
def misses(system, names):
    "Error of each check in units of its tolerance"
    return {n: error(n, CHECKS[n](system)) for n in names}


def test_there_are_enough():
    assert len(MISTAKES) >= 12


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(system, name):
    m = MISTAKES[name]
    found = misses(m.make(system), m.checks)
    assert min(found.values()) > 1, f"not seen by all: {found}"
    assert max(found.values()) > m.factor, found


def test_a_system_that_only_passed_through_but_has_no_mistake(system):
    assert max(misses(system.but(), ["unet_ip1", "pipe_clip_steps", "vocoder_wav", "controlnet_mid"]).values()) < 1


def test_frame_weights_numbered_down_middle_up_are_refused(system):
    "Numbers follow down, up, middle; another order gives the wrong widths, which `install` names"
    sd, order = system.pipe.frame_adapter.to_ip_adapter_state_dict(), {3: 5, 5: 7, 7: 3}
    wrong = {}
    for k, v in sd.items():
        head, _, tail = k.removeprefix("ip_adapter.").partition(".")
        wrong[f"ip_adapter.{order.get(int(head), head)}.{tail}" if k.startswith("ip_adapter.") else k] = v
    with pytest.raises(FoleyError, match="cross-attentions of widths"):
        FrameAdapter.from_ip_adapter_state_dict(wrong).install(system.pipe.unet)
