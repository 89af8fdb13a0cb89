"""Every number of Diff-Foley's own code, asked of the public classes.

`CHECKS[name](system)` gives the tensor that the fixture holds under `name`. A `System` is the converted checkpoint with
its inputs and settings, so a mistake is a system in which one thing was changed (`test_diff_foley.py`).
`python tests/diff_foley_parity.py` prints the error of each tensor.
"""

import copy
import json
import lzma
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load

from smooth_foley.compare.diff_foley import DiffFoley
from smooth_foley.compare.diff_foley_cavp import cavp_losses, prepare_frames
from smooth_foley.compare.diff_foley_files import convert_diff_foley
from smooth_foley.compare.diff_foley_ldm import (
    alignment_accuracy,
    alignment_loss,
    alignment_probability,
    decode_spectrogram,
    ldm_loss,
)
from smooth_foley.compare.diff_foley_sampler import AlignmentGuidance, ddim, sample
from smooth_foley.loading import load_part
from smooth_foley.schedule import add_noise, alphas_cumprod

FIXTURE = Path(__file__).parent / "fixtures" / "diff_foley"
README = json.loads((FIXTURE / "README.json").read_text())


RECIPE = json.loads(lzma.decompress((FIXTURE / "recipe.json.xz").read_bytes()))


def _read(name):
    return load(lzma.decompress((FIXTURE / f"{name}.safetensors.xz").read_bytes()))


INPUTS, WANT, STORED = _read("inputs"), _read("expected"), _read("stored")
TENSORS = README["tensors"]

# What the tiny model is made of, where it is not as the published one
CONFIGS = dict(
    cavp=dict(width=8, blocks=[2, 2, 2, 2], audio_channels=[4, 8, 12, 16, 24, 32], embed_dim=16),
    unet=dict(block_out_channels=[32, 32, 32, 64], cross_attention_dim=24),
    vae=dict(block_out_channels=[32, 32, 32, 32]),
    condition_stage=dict(origin_dim=16, embed_dim=24),
    classifier=dict(block_out_channels=[32, 32, 64], cross_attention_dim=16),
)


def published(name):
    "A checkpoint under its published names, by the fixture's recipe"
    recipe = RECIPE[name]
    g, out = torch.Generator().manual_seed(recipe["seed"]), {}
    for key, shape in recipe["shapes"].items():
        r = torch.randn(shape, generator=g)
        if key.endswith("pos_emb.weight"):
            w = 0.5 * r
        elif len(shape) > 1:
            w = r / r[0].numel() ** 0.5
        else:
            w = 1 + 0.15 * r if key.endswith("weight") else 0.1 * r
        out[key] = w.half().float()
    out |= {k.split("/", 1)[1]: v.float() for k, v in STORED.items() if k.startswith(f"{name}/")}
    return out


def write_checkpoints(folder):
    "The three published files, and the one that measures"
    ldm, dg = published("ldm"), published("double_guidance")
    vae = {k: v for k, v in ldm.items() if k.startswith("first_stage_model.")}
    states = dict(
        cavp_epoch66=published("cavp"),
        ldm_epoch240=ldm,
        double_guidance_classifier=dg,
        eval_classifier={**dg, **vae},
    )
    files = {}
    for (name, state), part in zip(states.items(), ("cavp", "ldm", "classifier", "eval_classifier")):
        files[part] = Path(folder) / f"{name}.ckpt"
        torch.save({"state_dict": state, "global_step": 1, "epoch": 2}, files[part])
    return files


@dataclass
class System:
    pipe: DiffFoley
    inputs: dict
    pixel_scale: float | torch.Tensor = 255.0
    pixel_mean: float | torch.Tensor = 0.0
    null_as_trained: bool = False
    raw_context: bool = True
    context_frames: int = 33
    guidance_scale: float = 4.5
    clips: int = 3
    mel_changes: dict = field(default_factory=dict)  # Of the configuration of the mel transform
    memo: dict = field(default_factory=dict)

    def but(self, **changed):
        "The same system with other components or settings"
        parts = {k: changed.pop(k) for k in list(changed) if k in self.pipe.components}
        pipe = DiffFoley(**{**self.pipe.components, **parts})
        return replace(self, pipe=pipe, memo={}, **changed)

    def changed(self, part, f):
        "The same system with a copy of a component, changed in place"
        other = copy.deepcopy(getattr(self.pipe, part))
        f(other)
        return self.but(**{part: other})

    def once(self, key, make):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@cache
def load_system():
    "Convert the checkpoints as the published ones are converted, and load them as those are loaded"
    with tempfile.TemporaryDirectory() as tmp:
        configs = CONFIGS | dict(eval_classifier=CONFIGS["classifier"])
        folder = convert_diff_foley(write_checkpoints(tmp), Path(tmp) / "diff_foley", configs=configs)
        pipe = DiffFoley.from_pretrained(folder)
        home = "smooth_foley.compare.diff_foley_ldm"
        judge = load_part(folder / "eval_classifier", home, "AlignmentClassifier")
    pipe.set_progress_bar_config(disable=True)
    assert all(torch.equal(v, judge.state_dict()[k]) for k, v in pipe.classifier.state_dict().items())
    return System(pipe, INPUTS)


def thin(name, x):
    "The values of a large tensor that the fixture keeps"
    step = TENSORS[name].get("every", 1)
    return x if step == 1 else x.flatten()[::step]


def error(name, got):
    "Share of the tolerance that is used up: above 1 is a failure"
    about, want = TENSORS[name], WANT[name]
    got = torch.as_tensor(got)
    if list(got.shape) != about["shape"]:
        return float("inf")
    off = (thin(name, got).double() - want.double()).abs().max().item()
    return off / (about["atol"] + about["rtol"] * about.get("max_abs", 0))


CHECKS = {}


def check(*names):
    "Register a function of the system, or one of the system and the name for several names"

    def register(f):
        for name in names:
            CHECKS[name] = f if len(names) == 1 else lambda s, f=f, name=name: f(s, name)
        return f

    return register


def quietly(f):
    return torch.no_grad()(f)


# CAVP


@quietly
def pixels(s):
    return s.inputs["cavp.video_u8"].float() / s.pixel_scale - s.pixel_mean


def sound(s):
    return s.inputs["cavp.mel"].float() / 255


@check("cavp.backbone")
@quietly
def backbone(s):
    return s.pipe.cavp.video_encoder(pixels(s))


@check("cavp.video_frames", "cavp.video_frames_raw", "cavp.video_pooled")
@quietly
def video(s, name):
    return s.pipe.cavp.encode_video(pixels(s), not name.endswith("raw"), name.endswith("pooled"))


@check("cavp.audio_frames", "cavp.audio_frames_raw", "cavp.audio_pooled")
@quietly
def audio(s, name):
    return s.pipe.cavp.encode_audio(sound(s), not name.endswith("raw"), name.endswith("pooled"))


@check("cavp.logit_scale_exp")
@quietly
def scale(s):
    return s.pipe.cavp.logit_scale.exp()


@check("prep.frame224")
def frame224(s):
    picture = s.inputs["prep.frame_u8"].permute(1, 2, 0).numpy()
    return prepare_frames(picture[None])[0] * 255


def losses(s):
    def make():
        leaves = [s.inputs[f"loss.{k}"].clone().requires_grad_(True) for k in ("video", "audio", "scale")]
        semantic, temporal = cavp_losses(*leaves, s.clips)
        total = semantic + temporal
        grads = torch.autograd.grad(total, leaves)
        named = dict(zip(("grad_video", "grad_audio", "grad_scale"), grads))
        return dict(semantic=semantic.detach(), temporal=temporal.detach(), total=total.detach(), **named)

    return s.once("losses", make)


@check(*(f"loss.{k}" for k in ("semantic", "temporal", "total", "grad_video", "grad_audio", "grad_scale")))
def contrastive(s, name):
    return losses(s)[name.split(".")[1]]


# Condition, UNet, autoencoder


def feats(s, n=32):
    return s.inputs["feats33"][:, :n]


@check("cond")
@quietly
def condition(s):
    return s.pipe.condition_stage(feats(s))


@check("cond_null_train")
@quietly
def null_train(s):
    return s.pipe.condition_stage.null(condition(s)[:1], as_trained=True)


@check("unet.eps_int", "unet.eps_frac")
@quietly
def eps(s, name):
    t = s.inputs[name.replace("eps", "t")]
    return s.pipe.unet(s.inputs["x_T"], t, condition(s)).sample


@check("unet.eps_80")
@quietly
def eps_80(s):
    return s.pipe.unet(s.inputs["x_80"], 500, condition(s)[:1]).sample


@check("ae.mean", "ae.logvar")
@quietly
def encoded(s, name):
    spec = s.inputs["ae.spec"].float() / 255
    posterior = s.pipe.vae.encode(spec.expand(-1, 3, -1, -1)).latent_dist
    return posterior.mean if name.endswith("mean") else posterior.logvar


@check("ae.decoded")
@quietly
def decoded(s):
    z = s.inputs["ae.z"]
    image = s.pipe.vae.decode(z / s.pipe.vae.config.scaling_factor).sample
    assert torch.equal(image[:, 0], decode_spectrogram(s.pipe.vae, z))
    return image


# The classifier


def context(s):
    return s.inputs["feats33"][:, : s.context_frames] if s.raw_context else s.pipe.classifier.condition(feats(s))


@check("clf.prob_int", "clf.prob_frac")
@quietly
def probability(s, name):
    t = s.inputs[name.replace("clf.prob", "unet.t")]
    return s.pipe.classifier(s.inputs["x_T"], t, context(s)).sigmoid()


@check("clf.grad_int", "clf.grad_frac")
@quietly
def slope(s, name):
    t = s.inputs[name.replace("clf.grad", "unet.t")]
    return s.pipe.classifier.log_probability_gradient(s.inputs["x_T"], t, context(s))


def acp(s):
    return alphas_cumprod(s.pipe.scheduler)


@check("train.x_t")
def noisy(s):
    return add_noise(s.inputs["train.z0"], s.inputs["train.noise"], s.inputs["train.t"], acp(s))


@check("clf.train_prob")
@quietly
def train_probability(s):
    c = s.pipe.classifier
    return c(noisy(s), s.inputs["train.t"].float(), c.condition(feats(s))).sigmoid()


@check("clf.train_bce")
@quietly
def train_bce(s):
    t = s.inputs["train.t"].float()
    return alignment_loss(s.pipe.classifier, noisy(s), t, feats(s), s.inputs["train.labels"])


def training(s):
    def make():
        unet, stage, i = s.pipe.unet, s.pipe.condition_stage, s.inputs
        leaves = [unet.conv_in.weight, stage.pos_emb.weight]
        for p in leaves:
            p.requires_grad_(True)
        drop = torch.tensor([False, True])
        loss = ldm_loss(unet, stage, i["train.z0"], feats(s), i["train.t"], i["train.noise"], acp(s), drop)
        grads = torch.autograd.grad(loss, leaves)
        for p in leaves:
            p.requires_grad_(False)
        return dict(zip(("ldm_loss", "grad_conv_in", "grad_pos_emb"), (loss.detach(), *grads)))

    return s.once("training", make)


@check("train.ldm_loss", "train.grad_conv_in", "train.grad_pos_emb")
def trained(s, name):
    return training(s)[name.split(".")[1]]


# Sampling


def solver(s):
    return copy.deepcopy(s.pipe.scheduler)


def run(s, steps=25, double=False, scheduler=None):
    stage = s.pipe.condition_stage
    cond = condition(s)
    alignment = None
    if double:
        features = s.inputs["feats33"][:, : s.context_frames] if s.raw_context else feats(s)
        alignment = AlignmentGuidance(s.pipe.classifier, features, 50.0, s.raw_context)
    null = stage.null(cond, s.null_as_trained)
    z = s.inputs["x_T"]
    return sample(s.pipe.unet, scheduler or solver(s), z, cond, null, steps, s.guidance_scale, alignment)


@check("sample.cfg25", "sample.cfg10")
def guided(s, name):
    return run(s, int(name[-2:]))


@check("sample.double25")
def double(s):
    return run(s, double=True)


@check("sample.ddim25")
def ddim25(s):
    return run(s, scheduler=ddim())


@check("sample.t_input25", "sample.lambda25")
def times(s, name):
    scheduler = solver(s)
    scheduler.set_timesteps(25)
    return scheduler.timesteps if name.startswith("sample.t") else -scheduler.sigmas.log()


# Alignment


@quietly
def aligned(s):
    i, judge = s.inputs, copy.deepcopy(s.pipe.classifier)
    judge.classifier.bias.sub_(i["align.bias_shift"])
    spec = i["align.spec"][:, 0].float() / 255
    return alignment_probability(judge, s.pipe.vae, spec, i["align.feats"], i["align.posterior_noise"])


@check("align.prob")
def align_probability(s):
    return s.once("align", lambda: aligned(s))


@check("align.accuracy")
def align_accuracy(s):
    return torch.tensor(alignment_accuracy(align_probability(s)))


# Mel


def mel(s, **kw):
    return type(s.pipe.mel).from_config({**s.pipe.mel.config, **kw, **s.mel_changes})


@check("mel.reflect", "mel.constant")
def spectrogram(s, name):
    wav = s.inputs["mel.wav16k"].float() / 32768
    return mel(s, pad_mode=name.split(".")[1]).spectrogram(wav[None])[0]


@check("inv.linear_amp")
def amplitude(s):
    return mel(s).amplitude(s.inputs["inv.mel"])


@check("inv.mag_16000", "inv.mag_22050")
def magnitude(s, name):
    rate = int(name.split("_")[1])
    other = mel(s, **({} if rate == 16000 else dict(inverse_sample_rate=rate)))
    return torch.from_numpy(other.magnitude(s.inputs["inv.mel"]))


if __name__ == "__main__":
    system = load_system()
    for name in TENSORS:
        print(f"{name:24} {error(name, CHECKS[name](system)):9.2g} of the tolerance")
