"""Multi-scene models, their PAEs and their refinement, on small layouts of two scenes."""
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fails_here, run_here, weights_of, write_labels, write_scene
from transforms3d.quaternions import qconjugate, qmult

from datasets.camera_poses import CameraPoseDataset
from datasets.pose_pairs import PosePairs, overlapping
from datasets.transforms import to_input
from models import SOLVERS, SOLVERS_WITH_NOISE
from models.iapr import IAPR
from util.config import Config, load_config

POSE = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]

SMALL_TRANSFORMER = [f"num_{branch}_{part}_layers=1" for branch in ("t", "rot") for part in ("encoder", "decoder")]


@pytest.fixture(scope="module")
def layout(tmp_path_factory, small_frames):
    """Two scenes of six training and three test frames, and label files of both and of each alone."""
    root = tmp_path_factory.mktemp("multi")
    rows = {scene: write_scene(root, scene, 6, "train") for scene in ("attic", "cellar")}
    write_labels(root / "both.csv", rows["attic"] + rows["cellar"])
    for scene in rows:
        write_labels(root / f"{scene}.csv", rows[scene])
        write_labels(root / f"{scene}_test.csv", write_scene(root, scene, 3, "test"))
    return root


def arguments(layout, mode, labels, *more, model="ems-transposenet", config=ROOT / "config.json"):
    return [model, mode, "none", layout, layout / labels, config, *more, "--output_dir", layout / "out",
            "--set", "num_scenes=2", "n_epochs=1", "n_workers=0", "batch_size=6", *SMALL_TRANSFORMER]


def predict(layout, script, labels, *more, mode="test"):
    """Run a test; returns what was printed, and the predictions."""
    output = run_here(script, *arguments(layout, mode, labels, *more), "--predictions_path", layout / "predicted.csv")
    return output, pd.read_csv(layout / "predicted.csv")


def scenes_in_json(weights):
    return json.loads(weights.with_suffix(".json").read_text())["scene_names"]


@pytest.fixture(scope="module")
def apr(layout):
    """The weights of an EMS-TransPoseNet trained on both scenes."""
    listed = arguments(layout, "train", "both.csv")
    return weights_of(run_here("main.py", *listed, "equalize_scenes=true", "n_epochs=2"))


@pytest.fixture(scope="module")
def pae(layout, apr):
    """The weights of the APR's PAE."""
    return weights_of(run_here("main_learn_multiscene_pose_encoding.py", *arguments(layout, "train", "both.csv", apr)))


@pytest.fixture(scope="module")
def in_cellar(layout, apr):
    """What a test of the APR on cellar.csv printed, and its predictions."""
    return predict(layout, "main.py", "cellar.csv", "--checkpoint_path", apr)


def test_one_scene_alone_keeps_its_index(layout, apr, in_cellar):
    assert scenes_in_json(apr) == ["attic", "cellar"]
    _, both = predict(layout, "main.py", "both.csv", "--checkpoint_path", apr)
    # One scene alone is still scene 1 of the model; the names come from the JSON beside the weights.
    output, alone = in_cellar
    assert alone["predicted_scene"].tolist() == both["predicted_scene"].tolist()[6:]
    accuracy = 100 * (alone["predicted_scene"] == "cellar").mean()
    assert f"Scene accuracy: {accuracy:.1f}%" in output
    assert "Scene cellar (index 1): 6 frames, median " in output


def test_predict_gives_the_scenes_and_poses_of_a_test(layout, apr, in_cellar):
    _, tested = in_cellar
    listed = arguments(layout, "predict", "-", "--checkpoint_path", apr, "--predictions_path", layout / "images.csv")
    listed[3:5] = [layout / "cellar" / "seq-train", "-"]
    output = run_here("main.py", *listed)
    table = pd.read_csv(layout / "images.csv")
    assert table["predicted_scene"].tolist() == tested["predicted_scene"].tolist() and "Scenes: " in output
    assert table["scene_probability"].between(0.5, 1).all()  # the likelier of two
    assert np.allclose(table.loc[:, "t1":"q4"], tested.loc[:, "t1":"q4"], atol=1e-5)


def test_scene_names_of_set_win_over_the_json_and_these_over_a_presets(layout, apr, in_cellar):
    _, tested = in_cellar
    config = json.loads((ROOT / "config.json").read_text())
    config["presets"]["other"] = {"scene_names": ["cellar", "attic"], "ems-transposenet": {}}
    (layout / "preset.json").write_text(json.dumps(config))
    listed = arguments(layout, "test", "cellar.csv", "--checkpoint_path", apr, "--preset", "other",
                       config=layout / "preset.json")
    for given, index, line in (
            ([], 1, f"Scenes: attic, cellar, as the JSON beside {apr} says; not cellar, attic, as the preset or the "
                    "config\n"),
            (['scene_names=["cellar", "attic"]'], 0, "Scenes: cellar, attic, as --set says; not attic, cellar, as the "
                                                     f"JSON beside {apr}\n")):
        output = run_here("main.py", *listed, *given)
        assert output.count(line) == 1 and f"Scene cellar (index {index}): " in output
        accuracy = 100 * (tested["predicted_scene"] == ("cellar" if index else "attic")).mean()
        assert f"Scene accuracy: {accuracy:.1f}%" in output


def test_a_pae_is_tested_in_the_scenes_that_its_apr_predicts(layout, apr, pae, in_cellar):
    assert pae.name.endswith("_pose_encoder_final.pth") and scenes_in_json(pae) == ["attic", "cellar"]
    output, table = predict(layout, "main_learn_multiscene_pose_encoding.py", "cellar.csv", apr,
                            "--encoder_checkpoint_path", pae)
    assert table["predicted_scene"].tolist() == in_cellar[1]["predicted_scene"].tolist()
    assert "The APR's own median: " in output and "Scene cellar (index 1): 6 frames" in output


def test_a_refiner_trains_and_is_tested(layout, apr, pae):
    refiner = weights_of(run_here("main_refine_apr.py", *arguments(layout, "train", "both.csv", apr, pae)))
    assert refiner.name.endswith("_rpr_final.pth")
    output, table = predict(layout, "main_refine_apr.py", "cellar_test.csv", apr, pae, "--rpr_checkpoint_path", refiner)
    assert "The APR's own median: " in output and len(table) == 3


def test_frames_in_a_scene_without_references_keep_the_aprs_pose(layout, apr, pae):
    _, of_apr = predict(layout, "main.py", "cellar_test.csv", "--checkpoint_path", apr)
    # References of the scene that the first frame is not predicted in; a row makes both scenes the label file's.
    references = "attic" if of_apr["predicted_scene"].iloc[0] == "cellar" else "cellar"
    labels = (layout / "cellar_test.csv").read_text()
    first_in_attic = labels.splitlines()[1].replace("cellar,", "attic,", 1)
    (layout / "scene_of_both.csv").write_text(f"{labels}{first_in_attic}\n")
    listed = [*arguments(layout, "optimize", "scene_of_both.csv", apr, pae), 'scene_names=["attic", "cellar"]',
              "--ref_poses_file", layout / f"{references}.csv", "--predictions_path", layout / "refined.csv"]
    for solver in (solver for solver in SOLVERS if solver != "kernel"):  # which takes no references
        output = run_here("main_refine_apr.py", *listed, "--solver", solver)
        table = pd.read_csv(layout / "refined.csv")
        kept = np.isclose(table[["apr_t1", "apr_t2", "apr_t3"]], table[["t1", "t2", "t3"]], atol=1e-6).all(axis=1)
        # Six references are too few for the first two solvers.
        without = (table["predicted_scene"] != references) | (solver in SOLVERS_WITH_NOISE)
        assert (kept == without).all() and f"{kept.sum()} frames keep the APR's pose" in output
        assert output.count("Median pose error") == 1 and "Change of the median position error: " in output
    assert "frames keep the APR's pose" in output
    assert table.loc[0, "t1":"q4"].tolist() == pytest.approx(of_apr.loc[0, "t1":"q4"].tolist(), abs=1e-5)


def test_iapr_refines_the_aprs_poses_of_its_scene(layout, apr):
    torch.manual_seed(0)
    config = Config({**load_config(ROOT / "config.json", "ems-transposenet"), "num_scenes": 2,
                     **{setting.split("=")[0]: 1 for setting in SMALL_TRANSFORMER}})
    iapr = IAPR(config)
    torch.save(iapr.state_dict(), layout / "iapr.pth")
    tables = []
    for n in (0, 1):
        output = run_here("main_refine_apr.py", *arguments(layout, "test", "both.csv", apr, "none"),
                          f"num_iterations={n}", "--rpr_checkpoint_path", layout / "iapr.pth",
                          "--predictions_path", layout / "refined.csv")
        assert "No novelty: there is no PAE none" in output and "Performance of " in output
        tables.append(pd.read_csv(layout / "refined.csv"))
    still, once = tables
    of_apr = [f"apr_{column}" for column in POSE]
    assert np.allclose(still[POSE], still[of_apr], atol=1e-5) and np.allclose(once[of_apr], still[of_apr], atol=1e-5)
    # One step by hand, for the first frame.
    dataset = CameraPoseDataset(layout, layout / "both.csv")
    pose = torch.tensor(still[POSE].to_numpy()[:1], dtype=torch.float32)
    scene = torch.tensor([["attic", "cellar"].index(still["predicted_scene"][0])])
    with torch.no_grad():
        relative = iapr.eval()(to_input(dataset[0]["img"][None]), scene, pose)[0].double().numpy()
    assert once[POSE[:3]].to_numpy()[0] == pytest.approx(pose[0, :3].numpy() - relative[:3], abs=1e-4)
    turned = qmult(pose[0, 3:].numpy(), qconjugate(relative[3:] / np.linalg.norm(relative[3:])))
    assert abs(turned @ once[POSE[3:]].to_numpy()[0]) == pytest.approx(1, abs=1e-5)
    status, line = fails_here("main_refine_apr.py", *arguments(layout, "test", "both.csv", apr, "none"),
                              "num_scenes=3", "--rpr_checkpoint_path", layout / "iapr.pth")
    assert status == 2 and "num_scenes" in line


def test_iapr_learns_relative_poses_and_writes_the_published_keys(layout, apr):
    listed = arguments(layout, "train", "both.csv", apr, "none", "--method", "iapr", "--val_labels_file",
                       layout / "cellar_test.csv")
    output = run_here("main_refine_apr.py", *listed, 'scene_names=["attic", "cellar"]', "n_epochs=8", "lr=1e-3",
                      "average_last=0", "no_augment=true", "learnable=false", "s_x=1", "s_q=1")
    losses = [float(loss) for loss in re.findall(r"running camera pose loss: (-?[\d.]+)", output)]
    assert losses[-1] < losses[0] and output.count("Validation after epoch") == 8
    weights = weights_of(output)
    index = json.loads((ROOT / "tests" / "golden" / "index.json").read_text())["models"]["iapr"]["state_dict"]
    published = {key for key in index if ".layers." not in key or ".layers.0." in key or key.startswith("rpr_")}
    assert set(torch.load(weights)) == published
    run_here("main_refine_apr.py", *arguments(layout, "test", "both.csv", apr, "none"), "--rpr_checkpoint_path",
             weights, "--predictions_path", layout / "iapr.csv")
    assert np.isfinite(pd.read_csv(layout / "iapr.csv")[POSE]).all(axis=None)


def test_pairs_are_of_one_scene_and_near_where_any_are(layout):
    random = np.random.default_rng(0)
    poses = np.concatenate((random.uniform(0, 4, (200, 3)) * [1, 1, 0], np.tile((1.0, 0, 0, 0), (200, 1))), axis=1)
    poses[::2, 3:] = 0.7, 0, 0.7, 0  # turned by a right angle
    scenes = np.repeat([0, 1], 100)
    for i in (3, 150):
        others = overlapping(poses, scenes, i)
        assert i not in others and (scenes[others] == scenes[i]).all() and 0 < len(others) < 60
        assert all(np.linalg.norm(poses[j, :3] - poses[i, :3]) < 1.2 and j % 2 == i % 2 for j in others)
    poses[3, :3] = 100  # with no neighbour, any other of the scene
    assert len(overlapping(poses, scenes, 3)) == 99
    dataset = PosePairs(layout, layout / "both.csv", seed=1)
    others = [tuple(dataset[(epoch, 0)]["other"].tolist()) for epoch in range(20)]
    assert len(set(others)) > 1 and others == [tuple(dataset[(epoch, 0)]["other"].tolist()) for epoch in range(20)]
    assert all(any(np.allclose(other, pose) for pose in dataset.poses[1:6].numpy()) for other in others)


def test_freezing_all_but_a_branch_trains_its_heads_alone(layout):
    listed = arguments(layout, "train", "both.csv", model="ms-transposenet")
    ms = weights_of(run_here("main.py", *listed))
    tuned = weights_of(run_here("main.py", *listed, "--checkpoint_path", ms, "--set", "freeze=true",
                                'freeze_exclude_phrase=["regressor_head_t", "transformer_t"]', "learnable=false",
                                "s_x=1", "s_q=0"))
    before, after = torch.load(ms), torch.load(tuned)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("regressor_head_t.") for key in changed)
