"""Parts of label files, for experiments on less data."""
import pandas as pd
import pytest
from conftest import SHARED, run_module_here

from datasets import subset_labels

COLUMNS = "scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4"


def write(path, scenes):
    """Write a label file. scenes: {name: frames per sequence}."""
    rows = [f"{scene},train,seq-{i},{scene}/{i}/{j}.png,{j},0,0,1,0,0,0"
            for scene, sizes in scenes.items() for i, size in enumerate(sizes) for j in range(size)]
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")


@pytest.mark.parametrize("by", ["frames", "sequences"])
def test_every_scene_keeps_its_share(tmp_path, by):
    write(tmp_path / "all.csv", {"attic": [40] * 10, "cellar": [30] * 10, "loft": [2]})
    listed = [tmp_path / "all.csv", tmp_path / "part.csv", "--share", "0.3", "--by", by]
    status, output, _ = run_module_here(subset_labels, *listed)
    table, part = pd.read_csv(tmp_path / "all.csv"), pd.read_csv(tmp_path / "part.csv")
    n_loft = 1 if by == "frames" else 2  # at least one frame, or the only sequence
    assert status == 0 and part["scene"].value_counts().to_dict() == {"attic": 120, "cellar": 90, "loft": n_loft}
    assert f"attic 120 of 400, cellar 90 of 300, loft {n_loft} of 2" in output
    kept = table[table["img_path"].isin(part["img_path"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, kept, check_dtype=False)  # in their order
    whole = part.groupby(["scene", "seq"]).size()
    assert (by == "sequences") == (set(whole) <= {40, 30, 2})
    again, other = ((tmp_path / "again.csv", "0"), (tmp_path / "other.csv", "1"))
    for path, seed in (again, other):
        assert run_module_here(subset_labels, listed[0], path, *listed[2:], "--seed", seed)[0] == 0
    assert again[0].read_bytes() == (tmp_path / "part.csv").read_bytes() != other[0].read_bytes()


def test_the_unit_goes_with_the_part(tmp_path):
    write(tmp_path / "all.csv", {"attic": [20]})
    (tmp_path / "all.json").write_text('{"unit": "model units"}')
    assert run_module_here(subset_labels, tmp_path / "all.csv", tmp_path / "part.csv", "--share", "0.5")[0] == 0
    assert "model units" in (tmp_path / "part.json").read_text()


@pytest.mark.skipif(not (SHARED / "data" / "labels").is_dir(), reason="the published labels are not available")
def test_a_share_of_the_published_labels(tmp_path):
    published = SHARED / "data" / "labels" / "7scenes_all_scenes.csv"
    assert run_module_here(subset_labels, published, tmp_path / "part.csv", "--share", "0.3")[0] == 0
    sizes, parts = (pd.read_csv(path)["scene"].value_counts() for path in (published, tmp_path / "part.csv"))
    assert ((parts / sizes - 0.3).abs() < 1e-3).all() and len(parts) == 7


@pytest.mark.parametrize("more, words", [(["--share", "1"], "must be above 0 and below 1"),
                                         (["--share", "0.5", "--seed", "-1"], "must be at least 0")])
def test_mistakes_end_in_one_line(tmp_path, more, words):
    write(tmp_path / "all.csv", {"attic": [5]})
    status, _, errors = run_module_here(subset_labels, tmp_path / "all.csv", tmp_path / "part.csv", *more)
    assert status == 2 and words in errors and errors.count("\n") == 1 and not (tmp_path / "part.csv").exists()
    status, _, errors = run_module_here(subset_labels, tmp_path / "all.csv", tmp_path / "all.csv", "--share", "0.5")
    assert status == 2 and "stays as it is" in errors
