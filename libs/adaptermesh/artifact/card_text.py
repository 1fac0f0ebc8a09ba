"""A card (README.md): its front matter, and the text below."""


def split_card(text: str) -> tuple[str, str]:
    """A card's front matter, empty if it has none, and what is below."""
    text = text.strip()
    first, _, rest = text.partition("\n")
    if first.rstrip() != "---":
        return "", text
    front, _, body = f"\n{rest}".partition("\n---")
    return front, body


def card_is_empty(text: str) -> bool:
    """True for a card that says nothing below its front matter."""
    return not split_card(text)[1].strip("- \n\r\t")
