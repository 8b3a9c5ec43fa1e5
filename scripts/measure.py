"""Wall time, CPU time and peak memory of a command: `python scripts/measure.py CMD …`.

Memory is the resident set of the command and all its children together, sampled every 0.1 s
(Linux).
"""

from __future__ import annotations

import pathlib
import resource
import subprocess
import sys
import time

_PAGE_BYTES = resource.getpagesize()


def main() -> int:
    """Returns the command's exit status."""
    command = sys.argv[1:]
    if not command:
        print(__doc__)
        return 2
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.1)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"wall {time.monotonic() - start:.1f} s, CPU {usage.ru_utime + usage.ru_stime:.1f} s, "
        f"peak memory {peak / 2**20:.0f} MiB: {' '.join(command)}",
        file=sys.stderr,
    )
    return process.returncode


def resident_bytes(root: int) -> int:
    """Resident memory of a process and its descendants; shared pages count once per process."""
    parents, resident = {}, {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything, spaces too.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        resident[int(stat.parent.name)] = int(fields[21]) * _PAGE_BYTES
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(resident.get(pid, 0) for pid in family)


if __name__ == "__main__":
    sys.exit(main())
