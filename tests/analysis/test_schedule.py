"""What is in memory at once, and what comes out when something fails."""

import threading

import pytest

from geomjax.analysis.schedule import compute


class _Counted:
    """Items are numbers, the memory they take while they are loaded or worked on."""

    def __init__(self):
        self._lock = threading.Lock()
        self.held: list[int] = []
        self.seen: list[tuple[int, ...]] = []

    def load(self, item):
        with self._lock:
            self.held.append(item)
            self.seen.append(tuple(self.held))
        return [item]

    def work(self, item, loaded):
        with self._lock:
            self.held.remove(item)
        return loaded


@pytest.mark.parametrize("repeats", [1, 20])
def test_memory_is_bounded_however_many_items(repeats):
    counted = _Counted()
    items = repeats * [4, 4, 3, 3, 2, 9, 2, 1, 25, 1, 1]
    out = compute(items, counted.load, counted.work, lambda item: item, memory=10)
    assert [item for item, _ in out] == items
    assert counted.held == []
    for held in counted.seen:
        assert sum(held) <= 10 or len(held) == 1
        # One that is worked on and one that is read ahead.
        assert len(held) <= 2


def test_the_next_is_read_meanwhile_and_worked_on_only_after():
    read, worked_on = threading.Event(), []

    def load(item):
        if item == 2:
            read.set()
        return item

    def work(item, loaded):
        worked_on.append(item)
        assert read.wait(timeout=30)
        return item

    out = compute([1, 2, 3], load, work, lambda item: 1, memory=10)
    for item, _ in out:
        # Nothing is begun before what is done was handed out, to be made durable.
        assert worked_on[-1] == item


def test_what_was_computing_comes_out_before_an_error():
    def load(item):
        if item == 3:
            raise OSError("unreadable")
        return item

    items = [1, 2, 3, 4]
    out = compute(items, load, lambda item, loaded: loaded, lambda item: 1, memory=10)
    finished = []

    def drain():
        for item, _ in out:
            finished.append(item)

    with pytest.raises(OSError, match="unreadable"):
        drain()
    assert finished == [1, 2]


def test_an_error_of_the_work_is_raised():
    def work(item, loaded):
        raise ValueError("no")

    out = compute([1], lambda x: x, work, lambda x: 1, memory=1)
    with pytest.raises(ValueError, match="no"):
        list(out)
    assert list(compute([], work, work, lambda x: 1, memory=1)) == []
