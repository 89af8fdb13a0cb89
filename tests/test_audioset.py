"AudioSet-strong where a notebook is too small: large files, odd bytes, the folder of the examples from list to mask"

import time

import numpy as np
import pytest
import torch

from smooth_foley.core import FoleyError
from smooth_foley.data import audioset
from smooth_foley.data.items import Item
from smooth_foley.data.vggsound import join_clips
from smooth_foley.mel import MelTransform
from smooth_foley.world.as_vggsound import passby_folder

HEADER = "\t".join(audioset.STRONG_COLUMNS) + "\n"
NAMES = {"/m/0a": "Siren", "/t/dd00001": "Dog"}


def write(path, text, encoding="utf-8"):
    path.write_bytes((HEADER + text).encode(encoding))
    return path


def test_every_line_of_a_large_file_is_an_event_or_a_fault(tmp_path):
    rng, lines, wrong = np.random.default_rng(0), [], 0
    for k in range(60_000):
        a, b = sorted(rng.uniform(0, 10, 2).round(3))
        if k % 1000 == 7:
            a, b, wrong = b + 0.001, a, wrong + 1
        lines.append(f"-{k // 9:08d}_-_{30_000 + k // 9}\t{a:.3f}\t{b:.3f}\t{'/m/0a' if k % 3 else '/t/dd00001'}\n")
    faults, start = [], time.time()
    items = audioset.read_strong(write(tmp_path / "audioset_eval_strong.tsv", "".join(lines)), NAMES, faults)
    assert time.time() - start < 20
    assert len(faults) == wrong == 60 and {f["reason"] for f in faults} == {"order"}
    assert [f["line"] for f in faults] == [k + 2 for k in range(7, 60_000, 1000)]
    assert sum(len(i.events) for i in items) == 60_000 - wrong and len(items) == len({i.id for i in items}) == 6667
    assert all(i.id.startswith("-") and len(i.id) == 11 and i.split == "test" for i in items)
    assert sum(r["events"] for r in audioset.label_table(items)) == 60_000 - wrong


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_byte_order_mark_and_windows_lines(tmp_path, encoding):
    text = HEADER + "b0RFKhbpFJA_30000\t1\t2\t/m/0a\n\n"
    (tmp_path / "a.tsv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert audioset.read_strong(tmp_path / "a.tsv", NAMES)[0].events == [(1.0, 2.0, "Siren")]


def test_utf16_and_commas_are_refused_in_one_line(tmp_path):
    for k, data in enumerate((HEADER.encode("utf-16"), HEADER.replace("\t", ",").encode())):
        path = tmp_path / f"{k}.tsv"
        path.write_bytes(data)
        with pytest.raises(FoleyError) as e:
            audioset.read_strong(path, NAMES)
        assert "line 1" in str(e.value) and "\n" not in str(e.value)


def test_names_that_are_wrong_are_told(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("/m/0a\tSiren\n/m/0a\tDog\nSiren\t/m/0b\n/m/0c\n/m/0d\tFire engine, fire truck (siren)\n")
    faults = []
    assert audioset.read_names(path, faults) == {"/m/0a": "Siren", "/m/0d": "Fire engine, fire truck (siren)"}
    assert [(f["line"], f["reason"]) for f in faults] == [(2, "twice"), (3, "mid"), (4, "columns")]
    with pytest.raises(FoleyError, match="line 2"):
        audioset.read_names(path)


@pytest.mark.parametrize("seconds", ["-1", "1e9", "inf", "nan", "", "1,5"])
def test_numbers_that_are_none(tmp_path, seconds):
    faults = []
    assert not audioset.read_strong(write(tmp_path / "a.tsv", f"b0RFKhbpFJA_0\t{seconds}\t9\t/m/0a\n"), NAMES, faults)
    assert [f["reason"] for f in faults] == ["number"]


def test_masks_are_those_of_the_condition_room(tmp_path):
    "The same bits as a `TemporalCondition` asked at every column's centre, one column for events too short to be seen"
    from smooth_foley.temporal_condition import TemporalCondition

    rng = np.random.default_rng(1)
    for _ in range(200):
        a = rng.uniform(0, 9, 4)
        b = a + rng.uniform(0.02, 3, 4)
        item = Item(
            "b0RFKhbpFJA", 0.0, "x", "train", events=[(s, e, "xy"[k % 2]) for k, (s, e) in enumerate(zip(a, b))]
        )
        for label, keep in (("x", (0, 2)), (None, range(4))):
            centre = (np.arange(1024) + 0.5) / 100
            direct = np.any([(a[k] <= centre) & (centre < min(b[k], 10.0)) for k in keep], axis=0)
            assert np.array_equal(audioset.sounding(item, label), direct)
            assert np.array_equal(
                TemporalCondition.from_intervals([(a[k], b[k]) for k in keep], 10.0).columns().numpy() > 0, direct
            )


def test_folder_from_list_to_the_image_that_the_adapter_reads(tmp_path):
    folder = passby_folder(tmp_path / "passby", 9, seed=3, seconds=2.0)
    items = join_clips(
        audioset.read_strong(folder / "audioset_strong.tsv", folder / "mid_to_display_name.tsv", duration=2.0),
        folder / "video",
    )
    assert items.present and not items.missing
    rows = audioset.per_label(items)
    on = torch.from_numpy(np.stack([audioset.sounding(i, i.label) for i in rows]))
    image = MelTransform.mini().condition_image(on.float() * 2 - 1)
    assert image.shape == (len(rows), 16, 32, 256) and on.any(1).all() and not on[:, 200:].any()
    with pytest.raises(FoleyError, match="no timeline"):
        audioset.sounding(Item("b0RFKhbpFJA", 0.0, "x", "train"))
