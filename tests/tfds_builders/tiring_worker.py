"""A worker of `prepare` that ends after one video, before it begins with the next."""

import os
import sys

from tfds_builders.video_folder import prepare

_prepare = prepare.Store.prepare
_begun = []


def _once(self, source):
    if _begun:
        os._exit(1)
    _begun.append(source)
    _prepare(self, source)


if __name__ == "__main__":
    prepare.Store.prepare = _once
    prepare.main(sys.argv[1])
