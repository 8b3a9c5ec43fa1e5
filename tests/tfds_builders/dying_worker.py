"""A worker of `prepare` that dies of files whose name says so, as decoders do of broken files."""

import os
import signal
import sys

from tfds_builders.video_folder import prepare

_read_media = prepare.read_media


def _dying(path, **kwargs):
    if "deadly" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    return _read_media(path, **kwargs)


if __name__ == "__main__":
    prepare.read_media = _dying
    prepare.main(sys.argv[1])
