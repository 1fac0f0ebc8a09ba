"""Financial sentences and their entities as compact JSON.

Version 1 answers {"company": [...], "amount": [...], "date": [...]}; version 2 puts the event first and adds
persons.
Held-out sentences use wordings, companies and persons that no training sentence has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from example import Example, words

PREFIX = "List the entities: "


@dataclass(frozen=True)
class Words:
    """What the sentences of one split are made of."""

    stems: Sequence[str]
    suffixes: Sequence[str]
    companies: Sequence[str]
    first_names: Sequence[str]
    last_names: Sequence[str]
    # (event, sentence); {a} and {b} are companies, {p} a person, {m} an amount, {d} a date.
    templates: Sequence[tuple[str, str]]


TRAIN = Words(
    stems=words(
        "Northgate, Halden, Vexal, Brightwater, Orion, Castell, Meridian, Ashford, Kestrel, Lumen, "
        "Redwood, Solvay, Tavira, Blackstone, Corvus, Delmar, Eastbrook, Fairmont, Granite, Hartwell, "
        "Ironbridge, Juniper, Kingsley, Larkfield, Marlowe, Nordvik, Oakline, Pemberton, Quillan, "
        "Rosewell, Silverton, Thornbury, Umbra, Vantage, Westlake, Yarrow, Zephyr"
    ),
    suffixes=words(
        "Bank, Energy, Robotics, Group, Holdings, Pharma, Steel, Capital, Motors, Foods, Insurance, "
        "Labs, Airlines, Media"
    ),
    companies=words(
        "Amazon, IBM, Intel, Oracle, Ford, Boeing, Volkswagen, BASF, Bayer, Unilever, HSBC, Barclays, "
        "UBS, Visa, Netflix, Tesla, Adobe, Cisco, Walmart, Target, Chevron, BP, Total, Airbus, "
        "Renault, Philips, Ericsson, Volvo, Honda, Samsung"
    ),
    first_names=words(
        "Anna, David, Laura, Peter, Susan, Mark, Elena, Thomas, Julia, Robert, Nina, Paul, Sarah, "
        "James, Olga, Daniel"
    ),
    last_names=words(
        "Weber, Lopez, Smith, Novak, Brown, Rossi, Keller, Martin, Jensen, Clarke, Moreau, Fischer, "
        "Hughes, Larsen"
    ),
    templates=(
        ("acquisition", "{a} bought {b} for {m} in {d}."),
        ("acquisition", "{a} agreed to acquire {b} for {m} on {d}."),
        ("acquisition", "In {d}, {a} paid {m} for {b}."),
        ("acquisition", "{p}, head of {a}, signed the {m} purchase of {b}."),
        ("acquisition", "{b} was sold to {a} for {m} in {d}."),
        ("earnings", "{a} reported a profit of {m} for {d}."),
        ("earnings", "{a} lost {m} in {d}, said {p}."),
        ("earnings", "Revenue of {a} rose to {m} in {d}."),
        ("earnings", "In {d}, sales at {a} fell by {m}."),
        ("funding", "{a} raised {m} from {b} in {d}."),
        ("funding", "{b} invested {m} in {a} on {d}."),
        ("funding", "Investors led by {b} put {m} into {a}."),
        ("fine", "Regulators fined {a} {m} in {d}."),
        ("fine", "{a} must pay a fine of {m}, a court said on {d}."),
        ("fine", "In {d}, {a} was ordered to pay {m} in penalties."),
        ("appointment", "{a} named {p} chief executive in {d}."),
        ("appointment", "{p} will leave {a} and join {b} in {d}."),
        ("appointment", "On {d}, {p} became chairman of {a}."),
        ("loan", "{a} borrowed {m} from {b} in {d}."),
        ("loan", "{b} granted {a} a loan of {m}."),
        ("dividend", "{a} will pay a dividend of {m} on {d}."),
        ("dividend", "{p} said {a} would return {m} to its shareholders in {d}."),
    ),
)

HELD_OUT = Words(
    stems=words(
        "Alderney, Bexley, Calloway, Dunmore, Eldridge, Falcon, Glenmore, Hollis, Inverness, "
        "Montrose, Pinecrest, Rivermark"
    ),
    suffixes=words("Logistics, Telecom, Partners, Chemicals, Software, Systems"),
    companies=words(
        "Siemens, Apple, Microsoft, Toyota, Nestle, Pfizer, Shell, Nvidia, Novartis, Sony, Deutsche "
        "Bank, Heineken"
    ),
    first_names=words("Maria, Kevin, Ingrid, Carlos, Helen, Victor"),
    last_names=words("Chen, Schmidt, Okafor, Larkin, Petrov, Dubois"),
    templates=(
        ("acquisition", "{a} completed its {m} takeover of {b} in {d}."),
        ("acquisition", "{a} is buying {b} for {m}, {p} said on {d}."),
        ("earnings", "{a} posted a loss of {m} for {d}."),
        ("earnings", "Profit at {a} climbed to {m} in {d}."),
        ("funding", "{a} secured {m} of new funding from {b} in {d}."),
        ("fine", "A judge fined {a} {m} on {d}."),
        ("appointment", "{a} appointed {p} as finance chief in {d}."),
        ("loan", "{b} lent {m} to {a} in {d}."),
        ("dividend", "{a} raised its dividend to {m} in {d}."),
    ),
)

_MONTHS = words(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
_DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday")


def train_v1(rng: Random, count: int) -> list[Example]:
    return [_example(TRAIN, rng, typed=False) for _ in range(count)]


def held_out_v1(rng: Random, count: int) -> list[Example]:
    return [_example(HELD_OUT, rng, typed=False) for _ in range(count)]


def train_v2(rng: Random, count: int) -> list[Example]:
    return [_example(TRAIN, rng, typed=True) for _ in range(count)]


def held_out_v2(rng: Random, count: int) -> list[Example]:
    return [_example(HELD_OUT, rng, typed=True) for _ in range(count)]


def score(answer: str, example: Example) -> float:
    """F1 over (class, entity); an answer that is no JSON object scores zero."""
    wanted, found = _entities(example.answer), _entities(answer)
    hits = len(wanted & found)
    return 2 * hits / (len(wanted) + len(found)) if hits else 0.0


def _entities(answer: str) -> set[tuple[str, str]]:
    try:
        value = json.loads(answer)
    except ValueError:
        return set()
    if not isinstance(value, dict):
        return set()
    pairs = ((kind, entry if isinstance(entry, list) else [entry]) for kind, entry in value.items())
    return {(kind, str(text)) for kind, texts in pairs for text in texts}


def _example(words: Words, rng: Random, *, typed: bool) -> Example:
    event, template = rng.choice(words.templates)
    first, second = _companies(words, rng)
    person = f"{rng.choice(words.first_names)} {rng.choice(words.last_names)}"
    slots = {"a": first, "b": second, "p": person, "m": _amount(rng), "d": _date(rng, template)}
    kinds = {"a": "company", "b": "company", "p": "person", "m": "amount", "d": "date"}
    entities: dict[str, list[str]] = {"company": [], "person": [], "amount": [], "date": []}
    for slot in sorted(
        (s for s in slots if f"{{{s}}}" in template), key=lambda s: template.index(f"{{{s}}}")
    ):
        entities[kinds[slot]].append(slots[slot])
    if not typed:
        del entities["person"]
    answer = {"event": event, **entities} if typed else entities
    return Example(
        PREFIX + template.format(**slots), json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
    )


def _companies(words: Words, rng: Random) -> tuple[str, str]:
    def one() -> str:
        if rng.random() < 0.5:
            return rng.choice(words.companies)
        return f"{rng.choice(words.stems)} {rng.choice(words.suffixes)}"

    first = one()
    while (second := one()) == first:
        pass
    return first, second


def _amount(rng: Random) -> str:
    sign = rng.choice("$$$€£")
    number = str(rng.randint(2, 950)) if rng.random() < 0.5 else f"{rng.randint(1, 60)}.{rng.randint(1, 9)}"
    return f"{sign}{number} {rng.choice(('million', 'billion'))}"


def _date(rng: Random, template: str) -> str:
    year = rng.randint(2005, 2026)
    if "on {d}" in template.lower():
        return rng.choice((f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {year}", rng.choice(_DAYS)))
    return rng.choice((f"{rng.choice(_MONTHS)} {year}", str(year), f"Q{rng.randint(1, 4)} {year}"))
