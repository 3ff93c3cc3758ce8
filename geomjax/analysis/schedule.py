"""Reading ahead of the computation, within a memory budget."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")


def compute(
    items: Sequence[Item],
    load: Callable[[Item], Loaded],
    work: Callable[[Item, Loaded], Result],
    needed: Callable[[Item], int],
    *,
    memory: int,
) -> Iterator[tuple[Item, Result]]:
    """Works on one item after another, and loads the next in a thread of its own.

    One at a time, so that a process that is killed has no more than one to repeat: the
    work itself keeps the cores busy. An item is handed out before the error of loading
    the next is raised.

    Args:
        items: what to work on, in order.
        load: reads an item.
        work: from an item and what was read to a result.
        needed: memory that an item takes from its loading to its result.
        memory: memory for the two items; where they need more, the second is loaded
            when the first is done.

    Yields:
        Each item with its result.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
        task = loader.submit(load, items[0]) if items else None
        for i, item in enumerate(items):
            following = items[i + 1] if i + 1 < len(items) else None
            loading = task or loader.submit(load, item)
            loaded, task = [loading.result()], None
            # What was read belongs to the work now, which may free it early.
            del loading
            if following is not None and needed(item) + needed(following) <= memory:
                task = loader.submit(load, following)
            yield item, work(item, loaded.pop())
