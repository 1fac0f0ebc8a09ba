import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.patterns import Budget, PatternError, full_matcher, suffix_matcher

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.layers.2.mlp.down_proj",
    "transformer.h.10.attn.c_attn",
    "lm_head",
    "q_proj",
    "",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "^model.layers.1.self_attn.q_proj",
        "^q_proj",
        r"model\.layers\.(0|1)\.self_attn\.(q|v)_proj",
        r".*\.[qv]_proj",
        r".*",
        r".+proj$",
        r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))",
        r"model.layers.\d{2}.*",
        r"model.layers.\d{1,2}.*_proj",
        r"layers\.([0-9]|1[0-2])\..*",
        r"[^.]*",
        r"\w+",
        r"(a|)*lm_head",
        r"lm_?head",
        r"(lm|head|_)+",
        r"()",
        r"|lm_head",
        r"[]l]m_head",
        r"q-?_proj",
    ],
)
def test_a_pattern_matches_as_python_would(pattern: str) -> None:
    full = full_matcher(pattern, Budget())
    suffix = suffix_matcher(pattern, Budget())
    for path in PATHS:
        assert full(path) == bool(re.fullmatch(pattern, path)), path
        assert suffix(path) == bool(re.match(rf"(.*\.)?({pattern})$", path)), path


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@settings(max_examples=300, deadline=None)
@given(
    pattern=st.text(alphabet="ab.|()*+?[]^$\\{},12-", max_size=12),
    text=st.text(alphabet="ab.1", max_size=6),
)
def test_any_pattern_matches_as_python_would_or_is_refused(pattern: str, text: str) -> None:
    try:
        full, suffix = full_matcher(pattern, Budget()), suffix_matcher(pattern, Budget())
    except PatternError:
        return
    assert full(text) == bool(re.fullmatch(pattern, text))
    assert suffix(text) == bool(re.match(rf"(.*\.)?({pattern})$", text))


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)a",
        "(?i)a",
        "(?P<n>a)",
        r"(a)\1",
        "(a",
        "a)",
        "a)|(b",
        "[a",
        "[a-",
        "[z-a]",
        "[[:alpha:]]",
        r"\Aa",
        r"\pN",
        "*a",
        "a**",
        "a*+",
        "a{2}{3}",
        "a{3,2}",
        "a{,2}",
        "a{1001}",
        "a\\",
        r"\n",
        "((a{100}){100})",
        "a" * 513,
    ],
)
def test_a_pattern_outside_of_the_supported_syntax_is_refused(pattern: str) -> None:
    for make in (full_matcher, suffix_matcher):
        with pytest.raises(PatternError):
            make(pattern, Budget())


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*b", "a?" * 60 + "a" * 60 + "b"])
def test_patterns_that_hang_a_backtracking_engine_end_in_linear_steps(pattern: str) -> None:
    budget = Budget()
    assert not full_matcher(pattern, budget)("a" * 200)
    assert budget.steps > 49_000_000


def test_matching_ends_when_the_budget_is_spent() -> None:
    matches = full_matcher("(.*.*.*)*b", Budget(2_000))
    with pytest.raises(PatternError, match="too long"):
        matches("a" * 2_000)
