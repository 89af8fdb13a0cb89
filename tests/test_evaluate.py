"Evaluation: stopped and resumed runs, several processes, folders of bad sounds, bad names"

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import in_two_processes
from safetensors.torch import load_file

from smooth_foley import media
from smooth_foley.compare import evaluate, summary, systems
from smooth_foley.compare import folders as result_folders
from smooth_foley.compare.clips import folder_clips, passby_clips
from smooth_foley.compare.clips import test_clips as clips_of
from smooth_foley.compare.counterfactual import mover_seeds
from smooth_foley.compare.folders import claim, read_results, summarise
from smooth_foley.compare.sound_folders import compare_folders, save_folders, show_folders
from smooth_foley.compare.systems import build, load_with_folder, parse_system
from smooth_foley.core import FoleyError, mini_path
from smooth_foley.listen.judges import load_judges
from smooth_foley.media import write_video, write_wav
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.world import passby

WEIGHTS = "diffusion_pytorch_model.safetensors"
HERE = Path(__file__).parent
RUN = [sys.executable, str(HERE / "evaluate_run.py")]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(cmd):
    r = subprocess.run(cmd, env=ENV, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-3000:]


def made(out):
    "Every result that must not depend on how the run went"
    files = [p for p in Path(out).rglob("*") if p.suffix in (".wav", ".csv", ".md") or p.name == "system.json"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run([*RUN, str(out)])
    return out


def test_a_run_writes_what_it_promises(whole):
    rows = read_results(whole / "clips.csv")
    assert [(r["clip"], r["system"]) for r in rows] == [
        (f"passby-200000{i}", s) for i in range(3) for s in ("truth", "half", "ours")
    ]
    assert all(r["heard"] and float(r["kl"]) >= 0 for r in rows) and all(
        float(r["kl"]) == 0 for r in rows if r["system"] == "truth"
    )
    assert all(r["cond_tp"] != "" for r in rows if r["system"] != "truth")
    a, b = ((whole / s / "passby-2000000.wav").read_bytes() for s in ("ours", "half"))
    assert a != b, "two systems made the same sound"
    assert {d["against"] for d in read_results(whole / "differences.csv")} == {"ours"} and "**ours**" in (
        whole / "tables.md"
    ).read_text()
    with np.load(whole / "embeddings" / "ours.npz") as e:
        assert len(e["clips"]) == len(e["classifier"]) == 3


def test_physics_is_measured_for_every_system(whole):
    rows = {(r["clip"], r["system"]): r for r in read_results(whole / "clips.csv")}
    going_on = [(c, s) for (c, s), r in rows.items() if r["label"] in passby.CONTINUOUS]
    assert going_on and all((rows[k]["dropouts"] != "") == (k in going_on) for k in rows)
    true = [r for (c, s), r in rows.items() if s == "truth" and r["level_adherence"]]
    assert true and all(float(r["level_adherence"]) > 0.9 and float(r["dropouts"]) == 0 for r in true)
    assert all(rows[r["clip"], s]["level_adherence"] for r in true for s in ("ours", "half"))


def test_an_order_free_system_does_not_turn_with_the_film(tmp_path):
    import torch

    from smooth_foley.compare.counterfactual import counterfactual
    from smooth_foley.pipeline import SmoothFoleyPipeline

    torch.set_num_threads(1)
    pipe = SmoothFoleyPipeline.from_random(labels=passby.LABELS)
    rows = counterfactual("ours,truth-vae,diff-foley", out=tmp_path, n=1, steps=2, pipe=pipe, device="cpu")
    assert {r["system"] for r in rows} == {"truth", "ours", "truth-vae", "diff-foley"}
    value = {(r["system"], r["film"], r["measure"]): float(r["value"]) for r in rows}
    assert value["ours", "reversed", "level"] == 0.5 and abs(value["ours", "reversed", "level_slope"]) < 1e-3
    assert value["truth", "reversed", "level"] == value["truth", "moved", "loudest"] == 1
    name = f"passby_continuous-{mover_seeds('passby_continuous', 1)[0]}.wav"
    film, moved = ((tmp_path / "counterfactual" / "ours" / k / name).read_bytes() for k in ("film", "moved"))
    assert film != moved, "another film changes nothing: the test would pass for a system that sees nothing"


def test_stopped_between_clips_and_resumed_ends_with_the_same_files(whole, tmp_path):
    p = subprocess.Popen([*RUN, str(tmp_path), "--slow"], env=ENV, stderr=subprocess.DEVNULL)
    until = time.time() + 600
    while not list(tmp_path.glob("ours/passby*.wav")) and time.time() < until:
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    left = len(list(tmp_path.glob("*/passby*.wav")))
    assert 0 < left < 9 and not (tmp_path / "clips.csv").exists(), "it finished before it was killed"
    run([*RUN, str(tmp_path)])
    assert made(tmp_path) == made(whole)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-20_000])


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def forget(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "file",
    ["ours/*0.wav", "ours/*0.npz", "truth/*0.wav", "clips/*0.npz", "measured/ours/*0.npz", "measured/truth/*0.npz"],
)
@pytest.mark.parametrize("damage", [shorten, spoil, forget])
def test_a_damaged_file_is_made_again_and_never_scored(small, tmp_path, file, damage):
    clips, systems, judges, encoder, out = small
    work = tmp_path / "out"
    shutil.copytree(out, work)
    path = next(work.glob(file))
    if damage is spoil and path.suffix == ".wav":
        pytest.skip("a sound of the right length has no checksum: it is another sound, and measured as such")
    if damage is shorten and path.suffix == ".npz":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        damage(path)
    if not file.startswith("measured"):
        with pytest.raises(FoleyError, match="cut short or damaged"):
            result_folders.measure_missing(list(systems), [c.id for c in clips], work, judges)
    result_folders.generate_missing(systems, clips, encoder, work)
    result_folders.measure_missing(list(systems), [c.id for c in clips], work, judges)
    result_folders.collect(work, result_folders.judges_mark(judges))
    assert (work / "clips.csv").read_bytes() == (out / "clips.csv").read_bytes()


def test_a_sound_that_was_replaced_is_measured_again(small, tmp_path):
    clips, systems, judges, encoder, out = small
    work = tmp_path / "out"
    shutil.copytree(out, work)
    sounds = sorted((work / "ours").glob("*.wav"))
    sounds[0].write_bytes(sounds[1].read_bytes())
    result_folders.measure_missing(list(systems), [c.id for c in clips], work, judges)
    result_folders.collect(work, result_folders.judges_mark(judges))
    assert (work / "clips.csv").read_bytes() != (out / "clips.csv").read_bytes()


def test_what_was_removed_is_in_no_table(small, tmp_path):
    clips, systems, judges, encoder, out = small
    work, mark = tmp_path / "out", result_folders.judges_mark(judges)
    shutil.copytree(out, work)
    sorted((work / "ours").glob("*.wav"))[0].unlink()
    ours = [r["clip"] for r in result_folders.collect(work, mark) if r["system"] == "ours"]
    assert ours == [clips[1].id]
    shutil.rmtree(work / "ours")
    assert {r["system"] for r in result_folders.collect(work, mark)} == {"truth"}
    assert [p.stem for p in (work / "embeddings").glob("*.npz")] == ["truth"]


@pytest.mark.parametrize("change", [dict(label="dog barking"), dict(split="mine")])
def test_another_clip_of_the_same_name_is_not_taken_for_the_one_that_is_there(small, change):
    clips, systems, judges, encoder, out = small
    with pytest.raises(FoleyError, match=f"holds another clip {clips[0].id}.*give another --out"):
        result_folders.generate_missing(systems, [replace(clips[0], **change)], encoder, out)


def test_published_systems_see_the_whole_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "_check_memory", lambda *_: pytest.fail("a large video does not fit like this"))
    film = np.zeros((60, 64, 128, 3), np.uint8)
    film[30:, :, :24] = 255  # Outside the middle square
    write_video(tmp_path / "a.mp4", film, 15)
    (tmp_path / "labels.csv").write_text("name,label\na.mp4,dog barking\n")
    (take,) = [c.load() for c in folder_clips(tmp_path)]
    loaded = load_with_folder()
    crafter, foley = (build(parse_system(s), loaded, steps=1)[0] for s in ("foleycrafter", "diff-foley"))
    _, (seen,) = crafter([take])
    assert np.ptp(seen.similarity) > 1e-4  # The middle square is black from beginning to end
    foley([take])
    features = next(v for v in take.memo.values() if torch.is_tensor(v))
    assert not torch.allclose(features[0], features[-1], atol=1e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Two clips of one system, generated and measured"
    out = tmp_path_factory.mktemp("small")
    loaded, judges = load_with_folder(), load_judges()
    clips, encoder = passby_clips("passby", 2), result_folders.student_clip(loaded)
    systems = dict(ours=build(parse_system("ours"), loaded, steps=1)[0])
    result_folders.generate_missing(systems, clips, encoder, out)
    result_folders.measure_missing(["ours"], [c.id for c in clips], out, judges)
    result_folders.collect(out, result_folders.judges_mark(judges))
    return clips, systems, judges, encoder, out


def test_two_processes_do_the_work_of_one(whole, tmp_path):
    run(in_two_processes([*RUN[1:], tmp_path], 29573))
    assert made(tmp_path) == made(whole)


def test_other_steps_or_weights_are_not_mixed_into_a_folder(whole):
    about = json.loads((whole / "ours" / "system.json").read_text())
    claim(whole / "ours", about)
    for k, v in (("steps", 3), ("weights", "0" * 12), ("seed", 1)):
        with pytest.raises(FoleyError, match=f"other {k}"):
            claim(whole / "ours", {**about, k: v})


# Folders of videos


def test_a_folder_of_videos_is_a_split(tmp_path):
    film = np.random.default_rng(0).integers(0, 255, (15, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", film, 15, np.sin(np.arange(16000) * 0.3).astype(np.float32) * 0.3)
    write_video(tmp_path / "b.mp4", film, 15)
    (tmp_path / "labels.csv").write_text("name,label\na.mp4,helicopter\nb.mp4,dog barking\n")
    a, b = (c.load() for c in folder_clips(tmp_path))
    assert len(a.audio) == 16000 and a.sounding.mean() > 0.9 and b.audio is None
    assert [c.split for c in clips_of(f"passby,{tmp_path}", 1)] == ["passby", tmp_path.name]


@pytest.mark.parametrize(
    "text,why",
    [
        ("", "a row per video"),
        ("name,label\n", "no row"),
        ("name,label\na.mp4,\n", "lack a name or a label"),
        ("name,label\nz.mp4,dog\n", "not there: z.mp4"),
    ],
)
def test_bad_lists_of_labels(tmp_path, text, why):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(FoleyError, match=why):
        folder_clips(tmp_path)


def test_videos_that_differ_in_their_suffix_alone_keep_apart(tmp_path):
    for n in ("a.mp4", "a.mkv"):
        (tmp_path / n).touch()
    (tmp_path / "labels.csv").write_text("name,label\na.mp4,dog\na.mkv,dog\n")
    assert [c.id for c in folder_clips(tmp_path)] == ["a.mp4", "a.mkv"]


def test_a_folder_without_labels(tmp_path):
    with pytest.raises(FoleyError, match="no labels.csv"):
        clips_of(str(tmp_path))


# Folders of sounds


def tone(n=16000, f=0.05, seed=0):
    return (0.3 * np.sin(np.arange(n) * f) + 0.01 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


@pytest.fixture
def folders(tmp_path):
    gen, ref = tmp_path / "gen", tmp_path / "ref"
    gen.mkdir()
    ref.mkdir()
    for i in range(4):
        write_wav(ref / f"{i}.wav", tone(f=0.05 + 0.03 * i, seed=i))
        write_wav(gen / f"{i}.wav", tone(f=0.06 + 0.03 * i, seed=9 + i))
    return gen, ref


def numbers(r):
    return {(o["metric"], o["embedder"]): o["value"] for o in r["rows"]}


def test_a_folder_against_itself_and_another(folders, tmp_path):
    gen, ref = folders
    same, other = numbers(compare_folders(ref, ref)), numbers(compare_folders(gen, ref))
    assert same["kl", "classifier"] == 0 and same["activity", ""] == 1 and abs(same["fad", "classifier"]) < 1e-6
    assert other["kl", "classifier"] > 0 and other["fad", "classifier"] > 1e-3
    r = compare_folders(gen, ref)
    save_folders(r, tmp_path / "out")
    assert len(read_results(tmp_path / "out" / "folder_clips.csv")) == 4 and "mostly bias" in show_folders(r)
    assert any("fad_inf needs at least 10" in n for n in r["notes"])
    with pytest.raises(FoleyError, match="fad_inf needs at least 10"):
        compare_folders(gen, ref, metrics="fad_inf")


def test_names_that_do_not_match(folders):
    gen, ref = folders
    (gen / "3.wav").rename(gen / "x.wav")
    r = compare_folders(gen, ref)
    assert ("fad", "classifier") in numbers(r) and ("kl", "classifier") not in numbers(r)
    assert any("only in --generated: x" in n and "only in --reference: 3" in n for n in r["notes"])
    with pytest.raises(FoleyError, match="only in --generated: x; only in --reference: 3"):
        compare_folders(gen, ref, metrics="kl")


def write_pcm(path, x, sr, channels=1):
    with wave.open(str(path), "wb") as w:
        w.setnchannels(channels)
        w.setsampwidth(2)
        w.setframerate(sr)
        w.writeframes((np.clip(x, -1, 1) * 32767).astype("<i2").tobytes())


@pytest.mark.parametrize(
    "x,kw,why",
    [
        (np.zeros(16000), {}, "1 generated file is silent: 0.wav"),
        (np.sign(np.sin(np.arange(16000) * 0.1)), {}, "is clipped: 0.wav"),
        (tone(8000), dict(sr=8000), "recorded at 8 kHz, empty above 4 kHz: 0.wav"),
        (tone(176000), {}, "longer than 10.24 s, of which the judges hear only the beginning: 0.wav"),
    ],
)
def test_doubtful_sounds_are_named(folders, x, kw, why):
    gen, ref = folders
    write_pcm(gen / "0.wav", x, **{"sr": 16000, **kw})
    r = compare_folders(gen, ref, metrics="kl,fad,activity")
    assert any(why in n for n in r["notes"]) and all(np.isfinite(v) for v in numbers(r).values())


@pytest.mark.parametrize("sr,channels", [(8000, 1), (16000, 2), (22050, 1), (44100, 2), (96000, 1)])
def test_every_rate_and_stereo_sound_alike(folders, sr, channels):
    gen, ref = folders
    t = np.arange(sr) / sr
    x = 0.3 * np.sin(2 * np.pi * 500 * t)
    write_pcm(gen / "0.wav", np.repeat(x, channels), sr, channels)
    write_pcm(ref / "0.wav", 0.3 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000), 16000)
    write_wav(ref / "1.wav", passby.scene(3_900_000, frames=False, label="dog barking").audio)  # against a tone
    r = compare_folders(gen, ref, metrics="kl")
    kl = [c["kl"] for c in r["clips"]]
    assert kl[0] < 0.01 and kl[1] > 0.5, kl


def test_sounds_that_cannot_be_judged(folders):
    import soundfile

    gen, ref = folders

    def refused(why):
        with pytest.raises(FoleyError, match=why):
            compare_folders(gen, ref)

    soundfile.write(gen / "0.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    refused("0.wav.*no finite numbers")
    write_pcm(gen / "0.wav", np.zeros(1), 16000)
    refused("lasts 1 sample ")
    (gen / "0.wav").write_bytes(b"RIFF nothing")
    refused("0.wav")
    (gen / "0.wav").unlink()
    write_pcm(gen / "1.flac", tone(), 16000)
    refused("several files are called 1")


def test_folders_that_are_not_there(folders, tmp_path):
    gen, ref = folders
    (tmp_path / "empty").mkdir()
    for pair, why in (
        ((gen, tmp_path / "no"), "--reference .*no such folder"),
        ((tmp_path / "empty", ref), "--generated .*no sound in it"),
    ):
        with pytest.raises(FoleyError, match=why):
            compare_folders(*pair)


def test_a_missing_weight_file_says_which_and_where_from(folders, tmp_path):
    gen, ref = folders
    with pytest.raises(FoleyError, match="Cnn14_16k.*zenodo"):
        compare_folders(gen, ref, "cnn14_16k", weights=tmp_path)
    with pytest.raises(FoleyError, match="vggish.*github"):
        compare_folders(gen, ref, "vggish", weights=tmp_path)
    with pytest.raises(FoleyError, match="no embedder"):
        compare_folders(gen, ref, "cnn15")


def test_one_bad_video_is_left_out_and_two_of_one_name_are_two(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a/x.mp4", "b/x.mp4"):
        write_video(tmp_path / "in" / name, rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8), 15)
    (tmp_path / "in" / "bad.mp4").write_text("words")
    rows = [f"{name},helicopter\n" for name in ("a/x.mp4", "b/x.mp4", "bad.mp4")]
    (tmp_path / "in" / "labels.csv").write_text("name,label\n" + "".join(rows))
    out = evaluate.evaluate("ours", str(tmp_path / "in"), tmp_path / "out", steps=1, device="cpu", only="generate")
    assert sorted(p.name for p in (out / "ours").glob("*.wav")) == ["a%2Fx.mp4.wav", "b%2Fx.mp4.wav"]
    assert evaluate.left_out(out) == ["bad"]


# Names of systems


@pytest.mark.parametrize(
    "text,why",
    [
        ("our", "did you mean ours"),
        ("=ours", "cannot be its name"),
        ("a/b=ours", "cannot be its name"),
        ("truth=ours", "cannot be its name"),
        ("x=ours:scale=1", "does not understand"),
        ("x=ours:frame_scale=much", "is no number"),
        ("x=ours:frame_wise=perhaps", "is no true or false"),
        ("ours:frame_scale=0", "name it, as in mine=ours"),
    ],
)
def test_bad_names_of_systems(text, why):
    with pytest.raises(FoleyError, match=why):
        parse_system(text)


# Shipped results


def test_shipped_results_are_summarised_to_the_same_digits(tmp_path):
    shipped = Path(__file__).parent.parent / "results" / "evaluate"
    (tmp_path / "clips.csv").write_bytes((shipped / "clips.csv").read_bytes())
    summarise(tmp_path)
    for name in ("summary.csv", "differences.csv"):
        again, then = read_results(tmp_path / name), read_results(shipped / name)
        stored = {(r["split"], r["measure"], r["system"]): r for r in then}
        pairs = [(r, stored.get((r["split"], r["measure"], r["system"]))) for r in again]
        pairs = [(now, old) for now, old in pairs if old]
        assert len(pairs) > 150 and all(now == old for now, old in pairs)


def test_the_papers_row_and_foleycrafter_have_adapters_that_were_trained_apart():
    loaded = load_with_folder()
    shipped = load_file(mini_path().parent / "foleycrafter" / "temporal_adapter" / WEIGHTS)
    names = {name: build(parse_system(name), loaded, steps=1)[1]["weights"] for name in ("ours", "paper")}
    assert names["ours"] != names["paper"]
    paper = systems._trained_apart(loaded, "variants/frame_adapter_none").pipe
    assert paper.frame_adapter.config.frame_position == "none" and not paper.config.soft_condition
    crafter = systems._foleycrafter_on(loaded)
    for pipe in (paper, crafter):
        mine = pipe.temporal_adapter.state_dict()
        assert all(torch.equal(mine[name].half(), w) for name, w in shipped.items())
    assert not crafter.config.soft_condition
    assert systems._trained_apart(systems.Loaded(SmoothFoleyPipeline.from_random()), "variants").replaced == ()


def test_distances_are_compared_on_the_clips_that_both_have():
    rng = np.random.default_rng(0)
    x, truth = rng.standard_normal((40, 4)), rng.standard_normal((40, 4))
    x[0] += 30
    names = np.array([f"c{k:02d}" for k in range(40)])
    sets = dict(
        truth=dict(clips=names, e=truth), ours=dict(clips=names[:-1], e=x[:-1]), b=dict(clips=names[1:], e=x[1:])
    )
    values, (difference,) = summary._distance_rows("s", "e", sets, "ours")
    assert difference["n"] == 38 and abs(difference["difference"]) < 1e-9 and difference["p"] == 1
    assert [v["n"] for v in values] == [39, 39]


def test_a_difference_between_many_systems_can_be_found():
    rng = np.random.default_rng(0)
    names, truth = np.array([f"c{k:03d}" for k in range(60)]), rng.standard_normal((60, 4))
    sets = {f"s{k}": dict(clips=names, e=truth + 0.01 * rng.standard_normal((60, 4))) for k in range(14)}
    sets |= dict(truth=dict(clips=names, e=truth), bad=dict(clips=names, e=truth + 2))
    _, differences = summary._distance_rows("s", "e", sets, "s0")
    summary._correct(differences)
    found = {d["system"]: d["p_holm"] for d in differences}
    assert len(found) == 14 and found["bad"] < 0.05 and all(p > 0.05 for name, p in found.items() if name != "bad")


@pytest.mark.parametrize("how", [lambda: clips_of("passby_mixed", 1), lambda: mover_seeds("passby_mixed", 1)])
def test_a_split_of_two_sources_is_not_measured_against_one(how):
    with pytest.raises(
        FoleyError, match="choose from passby, passby_continuous$|one source .passby, passby_continuous"
    ):
        how()
