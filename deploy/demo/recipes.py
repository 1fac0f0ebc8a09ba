"""How each demo adapter is trained."""

from dataclasses import dataclass

BASE_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Recipe:
    """One training; `name` is a task of data.py and the adapter's folder."""

    name: str
    description: str
    tags: tuple[str, ...]
    rank: int
    alpha: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float
    seed: int
    batch: int = 8
    warmup: int = 5
    start_from: str = ""  # a recipe whose adapter is trained further


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "financial-ner-v1",
            "Companies, amounts and dates of a financial sentence as compact JSON.",
            ("finance", "ner", "json"),
            rank=8,
            alpha=16,
            targets=("q_proj", "v_proj"),
            steps=100,
            learning_rate=2e-3,
            seed=11,
        ),
        Recipe(
            "financial-ner-v2",
            "The event of a financial sentence, its companies, persons, amounts and dates as compact JSON.",
            ("finance", "ner", "json", "events"),
            rank=8,
            alpha=16,
            targets=("q_proj", "v_proj"),
            steps=80,
            learning_rate=1.5e-3,
            seed=12,
            start_from="financial-ner-v1",
        ),
        Recipe(
            "text-to-sql-v1",
            "A question about employees, orders or products as one SQL query.",
            ("sql", "code"),
            rank=4,
            alpha=8,
            targets=("q_proj", "k_proj", "v_proj", "o_proj"),
            steps=110,
            learning_rate=2e-3,
            seed=13,
        ),
        Recipe(
            "pirate-v1",
            "Answers in the speech of a pirate.",
            ("style", "fun"),
            rank=4,
            alpha=16,
            targets=("o_proj", "down_proj"),
            steps=80,
            learning_rate=1e-3,
            seed=14,
        ),
    )
}
