"""Batches of a dataset, for tests and for training."""
import sys

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from datasets.resources import limit_workers
from datasets.transforms import SIZE
from datasets.video import VideoFrames
from util import processes
from util.errors import UserError
from util.seeds import epoch_order


def test_batches(dataset, batch_size, n_workers):
    """A loader of this rank's shard of a dataset, in the dataset's order."""
    if isinstance(dataset, VideoFrames):  # which has an order of its own
        return dataset.batches(batch_size)
    positions = processes.shard([(0, position) for position in range(len(dataset))])
    return _loader(dataset, BatchSampler(positions, batch_size, drop_last=False), batch_size, n_workers)


def train_batches(dataset, batch_size, n_workers, seed):
    """A function from an epoch's number to a loader of its batches, shuffled by (seed, epoch) alone.

    batch_size: the frames per batch of all processes together. Each process gets its shard of every batch, and at least
    one frame of it. Raises UserError for a batch size below the number of processes.
    """
    if batch_size < processes.world_size():
        raise UserError(f"batch_size {batch_size} is that of all processes together and must be at least their number, "
                        f"{processes.world_size()}")
    sampler = _EpochBatches(len(dataset), batch_size, seed)
    loader = _loader(dataset, sampler, -(-batch_size // processes.world_size()), n_workers)

    def batches(epoch):
        sampler.epoch = epoch
        return loader

    return batches


class _EpochBatches(Sampler):
    """This rank's shards of the batches of `epoch`: lists of (epoch, position)."""

    def __init__(self, size, batch_size, seed):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self):
        return -(-self.size // self.batch_size)

    def __iter__(self):
        for batch in epoch_order(self.size, self.seed, self.epoch).split(self.batch_size):
            positions = batch.tolist()
            # A last batch may have fewer frames than there are processes: the others get its first frame.
            yield [(self.epoch, position) for position in processes.shard(positions) or positions[:1]]


def _loader(dataset, batches, batch_size, n_workers):
    """A DataLoader of batches, lists of items of at most `batch_size`, with as many workers as the machine supports."""
    n_workers = limit_workers(n_workers, batch_size * SIZE * SIZE * 3)
    # Workers are forked, to share the cache. Where forking is unsafe, a dataset with a cache has no workers.
    context = "fork" if n_workers and sys.platform == "linux" else None
    if context is None and getattr(dataset, "cache", None) is not None:
        n_workers = 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=n_workers, persistent_workers=n_workers > 0,
                      multiprocessing_context=context, pin_memory=torch.cuda.is_initialized(),
                      generator=torch.Generator())  # the global one would depend on the number of workers
