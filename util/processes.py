"""The processes of a run that torchrun started: who this one is, and what they tell each other. Without torchrun there is one.

torch.distributed's `*_object` functions send pickles, between the processes of this run alone.
"""
import datetime
import os
import sys

# While the first decodes all frames of a dataset into a file, the others wait.
TIMEOUT = datetime.timedelta(hours=2)


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def rank():
    """This process's number, 0 for the first, which alone writes and logs."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def rank_here():
    """This process's number among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if under_torchrun() else 0


def n_here():
    """The number of this run's processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else 1


def launcher():
    """What a command line of this run begins with."""
    if not under_torchrun():
        return "python"
    several_machines = n_here() < int(os.environ["WORLD_SIZE"])
    return "torchrun " + ("(with its arguments as before)" if several_machines else f"--nproc_per_node={n_here()}")


def join(device):
    """Join the other processes, over NCCL for GPUs and gloo for CPUs."""
    import torch.distributed as dist

    if under_torchrun():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def count():
    """The number of processes that work together now."""
    dist = sys.modules.get("torch.distributed")  # not loaded, not joined
    return dist.get_world_size() if dist and dist.is_available() and dist.is_initialized() else 1


def share(items):
    """This process's part of a sequence: every count()-th item."""
    return items[rank()::count()] if count() > 1 else items


def merge(shard):
    """The whole of what every process has its `share` of. shard: a dict of tensors, {} for a process without rows; rows come
    back in order, of several processes on the CPU."""
    import torch

    if count() == 1:
        return shard
    shards = gather({key: value.cpu() for key, value in shard.items()})
    n_rows = sum(len(value) for part in shards for value in list(part.values())[:1])
    merged = {key: torch.empty(n_rows, *value.shape[1:], dtype=value.dtype) for key, value in shards[0].items()}
    for i, part in enumerate(shards):
        for key, value in part.items():
            merged[key][i::len(shards)] = value
    return merged


def gather(value):
    """Every process's value, in the order of the processes: a list that every process gets."""
    import torch.distributed as dist

    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wait():
    """Wait until every process is here."""
    gather(None)


def of_first(value):
    """The first process's value, for every process."""
    import torch.distributed as dist

    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def first_alone():
    """What follows is work for one: the other processes end here."""
    if under_torchrun():
        leave()
        if rank() > 0:
            sys.exit()


def leave():
    """Part from the other processes."""
    import torch.distributed as dist

    if count() > 1:
        dist.destroy_process_group()
