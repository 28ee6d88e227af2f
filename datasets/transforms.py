"""The published image transforms, and the networks' input."""
import functools

import torch

from util.quick_torchvision import torchvision

SIZE = 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation


def train_transform():
    """The published augmentation: a random crop of 224 x 224 with colour jitter.

    PIL image, resized to a shorter side of 256 -> PIL image.
    """
    transforms = torchvision.transforms
    return transforms.Compose([transforms.RandomCrop(SIZE), transforms.ColorJitter(0.5, 0.5, 0.5, 0.2)])


def test_transform():
    """The published test transform: the centre of 224 x 224.

    PIL image, resized to a shorter side of 256 -> PIL image.
    """
    return torchvision.transforms.CenterCrop(SIZE)


def to_input(images):
    """Images as the networks take them, normalised as ImageNet's and channels-last in memory, on the images' device.

    N x H x W x 3 uint8 -> N x 3 x H x W float32.
    """
    mean, std = _imagenet(images.device)
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


@functools.cache  # a copy per batch would make the device wait
def _imagenet(device):
    """ImageNet's mean and standard deviation, each 1 x 3 x 1 x 1."""
    return torch.tensor(IMAGENET, device=device).view(2, 1, 3, 1, 1)
