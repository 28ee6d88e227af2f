"""Every command of the example_cmd files runs, on small layouts and for one epoch."""
import multiprocessing
import os
import re
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import ROOT, run_here, weights_of, write_labels, write_scene

from datasets import transforms
from datasets.official import DATASETS

FILES = [ROOT / f"example_cmd_{name}.md" for name in (
    "train_test_aprs", "train_test_pose_auto_encoders", "train_test_apr_with_auto_encoders_priors")]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)  # language, text


def commands(path):
    """The commands in the blocks of a markdown file that name no language, a list of words per command."""
    blocks = "".join(text for language, text in FENCED.findall(path.read_text()) if not language)
    return [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines() if line.strip()]


def run_command(folder, command, *settings):
    """Run a documented command of a script, with settings before its own; returns what it printed.

    folder: what /path/to stands for.
    """
    _, script, *arguments = [part.replace("/path/to/", f"{folder}/") for part in command]
    arguments = ["none" if part == "imagenet" else ROOT / part if part == "config.json" else part for part in arguments]
    at = arguments.index("--set") if "--set" in arguments else len(arguments)
    return run_here(script, *arguments[:at], "--set", *settings, *arguments[at + 1:])


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The datasets and label files that the commands name, with two frames per scene and split."""
    root = tmp_path_factory.mktemp("examples")
    for name, dataset in DATASETS.items():
        training = []
        for scene in dataset.scenes:
            rows = {split: write_scene(root / name, scene, 2, split) for split in ("train", "test")}
            for split in rows:
                write_labels(root / "datasets" / name / dataset.label_file(scene, split), rows[split])
            training += rows["train"]
        write_labels(root / "datasets" / name / dataset.all_scenes_file, training)
    return root


def run_chain(layouts, chain):
    """Run the commands of one model in order.

    The first weights file that does not exist yet is what was trained before, and no other is.
    """
    trained = None
    for command in chain:
        for part in command:
            if part.startswith("weights/") and not (layouts / part).exists():
                (layouts / part).parent.mkdir(exist_ok=True)
                for suffix in (".pth", ".json"):
                    shutil.copy(trained.with_suffix(suffix), (layouts / part).with_suffix(suffix))
                trained = None
        output = run_command(layouts, command, "n_epochs=1", "n_workers=0")
        if "train" in command:
            trained = layouts / weights_of(output)
            assert trained.is_file()
        else:
            assert re.search(r"^Median pose error: \d+\.\d{3}\[m\], \d+\.\d{3}\[deg\]$", output, flags=re.MULTILINE)


def test_every_command_of_the_markdown_files_runs(layouts):
    chains = {}
    for path in FILES:
        found = commands(path)
        assert found and all(command[0] == "python" and command[1].endswith(".py") for command in found)
        for command in found:
            # An APR's commands build on each other, over the files; different APRs' do not.
            backbone = [part for part in command if part.startswith("backbone_type=")]
            chains.setdefault((command[2], command[5].split("/")[-1], *backbone), []).append(command)
    # Two processes that go from command to command, and import PyTorch once.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), begin, (layouts,)) as pool:
        list(pool.map(run_chain, [layouts] * len(chains), chains.values()))


def begin(layouts):
    os.chdir(layouts)
    transforms.SIZE = 64  # as small_frames does
    torch.set_num_threads(1)
