"""The tables of `python reproduce.py`, on generated scenes under the published names."""
import contextlib
import dataclasses
import functools
import http.server
import io
import re
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_here, run_module_here, write_labels, write_scene
from drive import saved
from PIL import Image
from prepare_layouts import write_7scenes, write_cambridge

import reproduce
from datasets.official import DATASETS
from models import get_model
from models.checkpoints import save_weights
from models.download import FILES
from models.iapr import IAPR
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
from util.config import load_config
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
def stop_after():
    """[The number of tests after which a user interrupts the command]."""
    return [None]


@pytest.fixture
def printed(monkeypatch, stop_after):
    """Run the scripts within this process; returns a list of the medians that they print."""
    medians = []

    def run(script, *arguments, capture_errors):
        assert capture_errors
        if len(medians) == stop_after[0]:
            raise KeyboardInterrupt
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                output = run_here(script.name, *arguments)
        except SystemExit as stopped:
            raise UserError(errors.getvalue().splitlines()[-1]) from stopped
        found = re.search(r"^Median pose error: ([\d.]+)\[m\], ([\d.]+)\[deg\]", output, flags=re.MULTILINE)
        medians.append(found.groups())
        return output.splitlines()

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "run_script", run)
    return medians


@pytest.mark.parametrize("name, tested", [("CambridgeLandmarks", ["APR", "PAE", "refined"])])
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
    of_errors = [column for column in table.columns if column not in ("minutes", "GiB")]
    assert np.allclose(table.loc["average", of_errors], table.iloc[:-1][of_errors].mean())
    assert np.isclose(table.loc["average", "minutes"], table["minutes"].iloc[:-1].sum()) and (table["GiB"] > 0.1).all()
    text = (tmp_path / "out" / f"{name}.md").read_text()
    more = " PAE | refined |" if len(tested) > 1 else ""
    assert text in output and text.startswith(f"| scene | published | APR | difference |{more} time, memory |\n")
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
    assert "--solver needs a PAE to refine with" in refused(*arguments, "--solver", "mlp")
    assert "leave --apr_checkpoint and --encoder_checkpoint out" in refused("7Scenes-iAPR", *arguments[1:])
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
    without = [*arguments[:5], "--weights", tmp_path / "no weights"]
    assert "ms_transformer_7scenes.pth: no such file; --download, or python -m models.download" in refused(*without)
    assert not list((tmp_path / "out").glob("*.md"))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder whose files a local server has; returns it and the server's address."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "mirror").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "mirror")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "mirror", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def serve_scenes(name, scenes, folder):
    """Write archives of scenes as the official server has them, with pictures of noise."""
    write, random = {"7Scenes": write_7scenes, "CambridgeLandmarks": write_cambridge}[name], np.random.default_rng(0)
    for scene in scenes:
        write(folder / "unpacked", scene)
        for path in (folder / "unpacked" / scene).rglob("frame*.png"):
            if ".depth." not in path.name:
                Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
        archive = folder / DATASETS[name].archives[scene]
        archive.parent.mkdir(exist_ok=True)
        shutil.make_archive(archive.with_suffix(""), "zip", folder / "unpacked", scene)


def small_weights(name):
    """A small model of the kind that a published file holds."""
    if name.startswith(("posenet", "pae_posenet")):
        backbone = name.split("_")[-2]
        return PoseEncoder(16) if name.startswith("pae") else get_model(
            "posenet", "none", {"backbone_type": backbone, "hidden_dim": 16})
    config = load_config(ROOT / "config.json", "ems-transposenet", overrides=[
        *(f"{key}={value}" for key, value in SMALL.items()), f"num_scenes={4 if name.endswith('cambridge') else 7}"])
    if name.startswith("pae"):
        return MultiScenePoseEncoder(16, config["num_scenes"])
    return IAPR(config) if name.startswith("iapr") else get_model("ems-transposenet", "none", config)


N_SCENES = {"7Scenes": 3, "CambridgeLandmarks": 2, "7Scenes-iAPR": 1}  # of a table, to save time
TESTS = {"7Scenes": 2 * 3, "CambridgeLandmarks": 2 * 2, "7Scenes-iAPR": 4 + 3, "PoseNet-KingsCollege": 3 * 2}


@pytest.mark.parametrize("table", TESTS)
def test_a_table_from_download_to_end_and_interrupted(table, drive, mirror, printed, stop_after, tmp_path, monkeypatch):
    scenes = ["KingsCollege"]
    if table in N_SCENES:
        dataset = reproduce.TABLES[table]
        scenes = dataset.scenes[:N_SCENES[table]]
        monkeypatch.setitem(reproduce.TABLES, table, dataclasses.replace(
            dataset, medians={scene: dataset.medians[scene] for scene in scenes}))
    serve_scenes(reproduce.TABLES[table].name, scenes, mirror[0])
    torch.manual_seed(0)
    stem = {"7Scenes": "ms_transformer_7scenes", "CambridgeLandmarks": "ms_transformer_cambridge",
            "PoseNet-KingsCollege": "kingscollege"}.get(table, "7scenes")
    names = [name for name in FILES if name.endswith(stem) or (table == "7Scenes-iAPR" and "7scenes" in name)]
    drive.files = {FILES[name][1]: saved(small_weights(name)) for name in names}
    arguments = [table, "--dataset_path", tmp_path / "data", "--labels_path", tmp_path / "labels", "--weights",
                 tmp_path / "weights", "--output_dir", tmp_path / "out", "--download", "--yes", "--url", mirror[1]]
    stop_after[0] = TESTS[table] // 2
    with pytest.raises(KeyboardInterrupt):
        run_module_here(reproduce, *arguments)
    assert len(printed) == stop_after[0] and not (tmp_path / "out" / f"{table}.md").exists()
    stop_after[0], drive.page = None, "<html>nothing more to fetch</html>"
    status, output, errors = run_module_here(reproduce, *arguments)
    assert not status, errors
    assert len(printed) == TESTS[table]  # what was done is not repeated
    assert f"{TESTS[table] // 2} of {TESTS[table]} tests are of an earlier run" in output

    found = pd.read_csv(tmp_path / "out" / f"{table}.csv", index_col=0)
    text = (tmp_path / "out" / f"{table}.md").read_text()
    assert (found["minutes"] > 0).all() and (found["GiB"] > 0.1).all()
    if table == "7Scenes-iAPR":
        assert list(found.index) == ["100 %", "70 %", "50 %", "30 %"]
        assert list(found["published iAPR deg"]) == [6.69, 7.10, 6.89, 7.12]
        assert list(found["published m"]) == [0.18, 0.19, 0.19, 0.20]
        assert list(found["iAPR m"].isna()) == [False, False, True, False] and " | - | " in text
        medians = np.array(printed[:2], float)  # of 100 %: the APR's and iAPR's
        assert np.allclose(found.loc["100 %", ["APR m", "APR deg"]], medians[::2].mean(axis=0), atol=1e-3)
        assert np.allclose(found.loc["100 %", ["iAPR m", "iAPR deg"]], medians[1::2].mean(axis=0), atol=1e-3)
    elif table == "PoseNet-KingsCollege":
        assert list(found.index) == ["mobilenet", "resnet50", "efficientnet"]
        assert text.startswith("| row | APR | PAE | time, memory |")
    else:
        assert list(found.index) == [*scenes, "average"] and list(found["published m"][:-1]) == [
            DATASETS[table].medians[scene][0] for scene in scenes]

    if table == "CambridgeLandmarks":  # other weights are tested anew
        torch.save(MultiScenePoseEncoder(16, 4).state_dict(), tmp_path / "weights/pae_ms_transformer_cambridge.pth")
        (tmp_path / "weights/SHA256SUMS").unlink()
        run_module_here(reproduce, *arguments)
        assert len(printed) == TESTS[table] + 2
