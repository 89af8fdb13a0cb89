"""Diff-Foley: the same numbers as its own code, deliberate mistakes, published files, the small training, the system.

The numbers are in `fixtures/diff_foley`, how each is asked of the public classes is in `diff_foley_parity.py`.
"""

import copy
import json
import lzma
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diff_foley_parity import CHECKS, CONFIGS, FIXTURE, TENSORS, WANT, error, load_system, write_checkpoints
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file
from torch import nn

from smooth_foley.app.main import main
from smooth_foley.compare import diff_foley_files as files
from smooth_foley.compare import diff_foley_training as training
from smooth_foley.compare.clips import Take
from smooth_foley.compare.diff_foley import AS_SHIPPED, DiffFoley
from smooth_foley.compare.diff_foley_cavp import Cavp
from smooth_foley.compare.diff_foley_ldm import AlignmentClassifier
from smooth_foley.compare.diff_foley_sampler import dpm_solver
from smooth_foley.compare.diff_foley_stages import CavpStage
from smooth_foley.compare.diff_foley_training import train_diff_foley
from smooth_foley.compare.systems import Loaded, build, parse_system
from smooth_foley.core import FoleyError, mini_path, only_writer
from smooth_foley.media import Clip, write_video
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.train.loop import TrainConfig, train
from smooth_foley.train.recipe import Recipe


@pytest.fixture(scope="module")
def system():
    return load_system()


# Numbers


def test_every_tensor_is_checked():
    assert set(CHECKS) == set(WANT) == set(TENSORS) and len(CHECKS) >= 46


@pytest.mark.parametrize("name", TENSORS)
def test_tensor(system, name):
    assert error(name, CHECKS[name](system)) < 1


# Mistakes

MISTAKES = {}


def mistake(*checks):
    def register(f):
        MISTAKES[f.__name__] = f, checks
        return f

    return register


@mistake("sample.cfg10")
def guidance_halves_swapped(s):
    def swap(m, args, out):
        out.sample = torch.cat(out.sample.chunk(2)[::-1])
        return out

    return s.changed("unet", lambda m: m.register_forward_hook(swap))


@mistake("sample.cfg10")
def no_video_is_zeros_before_the_stage(s):
    return s.but(null_as_trained=True)


@mistake("sample.cfg10", "sample.t_input25")
def times_rounded(s):
    return s.but(scheduler=DPMSolverMultistepScheduler.from_config(dpm_solver().config))


@mistake("cavp.backbone", "cavp.video_frames", "cavp.video_pooled")
def pixels_normalised(s):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return s.but(pixel_scale=255 * std, pixel_mean=mean / std)


@mistake("cavp.backbone", "cavp.video_frames")
def pixels_up_to_255(s):
    return s.but(pixel_scale=1.0)


@mistake("cavp.backbone", "cavp.video_frames_raw")
def frames_backwards(s):
    return s.but(inputs={**s.inputs, "cavp.video_u8": s.inputs["cavp.video_u8"].flip(1)})


class NormalisedFirst(Cavp):
    def _finish(self, x, normalize, pool):
        return super()._finish(F.normalize(x, dim=2) if pool else x, normalize, pool)


@mistake("cavp.video_pooled", "cavp.audio_pooled")
def normalised_before_the_maximum(s):
    return s.changed("cavp", lambda m: setattr(m, "__class__", NormalisedFirst))


class EverySecondTime(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls % 2 else x


@mistake("cavp.audio_frames", "cavp.audio_pooled")
def hidden_layer_once(s):
    return s.changed("cavp", lambda m: setattr(m.spec_encoder.fc1, "__class__", EverySecondTime))


@mistake("inv.mag_16000")
def mel_inverted_at_22050_hz(s):
    return s.but(mel_changes=dict(inverse_sample_rate=22050))


@mistake("mel.reflect", "mel.constant")
def mel_up_to_8000_hz(s):
    return s.but(mel_changes=dict(fmax=8000.0))


@mistake("mel.reflect")
def sound_padded_with_zeros(s):
    return s.but(mel_changes=dict(pad_mode="constant"))


@mistake("cond", "cond_null_train", "unet.eps_int")
def position_rows_skipped(s):
    def skip(m):
        m.pos_emb.weight.data = m.pos_emb.weight.data.roll(-8, 0)

    return s.changed("condition_stage", skip)


@mistake("clf.prob_int", "clf.grad_frac")
def classifier_sees_32_frames(s):
    return s.but(context_frames=32)


@mistake("clf.prob_int", "clf.grad_int")
def classifier_reads_through_its_stage(s):
    return s.but(raw_context=False)


class OfTheProbability(AlignmentClassifier):
    def log_probability_gradient(self, z, t, context):
        return super().log_probability_gradient(z, t, context) * self(z, t, context).sigmoid()[..., None, None]


@mistake("clf.grad_int", "clf.grad_frac")
def gradient_of_the_probability(s):
    return s.changed("classifier", lambda m: setattr(m, "__class__", OfTheProbability))


@mistake("unet.eps_frac", "clf.prob_frac")
def timestep_cut_to_a_whole_number(s):
    return s.but(inputs={**s.inputs, "unet.t_frac": s.inputs["unet.t_frac"].floor()})


@mistake("ae.decoded", "align.prob")
def latents_not_scaled(s):
    return s.changed("vae", lambda m: m.register_to_config(scaling_factor=1.0))


@mistake("align.prob")
def mean_of_the_posterior(s):
    return s.but(inputs={**s.inputs, "align.posterior_noise": 0 * s.inputs["align.posterior_noise"]})


@mistake("prep.frame224")
def picture_cropped_instead_of_squeezed(s):
    return s.but(inputs={**s.inputs, "prep.frame_u8": s.inputs["prep.frame_u8"][:, :, 35:125]})


@mistake("loss.temporal", "loss.total", "loss.grad_video")
def groups_of_four_clips(s):
    return s.but(clips=4)


@mistake("train.x_t", "sample.lambda25")
def betas_linear(s):
    return s.but(scheduler=type(s.pipe.scheduler).from_config(s.pipe.scheduler.config, beta_schedule="linear"))


def test_there_are_enough_mistakes():
    assert len(MISTAKES) >= 10


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(system, name):
    make, checks = MISTAKES[name]
    wrong = make(system)
    found = {n: error(n, CHECKS[n](wrong)) for n in checks}
    assert min(found.values()) > 1, found


def test_a_system_passed_through_has_no_mistake(system):
    assert max(error(n, CHECKS[n](system.but())) for n in ("cond", "cavp.video_pooled", "mel.reflect")) < 1


# Published files


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("published"))


def test_the_published_size_has_a_place_for_every_tensor(monkeypatch):
    manifest = json.loads(lzma.decompress((FIXTURE / "full_size_manifest.json.xz").read_bytes()))
    names = dict(
        cavp="cavp_without_module_prefix",
        ldm="ldm",
        classifier="double_guidance_classifier",
        eval_classifier="eval_classifier",
    )

    def empty(name):
        return {k: torch.empty(shape, device="meta") for k, (shape, _) in manifest[names[name]].items()}

    monkeypatch.setattr(files, "read_checkpoint", empty)
    parts = files.read_diff_foley({k: k for k in names})
    n = {k: sum(p.numel() for p in v.model.parameters()) for k, v in parts.items()}
    assert [round(n[k] / 1e6, 2) for k in ("unet", "vae")] == [859.52, 83.65]
    assert n["classifier"] == n["eval_classifier"] and round(n["cavp"] / 1e6) == 113


def changed_checkpoint(file, tmp_path, change):
    held = torch.load(file, weights_only=True)
    change(held["state_dict"])
    out = tmp_path / file.name
    torch.save(held, out)
    return out


WRONG = {
    "missing": ("cavp", lambda d: d.pop("module.video_project_head.bias"), "missing .*video_project_head.bias"),
    "unexpected": ("cavp", lambda d: d.update({"module.head.weight": torch.zeros(1)}), "unexpected .*head.weight"),
    "shape": ("cavp", lambda d: d.update({"module.video_project_head.bias": torch.zeros(3)}), r"\(3,\) instead of"),
    "position rows": ("ldm", lambda d: d.pop("cond_stage_model.pos_emb.weight"), "pos_emb"),
    "vae": ("ldm", lambda d: d.pop("first_stage_model.quant_conv.bias"), "quant_conv.bias"),
    "unet": ("ldm", lambda d: d.pop("model.diffusion_model.out.2.bias"), "missing .*(conv_out|out.2).bias"),
    "another model": ("ldm", lambda d: d.update({"text.weight": torch.zeros(1)}), "text.weight"),
    "head": ("classifier", lambda d: d.pop("model.classifier.bias"), "missing .*classifier.bias"),
}


@pytest.mark.parametrize("name", WRONG)
def test_checkpoints_that_do_not_fit_are_refused_by_name(checkpoints, tmp_path, name):
    part, change, message = WRONG[name]
    mine = {**checkpoints, part: changed_checkpoint(checkpoints[part], tmp_path, change)}
    del mine["eval_classifier"]
    with pytest.raises(FoleyError, match=message) as e:
        files.convert_diff_foley(mine, tmp_path / "out", configs=CONFIGS)
    assert str(mine[part]) in str(e.value) and not (tmp_path / "out").exists()


def test_checkpoints_are_not_replaced_by_what_is_made_of_them(checkpoints):
    folder, mine = checkpoints["cavp"].parent, {k: f for k, f in checkpoints.items() if k != "eval_classifier"}
    with pytest.raises(FoleyError, match="would be replaced, and with it .*which is read"):
        files.convert_diff_foley(mine, folder, configs=CONFIGS, overwrite=True)
    assert files.find_files(folder) == checkpoints


class Trouble:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {}, "extra": Trouble()}, tmp_path / "cavp_epoch66.ckpt")
    with pytest.raises(FoleyError, match="refused"):
        files.read_checkpoint(tmp_path / "cavp_epoch66.ckpt")


def test_names_of_lightning_are_placeholders(tmp_path, monkeypatch):
    "A class that the machine does not have, as a key of the callbacks"
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    held = {"state_dict": {"module.a": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: {"best": 1.0}}}
    torch.save(held, tmp_path / "x.ckpt")
    monkeypatch.undo()
    assert files.read_checkpoint(tmp_path / "x.ckpt")["a"].tolist() == [1, 1]


def test_files_are_found_by_name(checkpoints, tmp_path):
    folder = checkpoints["cavp"].parent
    assert files.find_files(folder) == checkpoints
    nested = tmp_path / "diff_foley_ckpt"
    nested.mkdir()
    shutil.copy(checkpoints["classifier"], nested / "double_guidance_classifier.ckpt")
    assert list(files.find_files(tmp_path)) == ["classifier"]
    with pytest.raises(FoleyError, match="are both the classifier"):
        files.find_files([folder, tmp_path])
    with pytest.raises(FoleyError, match="no such folder"):
        files.find_files(tmp_path / "nowhere")
    with pytest.raises(FoleyError, match="incomplete: no cavp, ldm"):
        files.convert_diff_foley(files.find_files(tmp_path), tmp_path / "out")


def test_what_would_be_fetched(tmp_path, capsys):
    main(["fetch", "diff-foley", "--dry-run", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "SimianLuo/Diff-Foley" in said and "cavp_epoch66.ckpt" in said and "OpenRAIL" in said
    assert not list(tmp_path.iterdir())


# The system


def noise_clip(seconds=8.5, seed=0):
    frames = np.random.default_rng(seed).integers(0, 256, (int(15 * seconds), 24, 32, 3), dtype=np.uint8)
    return Clip(frames, np.arange(len(frames)) / 15, seconds, f"clip{seed}")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def random_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    DiffFoley.from_random().save_pretrained(folder)
    return folder


def test_batches_change_nothing(random_one):
    foley = quiet(DiffFoley.from_pretrained(random_one))
    clips = [noise_clip(seed=1), noise_clip(4.0, seed=2)]
    how = dict(num_inference_steps=2, output_type="latent")
    together = foley(clips, **how).latents
    alone = torch.cat([foley(c, **how).latents for c in clips])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_as_shipped_differs(random_one):
    ours, theirs = DiffFoley.from_pretrained(random_one), DiffFoley.from_pretrained(random_one, **AS_SHIPPED)
    how = dict(num_inference_steps=1, output_type="mel")
    assert len(quiet(ours)(noise_clip(), **how).mels) == 2 and len(quiet(theirs)(noise_clip(), **how).mels) == 1


def test_long_large_files_fit(random_one, tmp_path):
    foley, times = quiet(DiffFoley.from_pretrained(random_one)), np.arange(0, 46, 5)
    frames = np.broadcast_to(np.uint8(0), (len(times), 1080, 1920, 3))
    path = write_video(tmp_path / "long.mp4", frames, 1.0, times=times)
    out = foley(path, num_inference_steps=1, classifier_scale=0, output_type="latent")
    assert out.durations == [46.0] and len(out.latents) == 6


def test_it_is_a_system_of_evaluate(random_one):
    loaded = Loaded(quiet(SmoothFoleyPipeline.from_random()))
    spec = parse_system(f"diff=diff-foley:folder={random_one}:guidance_scale=2")
    sound, about = build(spec, loaded, steps=1)
    audios, conditions = sound([Take(noise_clip(4.0), "train")])
    assert len(audios[0]) == 64000 and np.isfinite(audios[0]).all() and conditions == [None]
    assert about["base"] == "diff-foley" and about["steps"] == 1


def test_wrong_words_for_the_system(random_one, tmp_path, monkeypatch):
    loaded = Loaded(quiet(SmoothFoleyPipeline.from_random()))
    for text, message in (
        ("a=diff-foley:frame_scale=1", "takes no frame_scale"),
        (f"a=diff-foley:folder={tmp_path}", "no model_index.json"),
    ):
        with pytest.raises(FoleyError, match=message):
            build(parse_system(text), loaded)
    with pytest.raises(FoleyError, match="belongs to diff-foley"):
        parse_system("a=ours:folder=x")
    if not (mini_path().parent / "diff_foley").is_dir():
        with pytest.raises(FoleyError, match="train diff-foley"):
            build(parse_system("diff-foley"), loaded)


# Training


def lights(indices):
    "Scenes that grow brighter and louder, or darker and quieter, together"
    rng = np.random.default_rng(0)
    start, end = (torch.from_numpy(rng.random((8, 1))).float() for _ in range(2))
    curves = 255 * (start + (end - start) * torch.linspace(0, 1, 40))[np.asarray(indices)]
    frames = curves[..., None, None, None].expand(-1, -1, 8, 8, 3)
    mel = curves.repeat_interleave(16, 1)[:, None].expand(-1, 32, -1)
    return dict(frames=frames.to(torch.uint8), pair_mel=mel.to(torch.uint8))


def test_cavp_learns_what_belongs_together(tmp_path):
    torch.manual_seed(0)
    cavp = Cavp(4, [1] * 4, [0, 0, 1, 1], [4, 4, 8, 8, 8, 8], 16, n_mels=32, dropout=0.0).train()
    cfg = TrainConfig(
        max_train_steps=30,
        train_batch_size=4,
        learning_rate=1e-2,
        lr_warmup_steps=1,
        mixed_precision="no",
        log_steps=10,
        checkpointing_steps=30,
    )
    train(CavpStage(cavp), lights, 8, cfg, tmp_path)
    losses = [float(row.split(",")[1]) for row in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    chance = np.log(12) + np.log(3)  # twelve pairs, three clips of a video
    assert losses[-1] < chance - 0.5 and losses[-1] < losses[0], losses


def test_training_goes_on_where_it_stopped(tmp_path):
    how = dict(n_scenes=3, train_batch_size=2, max_steps=2, checkpointing_steps=1)

    def weights():
        done = train_diff_foley(tmp_path, **how)
        return {p.parent.name: load_file(p) for p in done.rglob("*.safetensors")}

    whole = weights()
    for stage in ("ldm", "classifier"):
        shutil.rmtree(tmp_path / stage / "checkpoint-2")  # as if it had been killed after the first step
        (tmp_path / stage / "done.json").unlink()
    again = weights()
    assert whole.keys() == again.keys() == {"cavp", "condition_stage", "unet", "vae", "classifier"}
    near = torch.allclose if torch.cuda.is_available() else torch.equal  # a GPU adds up in no fixed order
    for part in whole:
        assert all(near(v, again[part][k]) for k, v in whole[part].items()), part
    foley = DiffFoley.from_pretrained(tmp_path / "diff_foley")
    assert not foley.config.raw_context and foley.vae.config.scaling_factor != 0.18215
    assert not copy.deepcopy(foley.unet).training
    records = {p.name for p in (tmp_path / "diff_foley" / "training").iterdir()}
    assert {"recipe.json", "ldm.csv", "ldm.json", "cavp.csv"} <= records
    with pytest.raises(FoleyError, match="another recipe .*ldm"):
        train_diff_foley(tmp_path, ("ldm",), **{**how, "train_batch_size": 3})
    with pytest.raises(FoleyError, match="stages: unknown dance"):
        train_diff_foley(tmp_path, ("dance",))


@pytest.fixture
def ran(monkeypatch):
    "Stages that train nothing; the names of those that ran"
    names = []

    def pretend(run):
        names.append(run.name)
        run.cache.mkdir(exist_ok=True)
        (run.out / "log.csv").write_text("step,loss\n1,1\n")
        for name in training._ENCODED if run.name == "features" else ():
            (run.cache / f"{name}.npy").write_bytes(b"x")

    monkeypatch.setattr(training, "_MAKERS", dict.fromkeys(training.STAGES, pretend))
    return names


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_refused_call_removes_nothing(tmp_path, ran):
    train_diff_foley(tmp_path, n_scenes=4)
    before = contents(tmp_path)
    for stages, options in ((("scenes", "vae"), dict(n_scenes=5)), (("ldm",), dict(n_scenes=4, seed=7))):
        with pytest.raises(FoleyError, match="another recipe"):
            train_diff_foley(tmp_path, stages, resume=False, **options)
        assert contents(tmp_path) == before
    train_diff_foley(tmp_path, ("ldm",), resume=False, n_scenes=4, learning_rate=1e-4)
    train_diff_foley(tmp_path, resume=False, n_scenes=5)
    assert ran == [*training.STAGES, "ldm", *training.STAGES]
    assert json.loads((tmp_path / "recipe.json").read_text())["n_scenes"] == 5


@pytest.mark.parametrize("resume", (True, False))
def test_folders_of_others_are_refused(tmp_path, ran, resume):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "done.json").write_text("{}")
    with pytest.raises(FoleyError, match="holds vae and no run of this command"):
        train_diff_foley(tmp_path, resume=resume)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(Recipe())))
    with pytest.raises(FoleyError, match="the recipe of another command"):
        train_diff_foley(tmp_path, resume=resume)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(FoleyError, match="is damaged"):
        train_diff_foley(tmp_path, resume=resume)
    assert (tmp_path / "vae" / "done.json").exists() and not ran


@pytest.mark.parametrize("stage", ("scenes", "vae", "cavp"))
def test_features_of_earlier_weights_are_not_used(tmp_path, ran, stage):
    train_diff_foley(tmp_path)
    train_diff_foley(tmp_path, (stage,), resume=False)
    assert not any((tmp_path / "cache" / f"{name}.npy").exists() for name in training._ENCODED)
    train_diff_foley(tmp_path, ("features", "ldm"))
    assert ran == [*training.STAGES, stage, "features"]


def test_two_runs_do_not_train_in_one_folder(tmp_path, ran):
    with only_writer(tmp_path), pytest.raises(FoleyError, match="another run is writing into it"):
        train_diff_foley(tmp_path)
    assert not ran
