"""A sample of damaged inputs; `python -m bench.survival damage` runs more."""
from bench import damage


def test_damaged_files_end_in_a_clear_line_or_do_no_harm(tmp_path):
    result = damage.run_all(tmp_path, 36, seed=1)
    assert all(sum(result[kind].values()) == 3 for kind in damage.KINDS)
    assert all("finished" in result[kind] for kind in ("newest state", "cached frames"))  # there is another way to go on
