"A small part of what tests/fuzz_run.py tries"

import fuzz_run


def test_damaged_inputs_are_answered(tmp_path):
    assert fuzz_run.fuzz(tmp_path / "originals", 60, seed=1) == []
