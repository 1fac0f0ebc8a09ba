"""The demo tasks: what an example is, and where each task's examples and score come from."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import finance
import pirate
import sql
from example import Example


@dataclass(frozen=True)
class Task:
    """A task with its synthetic training examples, its held-out ones and the measure of an answer."""

    name: str
    metric: str
    train: Callable[[Random, int], list[Example]]
    held_out: Callable[[Random, int], list[Example]]
    score: Callable[[str, Example], float]  # in [0, 1], of one answer


TASKS = {
    task.name: task
    for task in (
        Task("financial-ner-v1", "entity F1", finance.train_v1, finance.held_out_v1, finance.score),
        Task("financial-ner-v2", "entity F1", finance.train_v2, finance.held_out_v2, finance.score),
        Task("text-to-sql-v1", "exact query", sql.train, sql.held_out, sql.score),
        Task("pirate-v1", "pirate answers", pirate.train, pirate.held_out, pirate.score),
    )
}
