"""What the README and docs/ say is true: commands run, links lead somewhere, and the guides' changes fit the code."""
import argparse
import importlib
import re
import shutil
import sys
import textwrap
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, run_module_here, run_well, signal_after_step, write_labels, write_scene
from PIL import Image
from test_examples import FENCED, FILES, commands, run_command

import reproduce
from datasets import prepare_7scenes, prepare_cambridge
from datasets.official import CAMBRIDGE, DATASETS, SEVEN_SCENES
from models import get_model
from models.checkpoints import save_weights
from models.pose_encoder import PoseEncoder
from util.config import load_config

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAYERS = {f"num_{branch}_{part}_layers": 1 for branch in ("t", "rot") for part in ("encoder", "decoder")}
SMALL = {"hidden_dim": 16, "dim_feedforward": 8, **LAYERS}
SETTINGS = [f"{key}={value}" for key, value in {**SMALL, "n_workers": 0, "batch_size": 4}.items()]
EXAMPLES = [command for path in FILES for command in commands(path)]  # test_examples.py runs them
PROGRAMS = ("python", "python3", "make", "torchrun", "pip", "tensorboard", "ruff", "lint-imports")


def inline_codes(path):
    """The inline codes of a markdown file."""
    return re.findall(r"`([^`]+)`", FENCED.sub("", path.read_text()))


# Commands

def write_official(folder, scene, write_split):
    """Write a scene with two frames per split, on a walk of small turns."""
    for split, numbers in (("train", (1, 2)), ("test", (3, 4))):
        angles = [0.1 * number for number in numbers]
        poses = [(number, 0.5 * number, 0, np.cos(angle / 2), 0, 0, np.sin(angle / 2))
                 for number, angle in zip(numbers, angles, strict=True)]
        images = write_split(folder / scene, split, poses)
        for image, number in zip(images, numbers, strict=True):
            image.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(image)


def split_of_7scenes(folder, split, poses):
    sequence = folder / f"seq-0{1 + (split == 'test')}"
    sequence.mkdir(parents=True)
    (folder / f"{split.title()}Split.txt").write_text(f"sequence{sequence.name[-1]}\n")
    for i, (*position, w, _, _, z) in enumerate(poses):
        matrix = np.eye(4)
        matrix[:2, :2] = [[w * w - z * z, -2 * w * z], [2 * w * z, w * w - z * z]]
        matrix[:3, 3] = position
        np.savetxt(sequence / f"frame-{i:06d}.pose.txt", matrix)
    return [sequence / f"frame-{i:06d}.color.png" for i in range(len(poses))]


def split_of_cambridge(folder, split, poses):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{split}/frame{i}.png" for i in range(len(poses))]
    lines = [" ".join(map(str, (name, *pose))) for name, pose in zip(names, poses, strict=True)]
    (folder / f"dataset_{split}.txt").write_text("\n".join(["", "", "", *lines]))
    return [folder / name for name in names]


def write_colmap(folder):
    """Write a text model of nine images."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("1 PINHOLE 64 48 50 50 32 24\n")
    (folder / "images.txt").write_text("".join(f"{i} 1 0 0 0 {i} 0 0 1 {i}.jpg\n\n" for i in range(1, 10)))
    (folder / "points3D.txt").write_text("")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the commands name: /path/to/... is in it, and it is the working directory."""
    home = tmp_path_factory.mktemp("home")
    for dataset, write_split in ((SEVEN_SCENES, split_of_7scenes), (CAMBRIDGE, split_of_cambridge)):
        for scene in dataset.archives:
            write_official(home / dataset.name, scene, write_split)
    write_colmap(home / "sparse" / "0")
    photos = sorted((home / "7Scenes/chess").glob("*/*.png"))
    (home / "photos").mkdir()
    for photo in photos:
        Image.open(photo).save(home / "photos" / f"{photo.parent.name}-{photo.stem}.jpg")
    rows = chain(*(write_scene(home / "homes", scene, 2, "train") for scene in ("attic", "cellar")))
    write_labels(home / "datasets/homes/all_scenes.csv", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (home / "one_scene").mkdir()
        for module, dataset in ((prepare_7scenes, SEVEN_SCENES), (prepare_cambridge, CAMBRIDGE)):
            status, _, errors = run_module_here(module, home / dataset.name)
            assert not status, errors
            for labels in (home / "datasets" / dataset.name).glob(f"*_{dataset.scenes[0]}_*.csv"):
                shutil.copy(labels, home / "one_scene")
        for name in ("FILE.csv", "predictions.csv"):
            shutil.copy(home / "one_scene" / SEVEN_SCENES.label_file("chess", "test"), home / name)
        yield home


@pytest.fixture(scope="module")
def done():
    """The commands that have run: those of test_examples.py, and those of other documents."""
    return list(EXAMPLES)


def write_weights(path):
    """Write weights of the model that a file's name stands for."""
    path.parent.mkdir(exist_ok=True)
    if path.name.startswith("pae_"):
        model = PoseEncoder(16)
        poses = torch.randn(40, 7)
        model.fit_latents({"truth": poses, "pose": poses, "latents": torch.randn(40, 32),
                           "scene": torch.zeros(40, dtype=torch.long)})
    elif path.name.startswith("posenet_mobilenet"):
        model = get_model("posenet", "none", {**SMALL, "backbone_type": "mobilenet"})
    else:
        model = get_model("ems-transposenet", "none", {**SMALL, "num_scenes": 7})
    save_weights(path, model.state_dict(), {})


def run_in_process(script, *arguments, capture_errors):
    """In the place of reproduce.run_script."""
    return run_here(script.name, *arguments).splitlines()


def assert_parses(main, arguments):
    """Check that a command's main function takes these arguments, without running it."""
    class Parsed(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(*arguments):
        parse_args(*arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(sys, "argv", ["", *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        main()


def run_module(home, name, arguments):
    """Run `python -m NAME ...`: a command that takes long is only parsed."""
    if name == "pytest":
        assert all((ROOT / part).exists() for part in arguments if part.startswith("tests/"))
        return
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if name.startswith(("bench.", "tests.", "models.download")):
        assert_parses(module.main, arguments)
        return
    if name == "datasets.synthetic_scenes":
        arguments = [*arguments, "--frames", "2", "--width", "32"]
    status, _, errors = run_module_here(module, *(part.replace("/path/to/", f"{home}/") for part in arguments))
    assert not status, errors


def run_script(home, command):
    for part in command:
        path = home / part.replace("{scene}", "KingsCollege")
        if part.startswith("weights/") and not path.exists():
            write_weights(path)
    if command[1] == "reproduce.py":
        arguments = [part.replace("/path/to/", f"{home}/") for part in command[2:]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reproduce, "run_script", run_in_process)
            status, output, errors = run_module_here(reproduce, *arguments, "--labels_path", "one_scene")
        assert not status and "| average |" in output, errors
    elif "--resume" in command:
        at = command.index("--resume")
        settings = [*SETTINGS, "n_epochs=3"]
        with signal_after_step(2), pytest.raises(SystemExit):
            run_command(home, command[:at] + command[at + 2:], *settings)
        assert "Resuming after epoch" in run_command(home, command, *settings)
    else:
        run_command(home, command, *SETTINGS, "n_epochs=1")


def run_documented(home, command):
    """Run a command of the documentation, or check what can be checked of it without running it."""
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        variables = re.findall(r"SOAK_\w+", (ROOT / "tests/soak/test_soak.py").read_text())
        assert {argument.partition("=")[0] for argument in arguments} <= {*targets, *variables}
    elif command[1:3] == ["-m", "venv"]:
        assert f"VENV := {command[3]}\n" in (ROOT / "Makefile").read_text()
    elif program == ".":
        assert arguments == [".venv/bin/activate"]
    elif program == "pip":
        packages = (ROOT / "requirements-dev.txt").read_text().split()
        assert arguments[0] == "install" and set(arguments[1:]) <= {*packages, "-r", "requirements.txt", "-e", "."}
    elif program in ("tensorboard", "ruff", "lint-imports"):
        assert (Path(sys.executable).parent / program).exists()
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        assert ["python", parsed.training_script, *parsed.training_script_args] in EXAMPLES
    elif arguments[0] == "-m":
        run_module(home, arguments[1], arguments[2:])
    else:
        assert program == "python", command
        run_script(home, command)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_every_command_runs(home, done, path):
    inline = [code.split() for code in inline_codes(path) if code.split()[0] in PROGRAMS and " " in code]
    for command in commands(path) + inline:
        if command not in done:
            run_documented(home, command)
            done.append(command)


# Links and names

def anchors(path):
    """The anchors that GitHub gives to a markdown file's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCS, *FILES], ids=lambda path: path.stem)
def test_links_and_named_files_exist(path):
    text = FENCED.sub("", path.read_text())
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        target = path.parent / target if target else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    added = set(re.findall(r"^ *# (\S+\.py)$", path.read_text(), flags=re.MULTILINE))  # by the guides
    for name in re.findall(r"`([\w./]+\.(?:py|md|json|toml))`", text):
        assert (ROOT / name).exists() or name in added, name


def test_the_layout_names_every_module():
    layout = next(text for language, text in FENCED.findall((ROOT / "docs/development.md").read_text()) if language)
    named = set(re.findall(r"\w+\.py", layout))
    scripts = {path.name for path in ROOT.glob("*.py")}
    modules = {path.name for folder in ("engine", "models", "datasets") for path in (ROOT / folder).glob("[!_]*.py")}
    assert named == scripts | modules


# The guides of docs/development.md

def apply_diff(folder, text):
    """Make the changes of a diff, whose first line names the file, and whose places are separated by @@."""
    first, _, rest = text.partition("\n")
    path = folder / first.removeprefix("--- ")
    content = path.read_text()
    for place in rest.split("@@\n"):
        lines = place.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", sign)) for sign in "-+")
        assert not old or content.count(old) == 1, f"{path.name} has not once what docs/development.md shows:\n{old}"
        content = content.replace(old, new) if old else content + new
    path.write_text(content)


def test_the_guides_of_development_work(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", *DATASETS, "golden")
    for path in ROOT.iterdir():
        if path.name in ("bench", "datasets", "engine", "models", "tests", "util"):
            shutil.copytree(path, tmp_path / path.name, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, tmp_path)
    for language, text in FENCED.findall((ROOT / "docs/development.md").read_text()):
        text = textwrap.dedent(text)
        if language == "diff":
            apply_diff(tmp_path, text)
        elif language == "python":
            first, _, rest = text.partition("\n")
            assert not (tmp_path / first.removeprefix("# ")).exists()
            (tmp_path / first.removeprefix("# ")).write_text(rest)
    load_config(tmp_path / "config.json", "posenet", preset="12Scenes")
    added = [f"tests/test_{name}.py" for name in ("weights", "backbones", "refinement", "prepare_12scenes")]
    names = "convnext or gem or nearest or 12scenes"
    assert "8 passed" in run_well("-m", "pytest", "-q", "-k", names, *added, cwd=tmp_path)
