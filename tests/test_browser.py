"Notebooks as a person meets them: JupyterLab in a real browser, started the way `make lab` starts it"

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from smooth_foley.media import SR, read_audio

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytest.importorskip("jupyterlab", reason="no jupyterlab")
ASKED = os.environ.get("LAB_TESTS")  # JupyterLab takes minutes, and its patience with a busy machine is short
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium"),
    pytest.mark.skipif(not ASKED, reason="slow: LAB_TESTS=1 pytest tests/test_browser.py"),
]
PICTURES = os.environ.get("SMOOTH_FOLEY_SCREENSHOTS")  # Folder for screenshots, to be looked at
MINUTES = 8 * 60 * 1000  # Patience for a busy machine, milliseconds


def lab_words():
    "Options of `jupyter lab` in the Makefile"
    line = re.search(r"/jupyter lab (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    return shlex.split(line.replace("$(CURDIR)", "."))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of what the pages show and link to, so that nothing here is saved into"
    folder = tmp_path_factory.mktemp("lab") / "smooth_foley"
    folder.mkdir()
    for name in ("nbs", "data_cards", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_proc"))
    for path in [*ROOT.glob("*.md"), ROOT / "settings.ini", ROOT / "LICENSE"]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def lab(checkout):
    "The address of a JupyterLab"
    port, token = 18000 + os.getpid() % 2000, "for-this-test"
    quiet = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(checkout.parent / "config")}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        quiet.append("--allow-root")
    command = [sys.executable, "-m", "jupyterlab", *lab_words(), *quiet]
    with open(checkout.parent / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=checkout, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (checkout.parent / "lab.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def picture(page, name):
    "Keep a screenshot if a person wants to look"
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


@pytest.fixture
def page(browser, request):
    page = browser.new_page(viewport=dict(width=1200, height=1000))
    page.set_default_timeout(MINUTES)
    yield page
    picture(page, f"{request.node.name}-end")
    page.close()


def errors(page):
    return page.locator('[data-mime-type="application/vnd.jupyter.error"]').count()


def run_all(page, address, wanted):
    """Open a notebook and choose Run All Cells, as a person does, until an output is there.

    A kernel whose connection breaks while it starts, as on a machine that is too busy, forgets what it was to run: no
    cell is waiting then, and one asks again.
    """
    page.goto(address)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("| Idle").first.wait_for()
    patience = time.monotonic() + MINUTES / 1000
    while time.monotonic() < patience and not errors(page):
        if not page.locator(".jp-InputPrompt", has_text="*").count():
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        with contextlib.suppress(playwright.TimeoutError):
            return wanted.wait_for(timeout=60_000)
    raise AssertionError("the output did not come: " + page.locator(".jp-Notebook").inner_text()[-2000:])


def test_the_reviewer_shows_its_buttons_after_run_all(page, lab):
    box = page.locator(".jp-OutputArea-output .widget-vbox", has=page.get_by_role("button", name="keep"))
    run_all(page, lab.format("nbs/app/97_review.ipynb"), box)
    box.get_by_text("1 of 2").scroll_into_view_if_needed()
    for name in ("keep", "drop", "back"):
        assert box.get_by_role("button", name=name, exact=True).is_visible()
    assert box.locator("video").is_visible() and box.locator("img").is_visible()
    page.wait_for_function("() => [...document.querySelectorAll('video')].some(v => v.readyState > 1)")
    picture(page, "reviewer")
    assert not errors(page)
    box.get_by_role("button", name="drop", exact=True).click()
    box.get_by_text("2 of 2").wait_for()
    box.get_by_role("button", name="keep", exact=True).click()
    box.get_by_text("2 of 2 reviewed").wait_for()
    assert not box.locator("video").is_visible() and not box.locator("img").is_visible()
    picture(page, "reviewed")


def shown(box, label):
    "The field beside a label"
    return box.get_by_label(label, exact=True).first


def test_the_studio_from_a_label_to_a_file(page, lab, tmp_path):
    page.set_viewport_size(dict(width=1500, height=1500))
    playwright.expect.set_options(timeout=MINUTES)
    button = page.get_by_role("button", name="generate", exact=True)
    box = page.locator(".jp-OutputArea-output > .lm-Widget.widget-vbox", has=button).last
    run_all(page, lab.format("nbs/app/98c_studio.ipynb"), box)
    assert button.is_disabled() and box.locator("video").is_visible()
    box.get_by_role("button", name=re.compile(r"\(\d+%\)")).first.click()
    when = shown(box, "sounds at")
    when.wait_for()
    box.locator("img").first.scroll_into_view_if_needed()
    picture(page, "studio-row")
    when.fill("4-5")
    when.press("Enter")
    upper = box.locator(".widget-vbox .noUi-handle-upper")
    playwright.expect(upper).to_have_count(1)
    upper.focus()
    for _ in range(50):
        upper.press("ArrowRight")
    playwright.expect(when).not_to_have_value("4-5")
    start, end = map(float, when.input_value().split("-"))
    assert start == 4 and end > 5
    shown(box, "takes").fill("2")
    shown(box, "takes").press("Enter")
    button.click()
    playwright.expect(box.get_by_role("button", name="stop", exact=True)).to_be_enabled()
    box.get_by_text("in time").nth(1).wait_for()
    playwright.expect(button).to_be_enabled()
    page.wait_for_function("() => [...document.querySelectorAll('audio, video')].every(v => v.readyState > 1)")
    assert box.locator("audio").count() == 2
    picture(page, "studio-takes")
    shown(box, "write to").fill(str(tmp_path / "film.mp4"))
    shown(box, "write to").press("Enter")
    box.get_by_role("button", name="export", exact=True).click()
    box.get_by_text("wrote").wait_for()
    box.get_by_text("smooth-foley generate").scroll_into_view_if_needed()
    picture(page, "studio-exported")
    audio = read_audio(tmp_path / "film.mp4")
    outside = max(level(audio, 0, 3.5), level(audio, end + 0.3, 10))
    assert level(audio, start + 0.1, end - 0.1) > outside + 6
    assert not errors(page)


@pytest.fixture
def app(tmp_path):
    "`smooth-foley studio` on a video: its process, and the address that it says"
    pytest.importorskip("voila", reason="no voila: pip install -e '.[studio]'")
    port, log = 20000 + os.getpid() % 2000, tmp_path / "app.log"
    video = shutil.copy(ROOT / "smooth_foley" / "assets" / "sample.mp4", tmp_path / "sample.mp4")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-u", "-m", "smooth_foley", "studio", str(video), f"--port={port}"]
    with open(log, "w") as out:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out)
    try:
        while "running at" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield server, re.search(r"open (http\S+)", log.read_text())[1]
    finally:
        server.terminate()
        server.wait(60)


def test_the_studio_as_an_app_has_one_model_for_all_pages(app, page, browser, tmp_path):
    import psutil

    server, address = app
    playwright.expect.set_options(timeout=MINUTES)
    refused = page.goto(address.split("?")[0])
    assert refused.status == 403 or "login" in page.url
    page.goto(address)
    label = page.get_by_role("button", name=re.compile(r"\(\d+%\)")).first
    playwright.expect(label).to_be_enabled()
    label.click()
    shown(page, "takes").fill("1")
    shown(page, "takes").press("Enter")
    page.get_by_role("button", name="generate", exact=True).click()
    page.get_by_text("in time").first.wait_for()
    picture(page, "studio-app")
    other = browser.new_page()
    other.goto(address)
    again = other.get_by_role("button", name=re.compile(r"\(\d+%\)")).first
    playwright.expect(again).to_be_enabled(timeout=MINUTES)
    assert other.get_by_text("in time").count() == 0
    other.close()
    kernels = [p for p in psutil.Process(server.pid).children(recursive=True) if "ipykernel" in " ".join(p.cmdline())]
    assert len(kernels) == 1
    page.get_by_role("button", name="export", exact=True).click()
    page.get_by_text("wrote").wait_for()
    assert (tmp_path / "sample_foley.mp4").is_file()


def level(audio, start, end):
    return 10 * np.log10(np.mean(audio[round(start * SR) : round(end * SR)].astype(float) ** 2) + 1e-12)


def test_lab_opens_at_the_root_so_that_links_work(page, lab):
    page.goto(lab.format("nbs/index.ipynb"))
    link = page.get_by_role("link", name="how to change one")
    link.scroll_into_view_if_needed()
    picture(page, "index")
    link.click()
    page.get_by_role("tab", name="CONTRIBUTING.md").wait_for()
    page.get_by_text("How the repository is laid out").first.wait_for()
