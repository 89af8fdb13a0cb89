"""Keep notebooks, modules and README.md one thing.

python tools/nbs.py check    nbdev_export and nbdev_clean change nothing, and README.md is the export of nbs/index.ipynb
python tools/nbs.py test     run every notebook (one process each, with its CUDA cells, where a GPU is there)
python tools/nbs.py readme   write README.md from nbs/index.ipynb
"""

import base64
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "index_files"


def text_of(source):
    return source if isinstance(source, str) else "".join(source)


def directives(source):
    "The `#| name` lines that open a cell, and the rest of it"
    lines, found = source.split("\n"), []
    while lines and (lines[0].startswith("#|") or not lines[0].strip()):
        line = lines.pop(0)
        if line.strip():
            found.append(line[2:].strip())
    return found, "\n".join(lines).rstrip()


def output_md(out, files):
    "One cell output as markdown; pictures are put into `files` under a numbered name"
    if out["output_type"] == "stream":
        return (
            "\n".join("    " + line for line in text_of(out["text"]).rstrip().split("\n"))
            if out["name"] == "stdout"
            else ""
        )
    data = out.get("data", {})
    if "image/png" in data:
        name = f"{FIGURES}/figure-{len(files) + 1}.png"
        files[name] = base64.b64decode(text_of(data["image/png"]))
        return f"![]({name})"
    if "text/markdown" in data:
        return from_the_root(text_of(data["text/markdown"]).strip())
    plain = text_of(data.get("text/plain", "")).rstrip()
    if not plain or re.match(r"^<(IPython|Axes|Figure|matplotlib)", plain):
        return ""
    return "\n".join("    " + line for line in plain.split("\n"))


def from_the_root(markdown):
    "Links that are relative to nbs/, as they work in Jupyter, relative to the repository's root"

    def moved(found):
        link = found[1]
        if "://" in link or link.startswith(("#", "mailto:", "/")):
            return found[0]
        return f"]({posixpath.normpath(posixpath.join('nbs', link))})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)


def readme_export(nb_path=ROOT / "nbs" / "index.ipynb"):
    "README.md as text, and its pictures as `{relative name: bytes}`"
    nb, parts, files = json.loads(Path(nb_path).read_text(encoding="utf-8")), [], {}
    for cell in nb["cells"]:
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(from_the_root(source.strip()))
            continue
        if cell["cell_type"] != "code":
            continue
        flags, code = directives(source)
        if any(f.split()[0] in ("hide", "default_exp", "notest_hide") for f in flags) or not code:
            continue
        if "echo: false" not in flags:
            parts.append(f"```python\n{code}\n```")
        if "output: false" not in flags:
            parts += [md for o in cell.get("outputs", []) if (md := output_md(o, files))]
    return "<!-- Written from nbs/index.ipynb; edit there, then `make readme`. -->\n\n" + "\n\n".join(
        p for p in parts if p
    ) + "\n", files


def write_readme():
    text, files = readme_export()
    shutil.rmtree(ROOT / FIGURES, ignore_errors=True)
    for name, data in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md written, {len(files)} pictures")


def readme_differs():
    "Names of the files of the README that are not what the notebook says"
    if not (ROOT / "nbs" / "index.ipynb").exists():
        return ["nbs/index.ipynb is missing"]
    text, files = readme_export()
    wanted = {"README.md": text.encode(), **files}
    old = {p.relative_to(ROOT).as_posix() for p in (ROOT / FIGURES).glob("*")} - set(files)
    return sorted(
        [n for n, b in wanted.items() if not (ROOT / n).is_file() or (ROOT / n).read_bytes() != b] + list(old)
    )


def snapshot(folder):
    "What export and clean may touch, as `{relative name: bytes}`"
    keep = [
        p
        for d in ("nbs", "smooth_foley")
        for p in (folder / d).rglob("*")
        if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts
    ]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in keep}


def export_differs():
    "Files that `nbdev_export` or `nbdev_clean` would change, tried on a copy"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp) / "smooth_foley"
        tmp.mkdir()
        before = snapshot(ROOT)
        for name, data in {**before, "settings.ini": (ROOT / "settings.ini").read_bytes()}.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(data)
        for cmd in ("nbdev_export", "nbdev_clean"):
            subprocess.run([cmd], cwd=tmp, check=True)
        after = snapshot(tmp)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def check():
    wrong = [f"{n}: nbdev_export or nbdev_clean changes it" for n in export_differs()]
    wrong += [f"{n}: differs from the export of nbs/index.ipynb (make readme)" for n in readme_differs()]
    for w in wrong:
        print(w)
    if wrong:
        sys.exit(1)
    print("notebooks, modules and README.md agree")


def has_cuda():
    return (
        subprocess.run([sys.executable, "-c", "import torch,sys; sys.exit(not torch.cuda.is_available())"]).returncode
        == 0
    )


def test():
    env = {**os.environ, "IN_TEST": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    books = sorted(p for p in (ROOT / "nbs").rglob("[!_]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if not books:
        sys.exit("no notebooks found under nbs/")
    if has_cuda():  # one process per notebook, so that none keeps another one's GPU memory
        env["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 as precise as on a CPU
        cmds = [["nbdev_test", "--path", str(p), "--n_workers", "0", "--do_print", "--flags", "cuda"] for p in books]
    else:
        cmds = [["nbdev_test", "--n_workers", "2", "--do_print"]]
    failed = [c for c in cmds if subprocess.run(c, cwd=ROOT, env=env).returncode]
    if failed:
        sys.exit("\n".join("failed: " + " ".join(c) for c in failed))
    print(f"{len(books)} notebooks ran")


if __name__ == "__main__":
    steps = {"check": check, "test": test, "readme": write_readme}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        sys.exit(__doc__)
    steps[sys.argv[1]]()
