"""Progress bars."""
from tqdm import tqdm

from util import processes


def progress(iterable=None, **options):
    """Return a tqdm bar. It is silent without a terminal, and on ranks other than 0."""
    return tqdm(iterable, disable=None if processes.rank() == 0 else True, **options)
