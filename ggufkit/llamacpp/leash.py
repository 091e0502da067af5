"""Runs one program so that nothing of it outlives the process that asked for it.

Run as a script: ``python -I -S leash.py LIFELINE REPORT SIGNALS PROGRAM
[ARGUMENT]...``, as the leader of a process group of its own.

LIFELINE is the reading end of a pipe that the asker holds open. When it closes,
the asker is gone (even by ``kill -9``) or wants the end, and the whole group is
ended: ``cmake`` with its ``ninja`` and all compilers, not just the first child,
which is as far as Linux's parent-death signal would reach.

REPORT is the writing end of a pipe; it gets one line of JSON with the exit
status and the peak resident memory. They are measured here and not by the
asker because the kernel counts a big asker's own memory into the peak of what
it starts directly; this process is small.

SIGNALS are numbers of signals, with commas between them, that the program is to
take as a shell would let it; others that Python ignores, it ignores too.
"""

import json
import os
import signal
import sys
import threading
import time

_GRACE_SECONDS = 5.0


def _end_with(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os.killpg(0, signal.SIGTERM)  # this process ignores it, to see the others off
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main(lifeline: int, report: int, signals: list[int], argv: list[str]) -> int:
    """Run ``argv``; returns its exit status, negative for a signal."""
    os.set_inheritable(lifeline, False)
    os.set_inheritable(report, False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.posix_spawn(argv[0], argv, os.environ, setsigdef=signals)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    _, status, usage = os.wait4(child, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    code = os.waitstatus_to_exitcode(status)
    told = {"returncode": code, "peak_rss_nbytes": usage.ru_maxrss * unit}
    os.write(report, json.dumps(told).encode())
    return code


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [*map(int, sys.argv[3].split(","))], sys.argv[4:])
