"""Questions about three small tables and the query that answers them.

employees(name, department, city, salary, year), orders(customer, product, country, amount, year),
products(name, category, price, stock). The schema is not in the prompt: the adapter knows it.
Held-out questions use values that no training question has, and some wordings of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from example import Example, words

PREFIX = "Write SQL: "


@dataclass(frozen=True)
class Values:
    """What the questions of one split compare with."""

    departments: Sequence[str]
    cities: Sequence[str]
    countries: Sequence[str]
    categories: Sequence[str]


TRAIN = Values(
    words("Sales, Marketing, Finance, Engineering, Support, Research, Security, Design"),
    words("Paris, London, Madrid, Rome, Vienna, Oslo, Dublin, Chicago, Boston, Tokyo, Sydney, Prague"),
    words("France, Spain, Italy, Norway, Japan, Canada, Brazil, Poland, India, Austria, Mexico, Egypt"),
    words("toys, books, shoes, tools, garden, music, sports, furniture"),
)
HELD_OUT = Values(
    words("Legal, Logistics, Purchasing, Training"),
    words("Berlin, Lisbon, Denver, Geneva"),
    words("Germany, Sweden, Portugal, Chile"),
    words("games, kitchen, electronics, jewelry"),
)

# Question -> query. {dep} {city} {country} {cat} are words, {n} {k} {year} numbers.
COMMON: tuple[tuple[str, str], ...] = (
    ("How many employees work in {dep}?", "SELECT COUNT(*) FROM employees WHERE department = '{dep}';"),
    ("How many employees live in {city}?", "SELECT COUNT(*) FROM employees WHERE city = '{city}';"),
    ("Who works in {dep}?", "SELECT name FROM employees WHERE department = '{dep}';"),
    (
        "Who works in {dep} in {city}?",
        "SELECT name FROM employees WHERE department = '{dep}' AND city = '{city}';",
    ),
    ("What is the average salary in {dep}?", "SELECT AVG(salary) FROM employees WHERE department = '{dep}';"),
    ("What is the highest salary in {city}?", "SELECT MAX(salary) FROM employees WHERE city = '{city}';"),
    ("Which employees earn more than {n}?", "SELECT name FROM employees WHERE salary > {n};"),
    ("Which employees earn less than {n}?", "SELECT name FROM employees WHERE salary < {n};"),
    ("Who are the {k} best paid employees?", "SELECT name FROM employees ORDER BY salary DESC LIMIT {k};"),
    (
        "What is the average salary by department?",
        "SELECT department, AVG(salary) FROM employees GROUP BY department;",
    ),
    ("Who was hired in {year}?", "SELECT name FROM employees WHERE year = {year};"),
    ("How many orders came from {country}?", "SELECT COUNT(*) FROM orders WHERE country = '{country}';"),
    (
        "How many orders came from {country} in {year}?",
        "SELECT COUNT(*) FROM orders WHERE country = '{country}' AND year = {year};",
    ),
    ("What is the total amount of orders in {year}?", "SELECT SUM(amount) FROM orders WHERE year = {year};"),
    (
        "What is the total amount of orders by country?",
        "SELECT country, SUM(amount) FROM orders GROUP BY country;",
    ),
    ("Which customers ordered from {country}?", "SELECT customer FROM orders WHERE country = '{country}';"),
    ("Which orders are above {n}?", "SELECT * FROM orders WHERE amount > {n};"),
    ("What are the {k} largest orders?", "SELECT * FROM orders ORDER BY amount DESC LIMIT {k};"),
    ("Which products cost more than {n}?", "SELECT name FROM products WHERE price > {n};"),
    ("Which products cost less than {n}?", "SELECT name FROM products WHERE price < {n};"),
    ("How many products are in {cat}?", "SELECT COUNT(*) FROM products WHERE category = '{cat}';"),
    ("What is the average price in {cat}?", "SELECT AVG(price) FROM products WHERE category = '{cat}';"),
    ("What are the {k} cheapest products?", "SELECT name FROM products ORDER BY price LIMIT {k};"),
    (
        "Which products in {cat} cost less than {n}?",
        "SELECT name FROM products WHERE category = '{cat}' AND price < {n};",
    ),
    ("Which products are out of stock?", "SELECT name FROM products WHERE stock = 0;"),
    (
        "How many products are there by category?",
        "SELECT category, COUNT(*) FROM products GROUP BY category;",
    ),
)
# Wordings and combinations that only held-out questions have.
UNSEEN: tuple[tuple[str, str], ...] = (
    ("How many people work in {dep}?", "SELECT COUNT(*) FROM employees WHERE department = '{dep}';"),
    ("What is the average salary in {city}?", "SELECT AVG(salary) FROM employees WHERE city = '{city}';"),
    ("What is the highest salary in {dep}?", "SELECT MAX(salary) FROM employees WHERE department = '{dep}';"),
    ("How many orders came in {year}?", "SELECT COUNT(*) FROM orders WHERE year = {year};"),
    (
        "What is the total amount of orders from {country}?",
        "SELECT SUM(amount) FROM orders WHERE country = '{country}';",
    ),
    ("Which products are in {cat}?", "SELECT name FROM products WHERE category = '{cat}';"),
)


def train(rng: Random, count: int) -> list[Example]:
    return [_example(COMMON, TRAIN, rng) for _ in range(count)]


def held_out(rng: Random, count: int) -> list[Example]:
    """Half of them in wordings that training has, all with new values."""
    fillable = tuple(pair for pair in COMMON if "{" in pair[0])
    return [_example(UNSEEN if index % 2 else fillable, HELD_OUT, rng) for index in range(count)]


def score(answer: str, example: Example) -> float:
    """1 for the same query, whatever its spacing, case of the keywords and last semicolon."""
    return float(_normal(answer) == _normal(example.answer))


def _normal(query: str) -> str:
    return " ".join(query.strip().rstrip(";").lower().split())


def _example(pairs: Sequence[tuple[str, str]], values: Values, rng: Random) -> Example:
    question, query = rng.choice(pairs)
    held_out_numbers = values is HELD_OUT
    slots = {
        "dep": rng.choice(values.departments),
        "city": rng.choice(values.cities),
        "country": rng.choice(values.countries),
        "cat": rng.choice(values.categories),
        "n": rng.randint(2, 90) * 1000 + 500 * held_out_numbers
        if "price" not in query
        else rng.randint(5, 400),
        "k": rng.choice((4, 6, 8) if held_out_numbers else (2, 3, 5, 7, 10)),
        "year": rng.choice((2017, 2024) if held_out_numbers else (2018, 2019, 2020, 2021, 2022, 2023)),
    }
    return Example(PREFIX + question.format(**slots), query.format(**slots))
