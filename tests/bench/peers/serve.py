"""The child's side of a peer: answers JSON lines. Standard library only, for it runs in every environment."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[[dict[str, Any]], Any]


def serve(commands: Mapping[str, Handler]) -> None:
    """Reads `{"do": <command>, ...}` lines until the end of stdin; answers `{"ok"}` or `{"error"}` lines."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever a library prints must not fall between the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = {"ok": commands[message.pop("do")](message)}
        except Exception:  # noqa: BLE001  # the top of the process: the parent hears of every failure
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
