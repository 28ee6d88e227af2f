"""How fast frames come through the loader, without and with the cache, and how much of a training step waits for them."""
import time

import torch

from bench import common
from datasets.camera_poses import CameraPoseDataset, _n_cores, test_batches, train_batches, train_transform
from models import load_apr
from util import cli
from util.engine import synchronize, to_device
from util.losses import CameraPoseLoss

SIZES = ((96, 640, 480), (48, 1920, 1080))  # frames, width, height
CONFIG = {"backbone_type": "mobilenet", "hidden_dim": 256, "precision": "auto", "learnable": True, "s_x": 0, "s_q": -3, "norm": 2}
BATCH_SIZE = 32
N_FRAMES = 2000  # that an epoch over the cache reads, the frames again and again, so that starting it does not count


def frames_per_second(batches):
    begin = time.perf_counter()
    n = sum(len(batch["img"]) for batch in batches)
    return n / (time.perf_counter() - begin)


def loader_rows(title, dataset_path, labels_file, n_workers):
    def dataset(transform=None):
        return CameraPoseDataset(dataset_path, labels_file, transform)

    uncached = test_batches(dataset(), BATCH_SIZE, n_workers)
    next(iter(uncached))  # starts the workers
    without = frames_per_second(uncached)
    begin = time.perf_counter()
    cached = dataset()
    cached.cache_frames()
    first = len(cached) / (time.perf_counter() - begin)
    rates = []
    for transform in (None, train_transform()):
        cached.transform = transform or cached.transform
        cached.size = N_FRAMES
        frames = _Repeated(cached)
        loader = test_batches(frames, BATCH_SIZE, n_workers)
        next(iter(loader))
        rates.append(frames_per_second(loader))
    return {"frames": title, "workers": n_workers, "uncached frames/s": without, "first epoch, decoding into the cache": first,
            "second epoch, test transform": rates[0], "second epoch, training transform": rates[1],
            "second / uncached": rates[0] / without}


class _Repeated(torch.utils.data.Dataset):
    """N_FRAMES items of a dataset, again and again."""

    def __init__(self, dataset):
        self.dataset, self.n = dataset, len(dataset.paths)

    def __len__(self):
        return N_FRAMES

    def __getitem__(self, item):
        epoch, position = item
        return self.dataset[epoch, position % self.n]


def waiting_row(dataset_path, labels_file, n_workers, device):
    """The share of a PoseNet training's steps, from the second epoch on, spent waiting for data."""
    dataset = CameraPoseDataset(dataset_path, labels_file, train_transform())
    dataset.cache_frames()
    apr, pose_loss = load_apr("posenet", "none", dict(CONFIG)).to(device), CameraPoseLoss(CONFIG).to(device)
    optimizer = torch.optim.Adam(apr.parameters(), lr=1e-3, fused=True)
    epochs = train_batches(dataset, BATCH_SIZE, n_workers, seed=0)
    waited, begin, n = 0.0, None, 0
    for epoch in range(4):
        if epoch == 1:
            synchronize(device)
            begin, waited, n = time.perf_counter(), 0.0, 0
        batches = iter(epochs(epoch))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            batch = to_device(batch, device)
            loss = pose_loss(apr(batch)["pose"], batch["pose"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            n += len(batch["pose"])
    synchronize(device)
    seconds = time.perf_counter() - begin
    return {"workers": n_workers, "train img/s": n / seconds, "% of the time waiting for data": 100 * waited / seconds}


def main():
    parser = common.parser("pipeline", __doc__)
    parser.add_argument("--dataset_path", help="(default: rendered frames of 640x480 and 1920x1080)")
    parser.add_argument("--labels_file", help="the label file of --dataset_path")
    parser.add_argument("--workers", metavar="N", type=int, nargs="+", default=[n for n in (0, 1, 2, 4, 8, 16) if n <= _n_cores()],
                        help="(default: 0, 1, 2, 4 ... up to the cores)")
    args = parser.parse_args()
    device = cli.device_of(args.device)
    if device.type == "cpu":
        cli.keep_freed_memory()
    sources = {f"{width}x{height}": (common.FRAMES, common.frames(n, width, height)) for n, width, height in SIZES}
    if args.dataset_path:
        sources = {args.labels_file: (args.dataset_path, args.labels_file)}
    common.show(args, {
        "Loader": [loader_rows(title, *source, n) for title, source in sources.items() for n in args.workers],
        f"PoseNet MobileNetV2 training, batch {BATCH_SIZE}, from the second epoch on":
            [waiting_row(*next(iter(sources.values())), n, device) for n in args.workers],
    })


if __name__ == "__main__":
    main()
