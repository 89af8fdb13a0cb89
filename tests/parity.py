"""Every number of `fixtures/foleycrafter_full`, asked of the public classes.

`CHECKS[name](system)` gives the tensor that `expected.safetensors` holds under `name`. A `System` is the converted
pipeline with its inputs and settings, so a mistake is a system in which one thing was changed (`test_mistakes.py`).
`python tests/parity.py` prints the error of each tensor.
"""

import json
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from smooth_foley.autoencoder import decode_latents, encode_latents
from smooth_foley.backbone import encode_prompt
from smooth_foley.compare.foleycrafter import TimeDetector
from smooth_foley.guidance import Guidance
from smooth_foley.media import write_wav
from smooth_foley.mel import MelTransform, peak_normalize
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.published import convert
from smooth_foley.temporal_adapter import residuals
from smooth_foley.temporal_condition import TemporalCondition
from smooth_foley.vocoder import vocode

FIXTURE = Path(__file__).parent / "fixtures" / "foleycrafter_full"
README = json.loads((FIXTURE / "README.json").read_text())
INPUTS, WANT = (load_file(FIXTURE / f"{name}.safetensors") for name in ("inputs", "expected"))

# Largest error allowed, as a share of the largest value. Two rows of the time detector depend on the processor: its
# batch statistics cancel almost all of the unscaled pixels, and what is left carries the rounding of everything before
# (see test_parity.py).
TOLERANCE = {name: 1e-4 for name in WANT} | dict(det_logits_asis=3e-4, det_logits_train_div255=3e-4)
EXACT = ("timesteps25", "timesteps4", "mask1024_dur6p3")


def error(name, got):
    "Share of the tolerance that is used up: above 1 is a failure"
    want = WANT[name]
    if got.shape != want.shape:
        return float("inf")
    if name == "vocoder_int16":
        return (got.int() - want.int()).abs().max().item()
    off = (got.double() - want.double()).abs().max().item()
    if name in EXACT:
        return 0.0 if off == 0 else float("inf")
    return off / want.double().abs().max().item() / TOLERANCE[name]


@dataclass
class System:
    pipe: SmoothFoleyPipeline
    detector: TimeDetector
    inputs: dict
    prompt: str = README["runs"]["prompt"]
    negative: str = README["runs"]["negative_prompt"]
    ip_scale: float = README["runs"]["ip_scale"]
    full_mel: dict = field(default_factory=dict)  # changes to `MelTransform.full`
    peak: float = 0.95
    compat: bool = True  # FoleyCrafter's 102.4 columns a second
    own_statistics: bool = True  # the detector as it is run: with each clip's statistics,
    divide_by_255: bool = False  # ... and on pixels from 0 to 255
    frame_wise: bool = True
    seed: int = 42
    reuse: bool = True  # what is constant over the steps is computed once
    memo: dict = field(default_factory=dict)

    def but(self, **changed):
        "The same system with other components or settings"
        parts = {k: changed.pop(k) for k in list(changed) if k in self.pipe.components}
        config = {
            k: changed.pop(k) if k in changed else self.pipe.config[k]
            for k in (
                "labels",
                "fps",
                "threshold",
                "compat_columns",
                "num_inference_steps",
                "guidance_scale",
                "frame_scale",
                "temporal_scale",
            )
        }
        return replace(
            self, pipe=SmoothFoleyPipeline(**{**self.pipe.components, **parts}, **config), memo={}, **changed
        )

    def once(self, key, make):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


def published_detector():
    "The time detector's weights by the fixture's recipe, under the names of the published file"
    recipe, sd = README["detector_recipe"], TimeDetector().state_dict()
    rs = np.random.RandomState(recipe["seed"])
    for k in sorted(sd):
        if not sd[k].is_floating_point():
            continue
        r = np.float32(rs.randn(*sd[k].shape))
        if k.endswith("running_var"):
            w = 0.5 + abs(r)
        elif k.endswith("running_mean"):
            w = 0.1 * r
        elif r.ndim == 1:
            w = 1 + 0.1 * r if k.endswith("weight") else 0.1 * r
        else:
            w = recipe["gain"] * r / np.sqrt(np.prod(r.shape[1:]))
        sd[k] = torch.from_numpy(np.float32(np.float16(w)))
    return {"state_dict": {f"module.{k}": v for k, v in sd.items()}, "epoch": 1}


def text_tower(folder, like):
    "The fixture has an image tower alone; a random text tower of its kind completes the CLIP"
    torch.manual_seed(0)
    c = json.loads((Path(like) / "config.json").read_text())
    CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_act=c["hidden_act"],
            projection_dim=c["projection_dim"],
        )
    ).save_pretrained(folder)
    return Path(folder)


@cache
def load_system():
    "Convert the fixture as `full` is converted, and load it as `full` is loaded"
    with tempfile.TemporaryDirectory() as tmp:
        text = text_tower(Path(tmp) / "text_tower", FIXTURE / "image_encoder")
        convert(
            {"folder": FIXTURE, "frame_encoder": (FIXTURE / "image_encoder", text)},
            Path(tmp) / "full",
            configs=dict(mel=dict(n_cols=64)),
        )
        pipe = SmoothFoleyPipeline.from_pretrained(Path(tmp) / "full")
    pipe.set_progress_bar_config(disable=True)
    return System(pipe, TimeDetector.from_published_state_dict(published_detector()), INPUTS)


CHECKS = {}


def check(*names):
    "Register a function of the system, or one of the system and the name for several names"

    def register(f):
        for name in names:
            CHECKS[name] = torch.no_grad()(f if len(names) == 1 else lambda s, f=f, name=name: f(s, name))
        return f

    return register


# Text and frames


@check("text_embeds")
def text(s):
    return s.once("text", lambda: encode_prompt(s.pipe.tokenizer, s.pipe.text_encoder, [s.negative, s.prompt]))


@check("ip_tokens_clip", "ip_tokens_frame")
def ip_tokens(s, name):
    fa, emb = s.pipe.frame_adapter, s.inputs[dict(ip_tokens_clip="image_embeds", ip_tokens_frame="frame_embeds")[name]]
    out = fa(fa.tokens(emb, frame_wise=s.frame_wise))
    return out.reshape(len(out), -1, fa.config.num_tokens, out.shape[-1])


def pictures(s):
    return s.inputs["frames_small"].numpy().repeat(9, 1).repeat(9, 2)


def pixels(s):
    return s.once("pixels", lambda: s.pipe.frame_encoder.preprocess(pictures(s)))


@check("clip_pixel_values_crop")
def pixel_crop(s):
    return pixels(s)[:, :, 100:116, 100:116]


@check("clip_pixel_values_mean")
def pixel_mean(s):
    return pixels(s).mean((2, 3))


@check("clip_image_embeds")
def clip_embeddings(s):
    return s.once("embeds", lambda: s.pipe.frame_encoder.encode_frames(pictures(s)))


@check("clip_image_embeds_mean")
def clip_mean(s):
    return s.pipe.frame_adapter.tokens(clip_embeddings(s)[None], frame_wise=False)[0]


# One call of the networks


def cond(s):
    return s.pipe.mel.condition_image(s.inputs["time_condition"][:, 0, 0])


def predict(s, emb, scale, temporal_scale=0.0):
    p = s.pipe
    with p.frame_adapter.installed(p.unet, scale) as on:
        tokens = p.frame_adapter.tokens(s.inputs[emb], frame_wise=s.frame_wise) if on else None
        return p.predict(
            s.inputs["sample2"],
            s.inputs["timestep"],
            text(s),
            tokens,
            torch.cat([cond(s)] * 2) if temporal_scale else None,
            temporal_scale,
        )


@check("unet_ip1")
def unet_clip(s):
    return predict(s, "image_embeds", s.ip_scale)


@check("unet_ipframes")
def unet_frames(s):
    return predict(s, "frame_embeds", s.ip_scale)


@check("unet_ip_scale0")
def unet_text(s):
    return predict(s, "image_embeds", 0.0)


@check("unet_ip1_controlnet")
def unet_controlled(s):
    return predict(s, "image_embeds", s.ip_scale, s.pipe.config.temporal_scale)


@check("controlnet_mid", *(f"controlnet_down_{i}" for i in range(4)))
def control(s, name):
    r = s.once(
        "residuals",
        lambda: residuals(
            s.pipe.temporal_adapter,
            s.inputs["sample2"],
            s.inputs["timestep"],
            text(s),
            torch.cat([cond(s)] * 2),
            s.pipe.config.temporal_scale,
        ),
    )
    return (
        r["mid_block_additional_residual"]
        if name.endswith("mid")
        else r["down_block_additional_residuals"][int(name[-1])]
    )


@check("vae_decode")
def decoded(s):
    return s.once("decoded", lambda: decode_latents(s.pipe.vae, s.inputs["vae_latents"]))


@check("vae_encode_mean")
def encoded(s):
    return encode_latents(s.pipe.vae, decoded(s).clamp(-1, 1)) / 0.18215  # the fixture's are not scaled


# From noise to sound


@check("timesteps4", "timesteps25")
def timesteps(s, name):
    s.pipe.scheduler.set_timesteps(int(name.removeprefix("timesteps")))
    return s.pipe.scheduler.timesteps


def denoise(s, emb="image_embeds", temporal_scale=None, steps=README["runs"]["steps"], **kw):
    "Latents after each call of the scheduler"
    p, seen = s.pipe, []

    def on_step(pipe, i, t, z, guidance):
        seen.append(z.clone())
        return z, guidance

    with p.frame_adapter.installed(p.unet, s.ip_scale):
        guidance = Guidance(
            guidance_scale=p.config.guidance_scale,
            frame_scale=s.ip_scale,
            temporal_scale=p.config.temporal_scale if temporal_scale is None else temporal_scale,
            text=text(s),
            tokens=p.frame_adapter.tokens(s.inputs[emb][1:], frame_wise=s.frame_wise),
            condition=cond(s),
        )
        generators = kw.pop("generators", [torch.Generator()])
        p.denoise(guidance, generators, steps, on_step, reuse=s.reuse, **kw)
    return torch.stack(seen)


RUNS = dict(clip=dict(), frames=dict(emb="frame_embeds"), noctrl=dict(temporal_scale=0.0))


def steps_of(s, run):
    return s.once(run, lambda: denoise(s, latents=s.inputs["latents"], **RUNS[run]))


def painted(s, run):
    return s.once(run + " image", lambda: decode_latents(s.pipe.vae, steps_of(s, run)[-1]))


@check("pipe_clip_steps", "pipe_frames_steps")
def pipe_steps(s, name):
    return steps_of(s, name.split("_")[1])


@check("pipe_noctrl_latents")
def pipe_noctrl(s):
    return steps_of(s, "noctrl")[-1]


@check("pipe_clip_image", "pipe_frames_image")
def pipe_image(s, name):
    return (painted(s, name.split("_")[1]) / 2 + 0.5).clamp(0, 1)


@check("pipe_clip_wav", "pipe_frames_wav")
def pipe_wav(s, name):
    return vocode(s.pipe.vocoder, s.pipe.mel.from_image(painted(s, name.split("_")[1])))[0]


@check("pipe_seed42_image")
def pipe_seeded(s):
    return (
        decode_latents(s.pipe.vae, denoise(s, generators=[torch.Generator().manual_seed(s.seed)], steps=2)[-1]) / 2
        + 0.5
    ).clamp(0, 1)


# Mel and sound


@check("wav_norm")
def wav_norm(s):
    return peak_normalize(s.inputs["wav_int16"] / 32768, s.peak)


def full(s, **kw):
    return MelTransform.full(**{**kw, **s.full_mel})


@check("mel")
def mel(s):
    return s.once("mel", lambda: full(s).log_mel_open(wav_norm(s)[None])[0])


def mel_image(s, n_cols):
    m = full(s, n_cols=n_cols)
    return m.to_image(m.log_mel(wav_norm(s)[None]))


@check("mel_img")
def mel_img(s):
    return mel_image(s, 100)[0, 0] / 2 + 0.5


@check("mel_img_padded")
def mel_img_padded(s):
    return mel_image(s, 128)[0, 2] / 2 + 0.5


@check("mel_roundtrip")
def mel_roundtrip(s):
    return full(s).from_image(mel_image(s, 100))[0]


@check("denorm")
def denorm(s):
    return s.pipe.mel.from_image(2 * s.inputs["spec_img"][None] - 1)[0]


@check("vocoder_wav")
def vocoder_wav(s):
    return vocode(s.pipe.vocoder, denorm(s)[None])[0]


@check("vocoder_int16")
def vocoder_int16(s):
    "Through a file, since that is where 16 bits come in"
    with tempfile.TemporaryDirectory() as tmp:
        data = write_wav(Path(tmp) / "a.wav", vocoder_wav(s).numpy()).read_bytes()
    return torch.from_numpy(np.frombuffer(data[data.index(b"data") + 8 :], "<i2").copy())


# The time detector and its mask


@check("det_input_mean_std")
def det_input(s):
    x = s.detector.preprocess(s.inputs["det_frames"], s.divide_by_255)[0]
    return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))])


@check("det_logits_asis", "det_logits_eval", "det_logits_eval_div255", "det_logits_train_div255")
def det_logits(s, name):
    return s.detector.logits(
        s.inputs["det_frames"], batch_statistics="eval" not in name and s.own_statistics, divide_by_255="div255" in name
    )[None]


@check("mask1024_dur6p3")
def mask(s):
    prob = s.inputs["det_probs150"][0]
    return TemporalCondition.from_similarity(np.arange(len(prob)) * 6.3 / len(prob), prob, 6.3).columns(compat=s.compat)


if __name__ == "__main__":
    system = load_system()
    for name in WANT:
        print(f"{name:24} {error(name, CHECKS[name](system)):9.2g} of the tolerance")
