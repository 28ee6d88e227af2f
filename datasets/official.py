"""The papers' two datasets: scenes, downloads, names of label files, and published medians."""
from dataclasses import dataclass

from util.errors import UserError


@dataclass(frozen=True)
class OfficialDataset:
    """A dataset of the papers.

    name: the name of its preset and of its label folder.
    title: its name in a sentence.
    url: the address below which its archives are.
    archives: {every scene that can be downloaded: its archive's path below `url`}.
    licence: the address of the licence's page.
    label_pattern: the name of a label file, with {scene} and {split}.
    all_scenes_file: the label file of the training frames of all scenes.
    camera_to_world: whether a label's quaternion is camera-to-world; otherwise it is world-to-camera.
    medians: {scene of the papers: MS-Transformer's median errors in metres and degrees}, scenes sorted by name
        (Shavit, Ferens & Keller, ICCV 2021, tables 1 and 2).
    """

    name: str
    title: str
    url: str
    archives: dict
    licence: str
    label_pattern: str
    all_scenes_file: str
    camera_to_world: bool
    medians: dict

    @property
    def scenes(self):
        """The scenes of the papers, sorted: a scene's place is its index in a model of all of them."""
        return tuple(self.medians)

    def label_file(self, scene, split):
        """The name of a scene's label file. split: 'train' or 'test'."""
        return self.label_pattern.format(scene=scene, split=split)


_SEVEN_SCENES_MEDIANS = {"chess": (0.11, 4.66), "fire": (0.24, 9.60), "heads": (0.14, 12.19), "office": (0.17, 5.66),
                         "pumpkin": (0.18, 4.44), "redkitchen": (0.17, 5.94), "stairs": (0.26, 8.45)}
SEVEN_SCENES = OfficialDataset(
    name="7Scenes",
    title="7Scenes",
    url="http://download.microsoft.com/download/2/8/5/28564B23-0828-408F-8631-23B1EFF1DAC8",
    archives={scene: f"{scene}.zip" for scene in _SEVEN_SCENES_MEDIANS},
    licence="https://www.microsoft.com/en-us/research/project/rgb-d-dataset-7-scenes/",
    label_pattern="abs_7scenes_pose.csv_{scene}_{split}.csv",
    all_scenes_file="7scenes_all_scenes.csv",
    camera_to_world=True,
    medians=_SEVEN_SCENES_MEDIANS,
)
CAMBRIDGE = OfficialDataset(
    name="CambridgeLandmarks",
    title="Cambridge Landmarks",
    url="https://www.repository.cam.ac.uk/bitstream/handle/1810",
    archives={"KingsCollege": "251342/KingsCollege.zip", "OldHospital": "251340/OldHospital.zip",
              "ShopFacade": "251336/ShopFacade.zip", "StMarysChurch": "251294/StMarysChurch.zip",
              "GreatCourt": "251291/GreatCourt.zip"},  # the last is in no table of the papers
    licence="https://www.repository.cam.ac.uk/handle/1810/251342",
    label_pattern="abs_cambridge_pose_sorted.csv_{scene}_{split}.csv",
    all_scenes_file="cambridge_four_scenes.csv",
    camera_to_world=False,
    medians={"KingsCollege": (0.83, 1.47), "OldHospital": (1.81, 2.39), "ShopFacade": (0.86, 3.07),
             "StMarysChurch": (1.62, 3.99)},
)
DATASETS = {dataset.name: dataset for dataset in (SEVEN_SCENES, CAMBRIDGE)}
# Whether quaternions are camera-to-world, by convention. colmap: labels of prepare_colmap and prepare_photos.
CONVENTIONS = {**{name: dataset.camera_to_world for name, dataset in DATASETS.items()}, "colmap": True}


def convention_of_scenes(scenes):
    """The convention of labels of the papers' scenes: its name in CONVENTIONS. None for other scenes, or for none."""
    scenes = set(map(str, scenes))
    return next((name for name, dataset in DATASETS.items() if scenes and scenes <= set(dataset.archives)), None)


def agreed_convention(conventions):
    """The convention of several files, {path: its name}; None for no file. Raises UserError for different meanings."""
    first = next(iter(conventions), None)
    for path, convention in conventions.items():
        if CONVENTIONS[convention] != CONVENTIONS[conventions[first]]:
            raise UserError(f"{path}: quaternions as in {convention}, but as in {conventions[first]} in {first}; "
                            "take files of one meaning")
    return conventions.get(first)
