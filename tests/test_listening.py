"Listening tests: the page in a real browser, folders and answers that are not as they should be"

import json
import shutil

import numpy as np
import pytest

from smooth_foley.app.main import main
from smooth_foley.core import FoleyError
from smooth_foley.media import SR, write_video, write_wav
from smooth_foley.paper.listening import key_path, read_key, session
from smooth_foley.paper.listening_folder import make_study
from smooth_foley.paper.listening_scores import NO_RATINGS, score
from smooth_foley.paper.ratings import find_answers, new_answers, read_ratings, write_answers

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NAMES = ["one", "<b>two", "three 'n' four"]
LABEL = "<img src=x onerror=alert(1)>"


def write_clips(folder, names, systems, seconds=0.6):
    "Little videos with labels, and a sound of every system for each"
    rng, rows = np.random.default_rng(0), ["name,label"]
    for k, name in enumerate(names):
        frames = np.zeros((round(15 * seconds), 48, 64, 3), np.uint8)
        frames[k : k + 4, 10:30, 10:30] = 255
        (folder / "videos").mkdir(exist_ok=True, parents=True)
        write_video(folder / "videos" / f"{name}.mp4", frames, audio=rng.normal(size=round(SR * seconds)) / 10)
        rows.append(f"{name}.mp4,{LABEL if k == 1 else f'label {k}'}")
        for s in systems:
            (folder / "sounds" / s).mkdir(exist_ok=True, parents=True)
            write_wav(folder / "sounds" / s / f"{name}.wav", rng.normal(size=round(SR * seconds)) / 20)
    (folder / "videos" / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), NAMES, ("ours", "foleycrafter"))


@pytest.fixture
def made(clips, tmp_path):
    "A folder for listeners"
    make_study("ours,foleycrafter", clips / "videos", tmp_path / "test", 3, clips / "sounds", 8, secret=4)
    return tmp_path / "test"


def run(capsys, *words):
    code = main([str(w) for w in words])
    said = capsys.readouterr()
    return code, said.out, said.err


# ---- A browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--mute-audio", "--autoplay-policy=no-user-gesture-required"],
            timeout=400_000,
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, made):
    "The page of the folder; whatever it loads from elsewhere, and every error, fails the test"
    context = browser.new_context(accept_downloads=True, offline=True)
    context.set_default_timeout(120_000)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url))
    page.goto((made / "index.html").as_uri())
    yield page
    context.close()
    assert not wrong


def begin(page, listener):
    "From the first screen to the first video"
    page.fill("#listener", str(listener))
    page.click("#begin")
    page.click("#play-noise")
    page.wait_for_selector("#go:enabled")
    page.fill("#beeps", "3")
    page.click("#go")


def wait_for(page, n):
    "Video `n` has been played to its end; returns the name of its file"
    page.wait_for_function(f"document.getElementById('place').textContent.startsWith('Video {n} ')")
    page.wait_for_function("current && current.heard")
    return page.get_attribute("#video", "src")


def by_keys(page, values):
    for v in values:
        page.keyboard.press(str(v % 10))
    page.keyboard.press("Enter")


def by_hand(page, values):
    "Click each slider where the value is, then Next"
    for slider, v in zip(page.query_selector_all("#questions input"), values):
        box = slider.bounding_box()
        slider.click(position=dict(x=8 + (box["width"] - 16) * (v - 1) / 9, y=box["height"] / 2))
    page.click("#next")


def test_a_session_from_the_first_click_to_table_3(page, made, capsys):
    study = read_key(key_path(made))
    opinion = {study.file(c, v): v for c in study.clips for v in study.versions}
    values = dict(real=(9, 10, 8), another=(2, 1, 7), ours=(8, 7, 6), foleycrafter=(5, 6, 4))
    trials = session(study, 3)
    begin(page, 3)
    for n in range(1, len(trials) + 1):
        version = opinion[wait_for(page, n)]
        assert page.is_disabled("#next")
        (by_hand if n % 4 == 0 else by_keys)(page, values[version])
        if n == 5:
            page.wait_for_function("document.getElementById('place').textContent.startsWith('Video 6 ')")
            page.reload()
            assert page.input_value("#listener") == "3" and page.inner_text("#begin") == "Go on"
            assert f"5 of {len(trials)}" in page.inner_text("#resume")
            page.click("#begin")
    with page.expect_download() as download:
        page.click("#save")
    path = made / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name in page.inner_text("#saved")
    found = json.loads(path.read_text())
    assert [a["file"] for a in found["answers"]] == [study.file(*t) for t in trials]
    assert all(tuple(a["ratings"].values()) == values[opinion[a["file"]]] for a in found["answers"])
    r = read_ratings([path], study)
    assert (r.notes, r.simulated, r.done) == ([], False, [1.0])
    code, out, _ = run(capsys, "listen", "score", made, "--out", made.parent / "scores")
    assert code == 0 and "| FC (`foleycrafter`) | 5.00 [5.00, 5.00] (paper 5.89) |" in out
    assert "| Ours (`ours`) | 8.00 [8.00, 8.00] (paper 8.42) | 7.00" in out and "1 listeners, 3 clips" in out
    assert (made.parent / "scores" / "report.md").is_file()


def test_labels_are_text_and_a_missing_video_is_skipped(page, made):
    study = read_key(key_path(made))
    first = session(study, 1)[0]
    (made / study.file(*first)).unlink()
    begin(page, 1)
    page.click("#skip")
    wait_for(page, 2)
    found = json.loads(page.evaluate("asFile()"))
    assert found["answers"][0]["problem"] == "cannot be played" and found["answers"][0]["ratings"] == {}
    shown = set()
    for n in range(2, 5):
        wait_for(page, n)
        shown.add(page.inner_text("#label b"))
        by_keys(page, (5, 5, 5))
    assert LABEL in shown
    write_answers(made, json.loads(page.evaluate("asFile()")))
    r = read_ratings(find_answers([made]), study)
    assert r.notes == ["listener 1: 1 videos could not be played, left out"]


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_clips_that_cannot_be_used_are_left_out_for_all(tmp_path, capsys):
    folder = write_clips(tmp_path, ["a", "b", "c", "d", "e"], ("ours", "theirs"))
    (folder / "sounds" / "ours" / "a.wav").write_bytes(b"RIFF")
    (folder / "sounds" / "theirs" / "b.wav").unlink()
    write_video(folder / "videos" / "c.mp4", np.zeros((41, 16, 16, 3), np.uint8), 2.0)
    words = ["--systems", "ours,theirs", "--split", folder / "videos", "--sounds", folder / "sounds", "--n", 5]
    code, out, _ = run(capsys, "listen", "make", *words, "--out", tmp_path / "test")
    assert code == 0
    notes = out.splitlines()[:3]
    assert [n.split(" is left out: ")[0] for n in notes] == ["clip a", "clip b", "clip c"]
    assert "cannot be" in notes[0] and "b.wav: is missing" in notes[1] and "20 s" in notes[2]
    study = read_key(key_path(tmp_path / "test"))
    assert study.clips == ["d", "e"] and len(list((tmp_path / "test").glob("*.mp4"))) == 8


WRONG = {  # name: (systems, what the line must say)
    "a system twice": ("ours,ours", "'ours' occurs twice"),
    "no system": (" , ", "systems is empty"),
    "the name of an anchor": ("real", "'real' cannot be a system's name"),
    "a path for a name": ("../ours", "cannot be a system's name"),
    "an unknown system": ("nobody", "there is no 'nobody'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_systems(name, clips, tmp_path, capsys):
    systems, says = WRONG[name]
    words = ["--systems", systems, "--split", clips / "videos", "--sounds", clips / "sounds", "--out", tmp_path / "t"]
    code, out, err = run(capsys, "listen", "make", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert not list(tmp_path.iterdir())


def test_too_few_clips_leave_nothing_behind(clips, tmp_path):
    with pytest.raises(FoleyError, match="1 of 1 clips can be used, and a test needs two"):
        make_study("ours", clips / "videos", tmp_path / "t", 1, clips / "sounds")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_answers_is_never_replaced(clips, made):
    before = sorted(p.name for p in made.iterdir())
    with pytest.raises(FoleyError, match="exists already"):
        make_study("ours", clips / "videos", made, 3, clips / "sounds")
    assert sorted(p.name for p in made.iterdir()) == before


def test_what_lacks_is_generated(tmp_path, monkeypatch, clips):
    from smooth_foley.compare import evaluate

    asked = []

    def generate(systems, split, out, only, n, **how):
        asked.append((systems, only, n))
        shutil.copytree(clips / "sounds" / "ours", out / "text")

    monkeypatch.setattr(evaluate, "evaluate", generate)
    shutil.copytree(clips / "sounds", tmp_path / "sounds")
    study = make_study("ours,text", clips / "videos", tmp_path / "t", 3, tmp_path / "sounds")
    assert asked == [(["text"], "generate", 3)] and study.systems == ["ours", "text"]


# ---- Answers --------------------------------------------------------------------------------------------------------


def answers_of(study, listener, by="page", token="t", value=5):
    found = new_answers(study.id, listener, token, by)
    values = dict(real=9, another=2)
    for k, (clip, version) in enumerate(session(study, listener)):
        ratings = dict.fromkeys(("semantic", "temporal", "quality"), values.get(version, value))
        found["answers"].append(dict(trial=k, file=study.file(clip, version), ratings=ratings))
    return found


def test_nobody_has_listened(made, capsys):
    for words in ([made], [made / "*.json"]):
        assert run(capsys, "listen", "score", *words) == (0, NO_RATINGS + "\n", "")
    write_answers(made, answers_of(read_key(key_path(made)), 1, "simulation"))
    code, out, _ = run(capsys, "listen", "score", made)
    assert code == 0 and out.startswith(NO_RATINGS) and "paper" not in out


def test_simulated_sessions_do_not_mix_with_people(made):
    study = read_key(key_path(made))
    write_answers(made, answers_of(study, 1, "simulation"))
    write_answers(made, answers_of(study, 2))
    r = read_ratings(find_answers([made]), study)
    assert (r.listeners, r.simulated, r.notes) == (["2"], False, ["1 simulated sessions are left out"])


HOSTILE = {  # name: what is changed in a file that is right
    "a list": lambda a: [],
    "no answers": lambda a: a | dict(answers=None),
    "answers of words": lambda a: a | dict(answers=["yes"]),
    "ratings of words": lambda a: a | dict(answers=[dict(trial=0, file="x", ratings="good")]),
    "another study": lambda a: a | dict(study="0" * 12),
    "a listener too many": lambda a: a | dict(listener=99),
    "a word for the listener": lambda a: a | dict(listener="me"),
    "a number changed": lambda a: (
        a | dict(answers=[a["answers"][0] | dict(ratings=dict(semantic=1)), *a["answers"][1:]])
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_do_not_count(name, made, capsys):
    study = read_key(key_path(made))
    write_answers(made, answers_of(study, 1))
    right = json.loads(write_answers(made, answers_of(study, 2)).read_text())
    (made / "listener-02-t.json").write_text(json.dumps(HOSTILE[name](right)))
    r = read_ratings(find_answers([made]), study)
    assert r.listeners == ["1"] and len(r.notes) == 1 and r.notes[0].startswith("listener-02-t.json is left out: ")
    code, out, _ = run(capsys, "listen", "score", made)
    assert code == 0 and r.notes[0] in out


def test_odd_values_are_counted_one_by_one(made):
    study = read_key(key_path(made))
    found = answers_of(study, 1)
    odd = [0, 11, -3, 5.5, float("nan"), True, "7", None, 10**30, [5]]
    for a, value in zip(found["answers"], odd):
        a["ratings"]["quality"] = value
    write_answers(made, found)
    r = read_ratings(find_answers([made]), study)
    assert r.notes == ["listener 1: 10 ratings are no whole numbers from 1 to 10, left out"]
    assert np.isfinite(r.first[..., :2]).all()


def test_an_edited_file_counts_if_asked_to(made):
    study = read_key(key_path(made))
    path = write_answers(made, answers_of(study, 1))
    path.write_text(path.read_text().replace('"quality": 5', '"quality": 6'))
    assert not read_ratings([path], study).listeners
    assert score(read_ratings([path], study, ("edited",)), ("unreliable",)).means[2]["mean"] == 6


def test_exchanged_files_are_found(made, capsys):
    study = read_key(key_path(made))
    write_answers(made, answers_of(study, 1))
    one, other = (made / study.file("one", s) for s in ("ours", "foleycrafter"))
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    code, out, _ = run(capsys, "listen", "score", made, "--keep", "unreliable")
    assert code == 0 and out.count("its ratings are left out") == 2
    assert f"{one.name} (ours, clip one) is the file of foleycrafter, clip one" in out


def test_nothing_that_counts_is_one_line(made, capsys):
    (made / "a.json").write_text("{")
    code, out, err = run(capsys, "listen", "score", made)
    assert (code, out, err.count("\n")) == (2, "", 1) and "a.json is left out: is cut short" in err
    code, out, err = run(capsys, "listen", "score", made / "a.json", "--key", made / "none.json")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no such key" in err
