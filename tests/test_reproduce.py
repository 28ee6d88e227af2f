"""The tables of `python reproduce.py`, on generated scenes under the published names."""
import contextlib
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_here, run_module_here, write_labels, write_scene

import reproduce
from datasets.official import DATASETS
from models import get_model
from models.checkpoints import save_weights
from models.pose_encoder import MultiScenePoseEncoder
from util.errors import UserError

SMALL = {"hidden_dim": 16, "nhead": 8, "dim_feedforward": 8,
         **{f"num_{branch}_{part}_layers": 1 for branch in ("t", "rot") for part in ("encoder", "decoder")}}


@pytest.fixture
def dataset(tmp_path):
    """Write scenes, label files, and the weights of an untrained APR and its PAE; returns the arguments."""
    def write(name, scenes, num_scenes):
        for scene in scenes:
            for split, n in (("train", 4), ("test", 3)):
                write_labels(tmp_path / "labels" / DATASETS[name].label_file(scene, split),
                             write_scene(tmp_path / "data", scene, n, split))
        torch.manual_seed(0)
        apr = get_model("ems-transposenet", "none", {**SMALL, "num_scenes": num_scenes})
        save_weights(tmp_path / "apr.pth", apr.state_dict(), {})
        save_weights(tmp_path / "pae.pth", MultiScenePoseEncoder(16, num_scenes).state_dict(), {})
        return [name, "--dataset_path", tmp_path / "data", "--labels_path", tmp_path / "labels",
                "--apr_checkpoint", tmp_path / "apr.pth", "--output_dir", tmp_path / "out"]
    return write


@pytest.fixture
def printed(monkeypatch):
    """Run the scripts within this process; returns a list of the medians that they print."""
    medians = []

    def run(script, *arguments, capture_errors):
        assert capture_errors
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                output = run_here(script.name, *arguments)
        except SystemExit as stopped:
            raise UserError(errors.getvalue().splitlines()[-1]) from stopped
        found = re.search(r"^Median pose error: ([\d.]+)\[m\], ([\d.]+)\[deg\]", output, flags=re.MULTILINE)
        medians.append(found.groups())

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "run_script", run)
    return medians


@pytest.mark.parametrize("name, tested", [("7Scenes", ["APR"]), ("CambridgeLandmarks", ["APR", "PAE", "refined"])])
def test_every_scene_has_the_medians_that_its_test_prints(dataset, printed, tmp_path, name, tested):
    scenes = list(DATASETS[name].scenes)
    there = scenes if name == "7Scenes" else scenes[:-1]
    arguments = dataset(name, there, len(scenes))
    if len(tested) > 1:
        arguments += ["--encoder_checkpoint", tmp_path / "pae.pth", "--solver", "mlp"]
    status, output, errors = run_module_here(reproduce, *arguments)
    assert not status, errors
    table = pd.read_csv(tmp_path / "out" / f"{name}.csv", index_col="scene")
    assert list(table.index) == [*there, "average"]
    for i, (scene, row) in enumerate(list(table.iterrows())[:-1]):
        for kind, medians in zip(tested, printed[i * len(tested):], strict=False):
            assert [f"{row[f'{kind} {unit}']:.3f}" for unit in ("m", "deg")] == list(medians)
            predictions = pd.read_csv(tmp_path / "out" / f"{name}_{scene}_{kind.lower()}.csv")
            labels = pd.read_csv(tmp_path / "labels" / DATASETS[name].label_file(scene, "test"))
            position = ["t1", "t2", "t3"]
            errors = np.linalg.norm(predictions[position] - labels[position], axis=1)
            assert np.isclose(row[f"{kind} m"], np.median(errors), atol=1e-5)
        for unit, published in zip(("m", "deg"), DATASETS[name].medians[scene]):
            assert row[f"published {unit}"] == published
            assert np.isclose(row[f"difference {unit}"], row[f"APR {unit}"] - published)
    assert len(printed) == len(tested) * len(there)
    assert np.allclose(table.loc["average"], table.iloc[:-1].mean())
    text = (tmp_path / "out" / f"{name}.md").read_text()
    more = " PAE | refined |" if len(tested) > 1 else ""
    assert text in output and text.startswith(f"| scene | published | APR | difference |{more}\n")
    assert ("Not on disk, and not in the average: StMarysChurch" in text) == (name == "CambridgeLandmarks")


def test_what_cannot_be_reproduced_is_named(dataset, printed, tmp_path):
    def refused(*arguments):
        status, _, errors = run_module_here(reproduce, *arguments)
        assert status == 2 and errors.count("\n") == 1
        return errors

    arguments = dataset("7Scenes", ["chess"], 4)
    said = refused(*arguments)
    assert "chess, APR: main.py: error: " in said and "num_scenes 4, but the config says 7" in said
    (tmp_path / "apr.json").write_text('{"scene_names": ["KingsCollege", "OldHospital"]}')
    assert ("apr.pth: trained on KingsCollege, OldHospital, as the JSON beside it says, not on chess"
            in refused(*arguments))
    (tmp_path / "apr.json").unlink()
    assert "no scene of CambridgeLandmarks exists there" in refused("CambridgeLandmarks", *arguments[1:])
    assert "--solver needs --encoder_checkpoint" in refused(*arguments, "--solver", "mlp")
    with_pae = [*arguments, "--encoder_checkpoint", tmp_path / "pae.pth", "--solver", "linear"]
    assert ("pae.pth: does not hold the covariance of latents that linear works with; choose --solver mlp or simplex"
            in refused(*with_pae))
    assert "does not hold the memory of training frames that kernel works with" in refused(*with_pae[:-1], "kernel")
    with_pae[with_pae.index(tmp_path / "pae.pth")] = tmp_path / "apr.pth"
    assert "apr.pth: weights of ems-transposenet, but a PAE's are needed" in refused(*with_pae)
    assert "a checkpoint of multi-scene PAE, but an APR's is needed" in refused(*arguments[:6], tmp_path / "pae.pth")
    posenet = get_model("posenet", "none", {"hidden_dim": 8, "backbone_type": "mobilenet"})
    torch.save(posenet.state_dict(), tmp_path / "posenet.pth")
    assert ("a model of one scene; give the path of each scene's with {scene}"
            in refused(*arguments[:6], tmp_path / "posenet.pth"))
    assert not list((tmp_path / "out").glob("*.md"))
