"""First-fit allocation of ranges of rows."""


class RangeAllocator:
    """Hands out [start, start + size) below a capacity that can grow."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    @property
    def used(self) -> int:
        return self.capacity - sum(size for _, size in self._free)

    def take(self, size: int) -> int | None:
        """The start of a free range of that size, the lowest one; None if there is none."""
        for index, (start, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[index]
                else:
                    self._free[index] = (start + size, free - size)
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Takes a range back and joins it with its free neighbours."""
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (start, size)]):
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged

    def grow(self, capacity: int) -> None:
        """Raises the capacity."""
        added = capacity - self.capacity
        start, self.capacity = self.capacity, capacity
        self.give(start, added)
