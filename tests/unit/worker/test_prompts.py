from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.exceptions import TemplateError

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.prompts import ChatMessage, ChatPrompt, PromptEncoder, TextPrompt, TokenPrompt
from tests.unit.worker.conftest import MAX_CONTEXT, VOCAB_SIZE, CharTokenizer


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def encoder(executor: ThreadPoolExecutor) -> PromptEncoder:
    return PromptEncoder(CharTokenizer(), VOCAB_SIZE, MAX_CONTEXT, executor)


def chat(*turns: tuple[str, str]) -> ChatPrompt:
    return ChatPrompt(tuple(ChatMessage(role, content) for role, content in turns))


async def test_plain_text_is_tokenised_without_a_template(encoder: PromptEncoder) -> None:
    assert await encoder.encode(TextPrompt("ab")) == (97, 98)


async def test_a_chat_goes_through_the_template_and_asks_for_an_answer(encoder: PromptEncoder) -> None:
    ids = await encoder.encode(chat(("user", "hi")))
    assert "".join(map(chr, ids)) == "<user>hi<assistant>"


async def test_token_ids_pass_as_they_are(encoder: PromptEncoder) -> None:
    assert await encoder.encode(TokenPrompt((0, 5, VOCAB_SIZE - 1))) == (0, 5, VOCAB_SIZE - 1)


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE])
async def test_a_token_id_out_of_the_vocabulary_is_named_by_its_place(
    encoder: PromptEncoder, bad: int
) -> None:
    with pytest.raises(MeshError) as caught:
        await encoder.encode(TokenPrompt((1, bad)))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == "token_ids.ids[1]"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (TextPrompt(""), "text"),
        (TokenPrompt(()), "token_ids.ids"),
        (chat(), "chat.messages"),
        (chat(*[("user", "x")] * 1025), "chat.messages"),
        (chat(("user", "x"), ("tool", "y")), "chat.messages[1].role"),
    ],
)
async def test_an_input_without_content_or_with_a_wrong_role_names_its_field(
    encoder: PromptEncoder, prompt: TextPrompt | TokenPrompt | ChatPrompt, field: str
) -> None:
    with pytest.raises(MeshError) as caught:
        await encoder.encode(prompt)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field


async def test_a_prompt_that_fills_the_context_is_too_long(encoder: PromptEncoder) -> None:
    assert len(await encoder.encode(TextPrompt("x" * (MAX_CONTEXT - 1)))) == MAX_CONTEXT - 1
    with pytest.raises(MeshError) as caught:
        await encoder.encode(TextPrompt("x" * MAX_CONTEXT))
    assert caught.value.reason is Reason.PROMPT_TOO_LONG
    assert caught.value.metadata["prompt_tokens"] == str(MAX_CONTEXT)
    assert caught.value.metadata["max_context_tokens"] == str(MAX_CONTEXT)


async def test_a_base_without_a_chat_template_says_so(executor: ThreadPoolExecutor) -> None:
    tokenizer = CharTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(MeshError, match="no chat template"):
        await PromptEncoder(tokenizer, VOCAB_SIZE, MAX_CONTEXT, executor).encode(chat(("user", "hi")))


async def test_what_the_template_refuses_is_the_callers_fault(executor: ThreadPoolExecutor) -> None:
    class Strict(CharTokenizer):
        def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> list[int]:
            raise TemplateError("roles must alternate")

    with pytest.raises(MeshError, match="roles must alternate") as caught:
        await PromptEncoder(Strict(), VOCAB_SIZE, MAX_CONTEXT, executor).encode(chat(("user", "hi")))
    assert caught.value.code is Code.INVALID_ARGUMENT
