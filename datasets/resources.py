"""What this process may use of its machine: cores, memory, data loading workers."""
import os
import shutil
from pathlib import PurePosixPath

from util import processes

SHARED_MEMORY = "/dev/shm"
OPEN_FILES = "/proc/self/fd"
FILES_PER_WORKER = 20


def n_cores():
    """The number of CPU cores that this process may use. A run's processes on one machine share its cores."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(n // processes.local_world_size(), 1)


def free_memory():
    """Bytes of memory that are free for use, within the limits of the control groups (a container's or a batch job's).

    0 where the system does not report it.
    """
    try:
        free = [1024 * _number("/proc/meminfo", "MemAvailable:")]
        with open("/proc/self/cgroup") as file:
            groups = [line.strip().split(":", 2)[1:] for line in file]
    except (OSError, ValueError):
        return 0
    for controllers, group in groups:
        if controllers == "":
            root, limit, used, reclaimable = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):
            root, limit, used, reclaimable = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                              "total_inactive_file ")
        else:
            continue
        group = PurePosixPath(group.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                free.append(_number(f"{root}/{folder}/{limit}") - _number(f"{root}/{folder}/{used}")
                            + _number(f"{root}/{folder}/memory.stat", reclaimable))
            except (OSError, ValueError):  # invisible from here, or "max": no limit
                continue
    return max(min(free), 0)


def _number(path, key=""):
    """The number behind `key`, which begins a line of a file; without a key, the first number. Raises ValueError."""
    with open(path) as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1 if key else 0])
    raise ValueError


def limit_workers(n_workers, batch_bytes):
    """The number of data loading workers: at most `n_workers`, and as many as the machine supports.

    batch_bytes: the memory of one batch.
    """
    n_workers = min(n_workers, n_cores())  # more would only take turns
    if n_workers and os.path.isdir(SHARED_MEMORY):
        # Each worker passes batches through shared memory, two at a time. A container has 64 MB of it, and exceeding it
        # kills the workers.
        free = shutil.disk_usage(SHARED_MEMORY).free // processes.local_world_size()
        n_workers = min(n_workers, free // (4 * batch_bytes))
    if n_workers and os.path.isdir(OPEN_FILES):
        import resource  # does not exist on other systems

        # Every tensor of a batch in transit is an open file, and so are a worker's pipes.
        free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir(OPEN_FILES))
        n_workers = max(min(n_workers, free // FILES_PER_WORKER), 0)
    return n_workers
