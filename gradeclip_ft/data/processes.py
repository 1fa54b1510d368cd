"""How child processes may be started from where we are."""

from __future__ import annotations

import multiprocessing


def in_foreign_worker() -> bool:
    """Whether this process was started by a method of somebody else, joblib's for example.

    Children that are spawned from such a process fail: they know that method no more than we do.
    """
    return multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods()
