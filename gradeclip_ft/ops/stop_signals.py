"""The signals that end a job, and the processes that leave the answer to their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

# By which a scheduler says that the job's time is over.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def heed_parent_alone(worker: int) -> None:
    """Start of a loader worker: it ends when its parent says so or dies, not when others do.

    A scheduler may signal all processes of a job; the step that the parent wants to finish and save
    needs its workers. Programs that a worker starts, behind `pipe:`, inherit this. Systems that do
    not tell who sent a signal (macOS, Windows) keep torch's way: a worker ends on SIGTERM.

    Args:
        worker: Its number; all are alike.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not hasattr(signal, "sigwaitinfo"):
        return
    # Blocked signals come to the thread below; a thread of a library that did not block ignores.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_heed, args=(parent.pid,), daemon=True).start()


def _heed(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_pid == parent and received.si_signo == signal.SIGTERM:
            os._exit(0)
