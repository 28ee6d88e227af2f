"""Progress bars."""
from tqdm import tqdm

from util import processes


def progress(iterable=None, **options):
    """A tqdm bar, quiet where there is no terminal and in all processes of a run but the first."""
    return tqdm(iterable, disable=None if processes.rank() == 0 else True, **options)
