"""Memory that was freed goes back to the system.

glibc keeps freed blocks of up to 32 MB for later, in a heap per thread, where a small block that
lives on splits the gap a large one left: streaming a model's weights would end with as much as all
of them in memory.  Trimming after each piece bounds it, and unlike malloc's own settings leaves
the process that called us as it was.
"""

import ctypes

_libc = ctypes.CDLL(None)


def trim() -> None:
    """Return all free pages of all heaps; takes milliseconds."""
    _libc.malloc_trim(0)
