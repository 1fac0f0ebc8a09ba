"""The engine's lock."""

import threading


class Bell(threading.Condition):
    """A re-entrant lock that counts its notices: one that comes between a look and a wait is not lost."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.rings = 0

    def notify_all(self) -> None:
        self.rings += 1
        super().notify_all()
