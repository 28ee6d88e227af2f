"""The processes of a run that torchrun started: their ranks, and what they exchange.

Without torchrun a run has one process. The `*_object` functions of torch.distributed send pickles, but only between the
processes of this run.
"""
import datetime
import os
import sys

# Other ranks wait this long at most, such as while rank 0 decodes all frames of a dataset into a file.
TIMEOUT = datetime.timedelta(hours=2)


def under_torchrun():
    """Return whether torchrun started more than one process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def rank():
    """Return this process's rank. Rank 0 alone writes files and logs."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def local_rank():
    """Return this process's rank among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if under_torchrun() else 0


def local_world_size():
    """Return the number of this run's processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else 1


def launcher():
    """Return the beginning of this run's command line: 'python', or torchrun with its arguments."""
    if not under_torchrun():
        return "python"
    several_machines = local_world_size() < int(os.environ["WORLD_SIZE"])
    return "torchrun " + ("(with its arguments as before)" if several_machines
                          else f"--nproc_per_node={local_world_size()}")


def join(device):
    """Join the process group: NCCL for GPUs, gloo for CPUs."""
    import torch.distributed as dist

    if under_torchrun():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def world_size():
    """Return the number of processes in the process group: 1 before `join` and after `leave`."""
    dist = sys.modules.get("torch.distributed")  # if it is not imported, no group was joined
    return dist.get_world_size() if dist and dist.is_available() and dist.is_initialized() else 1


def shard(items):
    """Return this rank's part of a sequence: every world_size()-th item."""
    return items[rank()::world_size()] if world_size() > 1 else items


def gather_rows(rows):
    """Return the rows of all ranks in order: a dict of tensors with this rank's rows -> the same with all rows.

    rows: what was computed from this rank's `shard`, {} for a rank without rows. With several processes, the result is
    on the CPU.
    """
    import torch

    if world_size() == 1:
        return rows
    parts = gather({key: value.cpu() for key, value in rows.items()})
    n_rows = sum(len(value) for part in parts for value in list(part.values())[:1])
    whole = {key: torch.empty(n_rows, *value.shape[1:], dtype=value.dtype) for key, value in parts[0].items()}
    for i, part in enumerate(parts):
        for key, value in part.items():
            whole[key][i::len(parts)] = value
    return whole


def gather(value):
    """Return a list of every rank's value, in the order of ranks, on every rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait until every rank has called this."""
    gather(None)


def broadcast(value):
    """Return rank 0's value on every rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def continue_on_first():
    """Continue on rank 0 alone: the other processes exit here."""
    if under_torchrun():
        leave()
        if rank() > 0:
            sys.exit()


def leave():
    """Leave the process group."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.destroy_process_group()
