"""Every command of the three markdown files runs, on small layouts and for one epoch."""
import multiprocessing
import os
import re
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import ROOT, run_here, weights_of, write_labels, write_scene

SCENES = {
    "7Scenes": ("abs_7scenes_pose.csv", ["chess", "fire", "heads", "office", "pumpkin", "redkitchen", "stairs"]),
    "CambridgeLandmarks": ("abs_cambridge_pose_sorted.csv", ["KingsCollege", "OldHospital", "ShopFacade", "StMarysChurch"]),
}
ALL_SCENES = {"7Scenes": "7scenes_all_scenes.csv", "CambridgeLandmarks": "cambridge_four_scenes.csv"}


def commands(name):
    text = (ROOT / f"example_cmd_{name}.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    parsed = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    assert parsed and all(command[0] == "python" and command[1].endswith(".py") for command in parsed)
    return parsed


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The datasets and label files that the commands name, with two frames a scene and split."""
    root = tmp_path_factory.mktemp("examples")
    for dataset, (prefix, scenes) in SCENES.items():
        training = []
        for scene in scenes:
            rows = {split: write_scene(root / dataset, scene, 2, split) for split in ("train", "test")}
            for split in rows:
                write_labels(root / "datasets" / dataset / f"{prefix}_{scene}_{split}.csv", rows[split])
            training += rows["train"]
        write_labels(root / "datasets" / dataset / ALL_SCENES[dataset], training)
    return root


def run_chain(layouts, chain):
    """Run the commands of one model in order; the first weights file that is not there yet is what was trained before, and
    no other is."""
    trained = None
    for command in chain:
        command = [part.replace("/path/to/", f"{layouts}/") for part in command[1:]]
        command = ["none" if part == "imagenet" else part for part in command]
        for part in command:
            if part.startswith("weights/") and not (layouts / part).exists():
                (layouts / part).parent.mkdir(exist_ok=True)
                for suffix in (".pth", ".json"):
                    shutil.copy(trained.with_suffix(suffix), (layouts / part).with_suffix(suffix))
                trained = None
        if "--set" not in command:
            command.append("--set")
        at = command.index("--set") + 1
        command[at:at] = ["n_epochs=1", "n_workers=0"]
        output = run_here(command[0], *(ROOT / part if part == "config.json" else part for part in command[1:]))
        if "train" in command:
            trained = layouts / weights_of(output)
            assert trained.is_file()
        else:
            assert re.search(r"^Median pose error: \d+\.\d{3}\[m\], \d+\.\d{3}\[deg\]$", output, flags=re.MULTILINE)


def test_every_command_of_the_markdown_files_runs(layouts):
    chains = {}
    for name in ("train_test_aprs", "train_test_pose_auto_encoders", "train_test_apr_with_auto_encoders_priors"):
        for command in commands(name):
            # An APR's commands build on each other, over the files; different APRs' do not.
            backbone = [part for part in command if part.startswith("backbone_type=")]
            chains.setdefault((command[2], command[5].split("/")[-1], *backbone), []).append(command)
    # Two processes that go from command to command, and import PyTorch once.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), begin, (layouts,)) as pool:
        list(pool.map(run_chain, [layouts] * len(chains), chains.values()))


def begin(layouts):
    os.chdir(layouts)
    torch.set_num_threads(1)
