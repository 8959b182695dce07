"""A side stream of a page tier that lags behind as far as a test wants."""

from __future__ import annotations

from sgl_psa_kernels.page_tier.triton_streams import Inline


class Late:
    """An event that the test lets pass."""

    def __init__(self, streams: LateStreams) -> None:
        self._streams, self.passed = streams, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        while not self.passed:
            self._streams.run(1)


class LateStreams(Inline):
    """A side stream that runs when the test says; all that waits, in its order."""

    def __init__(self) -> None:
        self._told = []

    def aside(self, work, *used):
        event = Late(self)
        self._told.append((work, event))
        return event

    @property
    def waiting(self) -> int:
        return len(self._told)

    def run(self, count: int = 10**9) -> None:
        while self._told and count > 0:
            work, event = self._told.pop(0)
            work()
            event.passed = True
            count -= 1
