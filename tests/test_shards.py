"""Shards where a page can't go: kill -9, several processes, a full disk, damage anywhere, every stage of training"""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smooth_foley.core import FoleyError, mini_path, only_writer
from smooth_foley.data import shard_reader
from smooth_foley.data.audioset import read_strong, sounding
from smooth_foley.data.shard_index import seal
from smooth_foley.data.shard_reader import BadMember, Shard, Shards, ShardStream, verify
from smooth_foley.data.shard_rows import TrainRows
from smooth_foley.data.shards import ShardConfig, make_sample, networks, write_shards
from smooth_foley.data.vggsound import join_clips
from smooth_foley.world.as_vggsound import passby_folder

CFG = ShardConfig(per_shard=2)
RUN = """
import sys
from smooth_foley.data.audioset import read_strong
from smooth_foley.data.shards import ShardConfig, write_shards
from smooth_foley.data.vggsound import join_clips
folder, out, processes = sys.argv[1:]
if __name__=='__main__':
    items = read_strong(f'{folder}/audioset_strong.tsv', f'{folder}/mid_to_display_name.tsv', duration=1.5)
    items = join_clips(items, f'{folder}/video')
    write_shards(items, out, ShardConfig(per_shard=2), processes=int(processes))
"""


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return passby_folder(tmp_path_factory.mktemp("clips") / "passby", 16, seed=40, seconds=1.5)


@pytest.fixture(scope="module")
def items(folder):
    return join_clips(
        read_strong(folder / "audioset_strong.tsv", folder / "mid_to_display_name.tsv", duration=1.5), folder / "video"
    )


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    "Written by one process in one go"
    out = tmp_path_factory.mktemp("whole") / "shards"
    assert write_shards(items, out, CFG)["clips"] == len(items) >= 10
    return out


def children(pid):
    "Processes started by `pid`, by their numbers"
    found = []
    for p in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(p.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(p.parent.name))
        except OSError:
            pass
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_killed_by_9_and_run_again_is_the_same_and_nobody_writes_on(whole, items, folder, tmp_path):
    script, out = tmp_path / "run.py", tmp_path / "shards"
    script.write_text(RUN)
    p = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(out), "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    until = time.time() + 600
    while not list(out.glob("shard-*.json")) and p.poll() is None and time.time() < until:
        time.sleep(0.002)
    workers = children(p.pid)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (out / "index.json").exists(), "it finished before it was killed"
    assert workers
    until = time.time() + 120
    while any(map(alive, workers)) and time.time() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers)), "a worker lives on without its parent"
    done = [t for t in out.glob("shard-*.tar") if t.with_suffix(".json").exists()]
    assert 0 < len(done) < len(list(whole.glob("*.tar")))
    for t in out.glob("shard-*.tar"):
        assert t.read_bytes() == (whole / t.name).read_bytes()
    (out / ".shard-000007.99.abc.part.tar").write_bytes(b"left behind")
    (out / "shard-000007.json").unlink(missing_ok=True)
    kept = {t.name: t.stat().st_mtime_ns for t in done if t.name != "shard-000007.tar"}
    write_shards(items, out, CFG)
    assert content(out) == content(whole)
    assert all((out / name).stat().st_mtime_ns == at for name, at in kept.items()), "a finished shard was made again"


def test_two_processes_write_what_one_writes(whole, items, tmp_path):
    write_shards(items, tmp_path / "shards", CFG, processes=2)
    assert content(tmp_path / "shards") == content(whole)
    assert not verify(tmp_path / "shards")


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(whole, items, tmp_path):
    out, (soft, hard) = tmp_path / "shards", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(FoleyError) as e:
            write_shards(items, out, CFG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "make room" in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in out.iterdir()] == ["plan.json"]
    write_shards(items, out, CFG)
    assert content(out) == content(whole)


def test_one_damaged_byte_anywhere_costs_at_most_one_clip(whole, tmp_path):
    data = Shards(whole)
    true = {data[i]["key"]: data[i] for i in range(len(data))}
    name, rng = "shard-000003.tar", np.random.default_rng(0)
    mine = {data[i]["key"] for i in range(6, 8)}
    for f, b in content(whole).items():
        (tmp_path / f).write_bytes(b)
    raw, seen = (whole / name).read_bytes(), Counter()
    places = [
        *rng.integers(0, len(raw), 25),
        *(p for i in range(0, 3) for p in rng.integers(512 * i, 512 * i + 512, 3)),
    ]
    for place in map(int, places):
        bad = bytearray(raw)
        bad[place] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(bad)
        stream = ShardStream(Shards(tmp_path), shuffle=False)
        got = list(stream)
        for s in got:
            for k, v in true[s["key"]].items():
                assert np.array_equal(s[k], v) if isinstance(v, np.ndarray) else s[k] == v
        lost = set(true) - {s["key"] for s in got}
        assert len(lost) <= 1 and lost <= mine and [f["id"] for f in stream.shards.faults] == sorted(lost)
        assert verify(tmp_path), place
        seen[len(lost)] += 1
    assert seen[1] > 15


def test_without_an_index_the_rest_of_a_tar_is_still_read(whole, tmp_path):
    raw = bytearray((whole / "shard-000000.tar").read_bytes())
    with tarfile.open(whole / "shard-000000.tar") as t:
        members = t.getmembers()
    raw[members[1].offset + 10] ^= 255  # header of the first clip's second member
    (tmp_path / "x.tar").write_bytes(raw)
    stream = ShardStream(Shards(tmp_path), shuffle=False)
    got = [s["key"] for s in stream]
    assert got == [Shards(whole)[1]["key"]]
    assert sorted(f["reason"] for f in stream.shards.faults) == ["header", "missing"]


def edited(text, change):
    "A JSON file with a change, sealed again or not"
    index = json.loads(text)
    change(index)
    return json.dumps(index, ensure_ascii=False, separators=(",", ":"))


def exchanged(*names):
    def change(index):
        for name in names:
            index[name][0], index[name][1] = index[name][1], index[name][0]

    return change


def raised(name):
    def change(index):
        index[name][0][0] += 1

    return change


def reseal(change):
    def both(index):
        change(index)
        index["check"] = seal(index)["check"]

    return both


LIES = {
    "rows exchanged": exchanged("offset", "size", "crc32"),
    "keys exchanged": exchanged("keys"),
    "a place moved": raised("offset"),
    "a size changed": raised("size"),
    "a checksum changed": raised("crc32"),
    "a list shortened": lambda index: index["crc32"].pop(),
    "a clip forgotten": lambda index: [index[k].pop() for k in ("keys", "offset", "size", "crc32")],
    "a huge size": lambda index: index["size"][0].__setitem__(0, 10**18),
    "a negative place": lambda index: index["offset"][0].__setitem__(0, -512),
    "another tar's": lambda index: index.update(shard="shard-000001.tar"),
    **{
        f"without {k}": lambda index, k=k: index.pop(k) for k in ("keys", "fields", "offset", "size", "crc32", "faults")
    },
}


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with a new checksum"])
@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies_is_told_and_mended_and_serves_no_wrong_clip(whole, items, tmp_path, name, sealed):
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    side = bad / "shard-000000.json"
    side.write_text(edited(side.read_text(), reseal(LIES[name]) if sealed else LIES[name]))
    said = verify(bad)
    assert said and {f["reason"] for f in said} <= {"index", "truncated", "checksum"}, said
    truth, read = {x["key"]: x for x in Shards(whole)}, Shards(bad)
    for i in range(len(read)):
        try:
            clip = read[i]
        except BadMember:
            continue
        assert clip["id"] == truth[clip["key"]]["id"] and np.array_equal(clip["latent"], truth[clip["key"]]["latent"])
    if not sealed:
        write_shards(items, bad, CFG)
        assert content(bad) == content(whole) and not verify(bad)


@pytest.mark.parametrize("left", [b"", bytes(10240)], ids=["empty", "zeros"])
def test_a_shard_of_which_nothing_is_left_is_told_beside_the_others(whole, tmp_path, left):
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    tars = sorted(bad.glob("*.tar"))
    tars[0].write_bytes(left)
    tars[-1].unlink()
    assert {(Path(f["path"]).name, f["reason"]) for f in verify(bad)} >= {
        (tars[0].name, "checksum"),
        (tars[-1].name, "missing"),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"].pop(),
        lambda index: index["shards"][0].update(n=1),
        lambda index: index["shards"][0].update(n=-1),
        lambda index: index["shards"][0].update(sha256="0" * 64),
        lambda index: index["shards"][0].pop("sha256"),
        lambda index: index.update(clips=3),
        lambda index: index["plan"].update(networks="other"),
        lambda index: index.update(shards=[]),
        lambda index: index.pop("shards"),
    ],
)
def test_a_list_of_shards_that_lies_is_told_and_mended(whole, items, tmp_path, change):
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    (bad / "index.json").write_text(edited((bad / "index.json").read_text(), change))
    try:
        assert verify(bad)
    except FoleyError as e:
        assert "index.json" in str(e)
    write_shards(items, bad, CFG)
    assert content(bad) == content(whole) and not verify(bad)


def test_what_is_wrong_with_the_settings_is_no_fault_of_a_clip(items, tmp_path):
    with pytest.raises(FoleyError, match="size=32: this CLIP reads"):
        write_shards(items, tmp_path / "shards", replace(CFG, content=("frames", "clip"), size=32))
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["plan.json"]


def test_weights_that_change_in_place_are_read_again(items, tmp_path):
    model = tmp_path / "model"
    for part in ("mel", "vae"):
        shutil.copytree(mini_path() / part, model / part)
    cfg = ShardConfig(content=("latent",), weights=str(model))
    first = make_sample(items[0], cfg)["latent.npy"]
    file = next((model / "vae").glob("*.safetensors"))
    status = file.stat()
    weights = load_file(file)
    save_file({k: v * 0.5 for k, v in weights.items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not np.array_equal(make_sample(items[0], cfg)["latent.npy"], first)


def test_two_runs_do_not_write_into_one_folder(items, tmp_path):
    out = tmp_path / "shards"
    out.mkdir()
    with only_writer(out):
        for part in ((0, 1), (1, 2)):
            with pytest.raises(FoleyError, match="another run is writing into it"):
                write_shards(items, out, CFG, part=part)
    with only_writer(out, (0, 2)):
        assert write_shards(items[:2], out, CFG, part=(1, 2)) is None


def test_lists_that_lead_out_of_the_folder_are_refused(whole, tmp_path):
    for f, b in content(whole).items():
        (tmp_path / f).write_bytes(b)
    for name in ("../shard-000000.tar", "/tmp/shard-000000.tar", "..", "a\\\\b.tar"):
        (tmp_path / "index.json").write_text((whole / "index.json").read_text().replace("shard-000001.tar", name))
        with pytest.raises(FoleyError, match="refused"):
            Shards(tmp_path)
    (tmp_path / "index.json").write_text('{"half')
    with pytest.raises(FoleyError, match="index.json"):
        Shards(tmp_path)
    with pytest.raises(FoleyError, match="no shard"):
        Shards(passby_folder(tmp_path / "p", 1, seconds=0.5))


@pytest.mark.parametrize("world,workers", [(1, 1), (3, 2), (7, 1), (2, 5), (40, 1)])
def test_every_clip_is_read_once_by_nodes_and_workers(whole, world, workers, monkeypatch):
    data, sizes, read = Shards(whole, ("latent",)), [], []
    for rank in range(world):
        for w in range(workers):
            info = SimpleNamespace(id=w, num_workers=workers)
            monkeypatch.setattr(shard_reader, "get_worker_info", lambda info=info: info)
            mine = ShardStream(data, rank=rank, world=world, seed=5).mine()
            read += list(mine)
            sizes.append(len(mine))
    assert sorted(read) == list(range(len(data))) and max(sizes) - min(sizes) <= 1


def test_workers_add_what_is_bad_to_one_report(whole, tmp_path):
    for f, b in content(whole).items():
        (tmp_path / f).write_bytes(b)
    for k in (1, 4):
        s = Shard(tmp_path / f"shard-00000{k}.tar")
        raw = bytearray(s.path.read_bytes())
        raw[int(s.offset[1, s.fields.index("latent.npy")]) + 200] ^= 1
        s.path.write_bytes(raw)
    stream = ShardStream(Shards(tmp_path, ("latent",), report=tmp_path / "bad.csv"))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    got = list(loader)
    rows = list(csv.DictReader(open(tmp_path / "bad.csv")))
    assert len(got) == len(stream.shards) - 2 and sorted(Path(r["path"]).name for r in rows) == [
        "shard-000001.tar",
        "shard-000004.tar",
    ]
    assert all(r["reason"] == "checksum" and r["id"] for r in rows)


def test_clips_that_cannot_be_used_are_all_told(items, tmp_path):
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.touch()
    text.write_text("no film")
    bad = [
        replace(items[0], id="a", path=empty),
        replace(items[0], id="b", path=text),
        replace(items[0], id="$(c); rm", path=tmp_path / "gone.mp4"),
        replace(items[0], id="d", path=None),
    ]
    index = write_shards([*bad, items[1], items[1]], tmp_path / "shards", CFG)
    rows = list(csv.DictReader(open(tmp_path / "shards" / "faults.csv")))
    assert index["clips"] == 1 and index["faults"] == len(rows) == 5
    assert [r["reason"] for r in rows] == ["unreadable", "unreadable", "unreadable", "missing", "twice"]
    assert write_shards(bad, tmp_path / "none", CFG)["clips"] == 0
    with pytest.raises(FoleyError, match="no clip"):
        Shards(tmp_path / "none")
    with pytest.raises(FoleyError, match="none given"):
        write_shards([], tmp_path / "nothing")


def test_a_damaged_clip_in_training_is_replaced_and_told(whole, tmp_path):
    for f, b in content(whole).items():
        (tmp_path / f).write_bytes(b)
    s = Shard(tmp_path / "shard-000000.tar")
    raw = bytearray(s.path.read_bytes())
    raw[int(s.offset[1, s.fields.index("latent.npy")]) + 200] ^= 1
    s.path.write_bytes(raw)
    rows, true = TrainRows(Shards(tmp_path)), TrainRows(Shards(whole))
    for _ in range(2):
        assert torch.equal(rows([0, 1])["z"], true([0, 2])["z"])
    assert [f["id"] for f in rows.shards.faults] == [s.keys[1]]
    with pytest.raises(BadMember, match=s.keys[1]):
        rows.shards[1]


def test_rows_for_every_stage_give_a_loss_with_gradients(whole, items):
    from smooth_foley.backbone import load_backbone
    from smooth_foley.frame_adapter import FrameAdapter
    from smooth_foley.temporal_condition import LabelProjection
    from smooth_foley.train.diffusion import FrameStage
    from smooth_foley.train.loop import Draw
    from smooth_foley.train.parts import ProjectionStage, VaeStage
    from smooth_foley.world.passby import LABELS

    base, net = load_backbone(mini_path()), networks(CFG)
    rows = TrainRows(Shards(whole), base.tokenizer, base.text_encoder, timeline=True)
    i = next(k for k, (_, label) in enumerate(rows.rows) if 0 < sounding(items[k], label).sum() < 150)
    batch = rows([i, 0])
    assert np.array_equal(batch["sounding"][0].numpy(), sounding(items[i], items[i].label))
    assert batch["emb"].shape == (2, 153, 96) and not batch["emb"][:, 23:].any() and batch["emb"][:, :22].any()
    adapter = FrameAdapter.from_unet(base.unet, 96, frame_position="window")
    frame_stage = FrameStage(
        dict(adapter=adapter),
        dict(unet=base.unet, text_encoder=base.text_encoder),
        base.tokenizer,
        base.scheduler,
        frame_wise=True,
        span=10.24,
    )
    adapter.install(base.unet).requires_grad_(True).train()
    projection = ProjectionStage(LabelProjection(96), net["frame_encoder"].encode_text(list(LABELS)).clone())
    for stage, rows_of_stage in (
        (frame_stage, rows([i, 0])),
        (projection, rows.projection([i, 0], list(LABELS))),
        (VaeStage(net["vae"].requires_grad_(True)), rows.images([i, 0], net["mel"])),
    ):
        loss = stage(rows_of_stage, Draw(0, 0, 2))
        loss.backward()
        assert torch.isfinite(loss) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.parameters())
    net["vae"].requires_grad_(False)


def test_a_label_that_sounds_in_a_clip_is_not_taught_as_absent(items, tmp_path):
    (start, end, label), other = items[0].events[0], "a kettle"
    both = replace(items[0], events=[(start, end, label), (0.0, 0.2, other)])
    write_shards([both, items[1]], tmp_path / "shards", replace(CFG, content=("clip",)))
    rows = TrainRows(Shards(tmp_path / "shards"), timeline=True)
    labels = sorted({label for _, label in rows.rows})
    batch = rows.projection(range(len(rows)), labels)
    for (i, _), there in zip(rows.rows, batch["present"]):
        assert {name for name, on in zip(labels, there) if on} == {e[2] for e in (both, items[1])[i].events}


def test_rows_with_a_mask_need_a_timeline(items, tmp_path):
    write_shards([items[0], replace(items[1], events=None)], tmp_path / "shards", replace(CFG, content=("latent",)))
    assert "sounding" not in TrainRows(Shards(tmp_path / "shards"))([0, 1])
    with pytest.raises(FoleyError, match=f"{items[1].name}: has no timeline"):
        TrainRows(Shards(tmp_path / "shards"), timeline=True)
