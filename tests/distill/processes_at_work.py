"""What processes of their own do in the tests of this folder: `python -m`, one function by name."""

from __future__ import annotations

import argparse
import sys

from etils import epath

from deevisum_jax import distributed, sharding
from deevisum_jax.errors import exits_cleanly
from tests.distill import cached


def cache(folder: epath.Path) -> None:
    """Ten segments, four to a file, of batches of eight."""
    cached.write_cache(folder, mesh=sharding.make_mesh())


def cache_until_killed(folder: epath.Path) -> None:
    """Killed where the seventh segment is read, which is in the second file."""
    cached.write_cache(folder, batch_size=1, kill_at=6)


@exits_cleanly
@distributed.ends_together
def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("folder", type=epath.Path)
    distributed.add_flags(parser)
    args = parser.parse_args()
    distributed.initialize(args)
    {"cache": cache, "killed": cache_until_killed}[args.work](args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
