"""How fast frames come through the loader, without and with the cache.

Also the part of a training's time that is spent waiting for them.
"""
import time

import torch

from bench import common
from datasets.camera_poses import CameraPoseDataset
from datasets.loaders import test_batches, train_batches
from datasets.resources import n_cores
from datasets.transforms import test_transform, train_transform
from engine.evaluation import synchronize, to_device
from engine.run import device_of
from models import load_apr
from models.cpu import keep_freed_memory
from models.precision import resolve
from util import cli
from util.losses import CameraPoseLoss

SIZES = ((96, 640, 480), (48, 1920, 1080))  # frames, width, height
CONFIG = {"backbone_type": "mobilenet", "hidden_dim": 256, "learnable": True, "s_x": 0, "s_q": -3, "norm": 2}
BATCH_SIZE = 32
# Per epoch and worker; enough that the start and the end of a loader count little.
N_BATCHES = {"uncached": 4, "cached": 60, "training": 12}


class Repeated(torch.utils.data.Dataset):
    """n items, those of a dataset over and over."""

    def __init__(self, dataset, n):
        self.dataset, self.n = dataset, n

    def __len__(self):
        return self.n

    def __getitem__(self, item):
        epoch, position = item
        return self.dataset[epoch, position % len(self.dataset)]


def frames_per_second(dataset, n_batches, n_workers):
    """The rate of a loader in its second epoch; the first starts the workers."""
    n = n_batches * BATCH_SIZE * max(n_workers, 1)
    batches = test_batches(Repeated(dataset, n), BATCH_SIZE, n_workers)
    for _ in range(2):
        begin = time.perf_counter()
        for _ in batches:
            pass
    return n / (time.perf_counter() - begin)


def loader_rows(title, dataset_path, labels_file, workers):
    """Rows of a table, one per number of workers."""
    dataset = CameraPoseDataset(dataset_path, labels_file)
    begin = time.perf_counter()
    dataset.cache_frames()
    filling = len(dataset) / (time.perf_counter() - begin)
    cache, rows = dataset.cache, []
    for n_workers in workers:
        dataset.cache, dataset.transform = None, test_transform()
        uncached = frames_per_second(dataset, N_BATCHES["uncached"], n_workers)
        dataset.cache = cache
        second = frames_per_second(dataset, N_BATCHES["cached"], n_workers)
        dataset.transform = train_transform()
        training = frames_per_second(dataset, N_BATCHES["cached"] // 4, n_workers)
        rows.append({"frames": title, "workers": n_workers, "uncached frames/s": uncached, "decoding into the "
                                                                                           "cache": filling,
                     "second epoch, test transform": second, "second / uncached": second / uncached,
                     "second epoch, training transform": training})
    return rows


def waiting_row(dataset_path, labels_file, n_workers, device, n_batches=N_BATCHES["training"], batch_size=BATCH_SIZE):
    """A row of a table: how much of a PoseNet training's second epoch, of n_batches, is spent waiting for data."""
    dataset = CameraPoseDataset(dataset_path, labels_file, train_transform())
    dataset.cache_frames()
    apr, pose_loss = load_apr("posenet", "none", dict(CONFIG)).to(device), CameraPoseLoss(CONFIG).to(device)
    apr.precision = resolve("auto", device)
    optimizer = torch.optim.Adam(apr.parameters(), lr=1e-3, fused=True)
    epochs = train_batches(Repeated(dataset, n_batches * batch_size), batch_size, n_workers, seed=0)
    for epoch in range(2):
        synchronize(device)
        begin, waited, n = time.perf_counter(), 0.0, 0
        batches = iter(epochs(epoch))
        while True:
            synchronize(device)  # so that waiting is for data alone
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
    seconds = time.perf_counter() - begin
    return {"workers": n_workers, "train img/s": n / seconds, "% of the time waiting for data": 100 * waited / seconds}


def main():
    """Run the benchmark that the command line asks for."""
    parser = common.parser("pipeline", __doc__)
    parser.add_argument("--dataset_path", help="(default: rendered frames of 640x480 and 1920x1080)")
    parser.add_argument("--labels_file", help="the label file of --dataset_path")
    parser.add_argument("--workers", metavar="N", type=int, nargs="+",
                        default=[n for n in (0, 1, 2, 4, 8, 16) if n <= n_cores()],
                        help="(default: 0, 1, 2, 4 ... up to the cores)")
    args = parser.parse_args()
    device = device_of(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.dataset_path:
        sources = {args.labels_file: (args.dataset_path, args.labels_file)}
    else:
        sources = {f"{width}x{height}": (common.FRAMES, common.frames(n, width, height)) for n, width, height in SIZES}
    common.show(args, {
        "Loader": [row for title, source in sources.items() for row in loader_rows(title, *source, args.workers)],
        f"PoseNet MobileNetV2 training, batch {BATCH_SIZE}, from the second epoch on":
            [waiting_row(*next(iter(sources.values())), n, device) for n in args.workers],
    })


if __name__ == "__main__":
    cli.run(main)
