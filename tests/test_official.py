"""The table of the papers' datasets, against the config's presets and the published label files."""
import json

import pytest
from conftest import ROOT, SHARED

from datasets.labels import read_labels
from datasets.official import DATASETS

LABELS = SHARED / "data" / "labels"
PRESETS = json.loads((ROOT / "config.json").read_text())["presets"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.removesuffix("-finetune") in DATASETS])
def test_a_preset_has_the_scenes_of_its_dataset(preset):
    dataset = DATASETS[preset.removesuffix("-finetune")]
    assert tuple(PRESETS[preset]["scene_names"]) == dataset.scenes == tuple(sorted(dataset.scenes))
    for model in ("ms-transposenet", "ems-transposenet"):
        assert PRESETS[preset][model]["num_scenes"] == len(dataset.scenes)


def test_every_dataset_has_a_preset():
    assert DATASETS.keys() <= PRESETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_every_scene_of_the_papers_can_be_downloaded(name):
    assert set(DATASETS[name].scenes) <= DATASETS[name].archives.keys()


@pytest.mark.skipif(not LABELS.is_dir(), reason="the published label files are not available")
@pytest.mark.parametrize("name", DATASETS)
def test_the_published_file_of_all_scenes_has_the_scenes_of_the_table(name):
    assert sorted(set(read_labels(LABELS / DATASETS[name].all_scenes_file)["scene"])) == list(DATASETS[name].scenes)
