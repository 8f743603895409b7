"""The processes that load images: which signals they get, when they end, and their errors in one line."""

import atexit
import multiprocessing
import re
import signal

from torch.utils.data import DataLoader

from sources import DataError


class Loader(DataLoader):
    """A DataLoader whose worker processes do not get SIGTERM and SIGINT.

    Batch systems and Ctrl-C signal the whole process group. The trainer decides then when to stop, and
    needs its workers until it has. They inherit the signals blocked, so there is no moment at which they
    could be killed. The errors of workers are DataErrors, without the workers' tracebacks.
    """

    def __iter__(self):
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        return _with_plain_errors(batches)


def _with_plain_errors(batches):
    try:
        yield from batches
        return
    except DataError as error:
        kind = type(error)
        _, _, message = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
        failure = kind(message.strip())
        error.__traceback__ = None  # its frames hold the iterator
    except RuntimeError as error:
        failure = dead_worker(error)
        if failure is None:
            raise
    # Nothing else holds the iterator, which now tells its workers to end. The garbage collector would close
    # their queues first, and then wait 10 s for each worker.
    del batches
    raise failure


@atexit.register
def _kill_workers():
    """End the workers of loaders that are unfinished at exit, as after an error that nobody caught.

    multiprocessing sends them SIGTERM, which they do not get, and would wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report that they were killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def dead_worker(error):
    """The DataError for PyTorch's RuntimeError about a worker process that is gone; None for other errors.

    PyTorch raises it wherever the main process is when the signal comes, also outside of the loader.
    """
    text = str(error)
    if not re.search(r"DataLoader worker \(pid|Communication with the workers is no longer possible", text):
        return None
    return DataError(
        f"a worker process that loads images died: {text.splitlines()[0]} Often the memory or /dev/shm is "
        "full, or `ulimit -n` too low: try fewer --workers; --workers 0 shows what is wrong"
    )
