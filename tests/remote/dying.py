"""A cache of answers whose process dies at a given write, in the place of a kill."""

import threading

import pytest

from simrl.remote.cache import Cache


class Killed(BaseException):
    """In the place of a kill."""


def dying_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of writes until death, to be set: after the last of them the writer is `Killed`."""
    put, lock, left = Cache.put, threading.Lock(), [0]

    def dying(self, key, answer, **more):
        kept = put(self, key, answer, **more)
        with lock:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return kept

    monkeypatch.setattr(Cache, 'put', dying)
    return left
