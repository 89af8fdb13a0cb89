"Every end of a command: its code and one line, whatever breaks and whenever"

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smooth_foley.app.exits import exit_code
from smooth_foley.core import FoleyError, PartlyDone

COMMAND = [sys.executable, "-m", "smooth_foley"]
needs_proc = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def shell(words, end="", **env):
    "A command with its output sent somewhere"
    line = [sys.executable if w == "python" else w for w in words]
    said = ["sh", "-c", f'"$@" {end}', "sh", *line]
    return subprocess.run(said, capture_output=True, text=True, env={**os.environ, **env}, timeout=600)


@needs_proc
@pytest.mark.parametrize("words", [["labels"], ["--help"], ["generate", "--help"], ["--version"]])
@pytest.mark.parametrize("end", [">/dev/full", ">&-", ">&- 2>&-", "2>&-", "2>/dev/full"])
def test_a_closed_or_full_output_is_one_line(words, end):
    r = shell([*COMMAND, *words], end)
    full = ">/dev/full" in end and "2>" not in end
    assert r.returncode == (2 if full and words == ["labels"] else 0), r.stderr
    assert "Traceback" not in r.stderr and "Exception" not in r.stderr and r.stderr.count("\n") <= 1


def test_a_name_that_no_terminal_shows(tmp_path):
    name = os.fsdecode(b"caf\xe9 \x1b[2J.mp4")
    for encoding in ("utf-8", "ascii", "latin-1"):
        r = shell([*COMMAND, "generate", tmp_path / name], PYTHONIOENCODING=encoding)
        assert r.returncode == 2 and r.stderr.count("\n") == 1 and "\x1b" not in r.stderr, r.stderr


def test_a_figure_needs_no_window():
    code = "import sys; from smooth_foley.app.main import main; sys.argv[1:] = ['labels']; main()"
    draw = "import matplotlib.pyplot as plt; plt.figure()"
    for backend in ("nonsense", "TkAgg"):
        r = shell(["python", "-c", f"{code}; {draw}"], MPLBACKEND=backend)
        assert r.returncode == 0, r.stderr


FAILS = {
    1: PartlyDone("2 of 3 failed"),
    2: FoleyError("x: is empty"),
    130: KeyboardInterrupt(),
    141: BrokenPipeError(),
    70: KeyError("nobody foresaw this\nat all"),
}


@pytest.mark.parametrize("code", FAILS)
def test_codes(code, capsys):
    def fail():
        raise FAILS[code]

    assert exit_code(fail) == code
    assert capsys.readouterr().err.count("\n") == (code != 141)


@pytest.mark.parametrize(
    "e",
    [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_is_said(e, capsys):
    def fail():
        raise e

    assert exit_code(fail) == 2 and "memory is used up" in capsys.readouterr().err


def test_memory_really_used_up(capsys):
    import torch

    assert exit_code(lambda: torch.empty(2**48)) == 2 and "memory is used up" in capsys.readouterr().err


SLOW = """
import signal, sys, time
from concurrent.futures import process, wait
from smooth_foley.app.exits import exit_code
from smooth_foley.core import FoleyError
from smooth_foley.data.workers import worker_pool

def work():
    with worker_pool(2) as pool:
        print("begun", flush=True)
        wait([pool.submit(time.sleep, 60), pool.submit(time.sleep, 60)])

class Cleans:
    def __del__(self):
        print("begun", flush=True)
        time.sleep(5)

def clean():
    Cleans()
    time.sleep(60)

def wakeup_late(self):
    if not self._closed:
        time.sleep(0.3)
        self._writer.send_bytes(b"")

def fail():
    process._ThreadWakeup.wakeup = wakeup_late
    with worker_pool(1) as pool:
        pool.submit(time.sleep, 60)
        raise FoleyError("x: is empty")

def deafen():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

def deaf():
    with worker_pool(1) as pool:
        pool.submit(deafen).result()
        pool.submit(time.sleep, 60)
        time.sleep(1)
        raise FoleyError("x: is empty")

if __name__ == "__main__":
    sys.exit(exit_code(dict(work=work, clean=clean, fail=fail, deaf=deaf)[sys.argv[1]]))
"""


def heeds_ctrl_c():
    "What a shell starts in the background ignores Ctrl-C, and so would its children"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(words, when, **kw):
    "Send Ctrl-C to all processes of a terminal: seconds it took, exit code, what was said"
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    p = subprocess.Popen(words, preexec_fn=heeds_ctrl_c, **how, **kw)
    when(p)
    os.killpg(p.pid, signal.SIGINT)
    start = time.time()
    _, said = p.communicate(timeout=600)
    return time.time() - start, p.returncode, said


@pytest.mark.parametrize("what", ["work", "clean"])
def test_ctrl_c_ends_workers_and_cleaning_without_a_trace(tmp_path, what):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    late, code, said = interrupted([sys.executable, str(script), what], lambda p: p.stdout.readline())
    assert (code, said) == (130, "smooth-foley: interrupted\n") and late < 30


def test_a_pool_that_failed_has_closed_its_pipes_before_the_interpreter_ends(tmp_path):
    "Else its thread may close the pipe between the interpreter's look and its last write to it"
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    r = shell(["python", script, "fail"])
    assert (r.returncode, r.stderr) == (2, "smooth-foley: error: x: is empty\n")


def test_a_worker_that_does_not_hear_is_ended(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    start = time.time()
    r = shell(["python", script, "deaf"])
    assert (r.returncode, r.stderr) == (2, "smooth-foley: error: x: is empty\n")
    assert time.time() - start < 30


@pytest.mark.parametrize("after", [0.5, 1.5, 4.0])
def test_ctrl_c_while_it_is_imported_or_at_work(tmp_path, after):
    def begun(p):
        "The interpreter itself has started"
        while b"smooth_foley" not in Path(f"/proc/{p.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        time.sleep(after)

    words = [*COMMAND, "data", "shards", "passby:0-63", "--out", str(tmp_path / "s"), "--processes", "2"]
    _, code, said = interrupted(words, begun, env={**os.environ, "IN_TEST": "1"})
    assert (code, said) == (130, "smooth-foley: interrupted\n")
    assert not list(tmp_path.rglob(".*.part*"))
