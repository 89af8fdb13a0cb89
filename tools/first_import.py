"""Import librosa's compiled parts once, alone.

numba compiles them at their first import and keeps them in two files each. Two processes that import them for the first
time at once can keep files that do not belong together; whoever loads these crashes (numba issue 10128).
"""

import importlib

for part in ("filters", "util.utils", "core.audio", "core.pitch", "core.spectrum"):
    importlib.import_module(f"librosa.{part}")
