"""Random numbers that (seed, epoch, ...) alone determine, so that caching, workers and resuming do not change them."""
import numpy as np
import torch


def mix(*numbers):
    """Return one seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def epoch_generator(seed, epoch):
    """Return a random generator on the CPU for one epoch."""
    return torch.Generator().manual_seed(mix(seed, epoch))


def epoch_order(size, seed, epoch):
    """Return the order of an epoch: a permutation of `size` numbers."""
    return torch.randperm(size, generator=epoch_generator(seed, epoch))
