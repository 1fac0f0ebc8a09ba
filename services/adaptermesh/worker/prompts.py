"""Inputs to token ids: plain text, a conversation, or ids that are only range-checked."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field

MAX_CHAT_MESSAGES = 1024
ROLES = frozenset({"system", "user", "assistant"})


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    chat_template: Any

    def __call__(self, text: str) -> Any:
        """An encoding with `input_ids`, special tokens added as the model expects them."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """The conversation, rendered and tokenised."""
        ...


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text, without a template."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the base model's chat template."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids as they are."""

    ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


class PromptEncoder:
    """Turns prompts into token ids on a thread: tokenizers take milliseconds for long texts."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, max_context_tokens: int, executor: Executor
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._executor = executor

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids: at least one, and room for one more in the context.

        Raises:
            MeshError: INVALID_ARGUMENT, with the field (INVALID_FIELD) or both lengths (PROMPT_TOO_LONG).
        """
        if isinstance(prompt, TokenPrompt):
            return self._bounded(self._checked(prompt.ids), "token_ids.ids")
        loop = asyncio.get_running_loop()
        if isinstance(prompt, TextPrompt):
            if not prompt.text:
                raise invalid_field("text", "is empty")
            return self._bounded(await loop.run_in_executor(self._executor, self._text, prompt.text), "text")
        check_chat(prompt.messages)
        ids = await loop.run_in_executor(self._executor, self._chat, prompt.messages)
        return self._bounded(ids, "chat.messages")

    def _text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text)["input_ids"])

    def _chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise invalid_field("chat", "the base model has no chat template; send text or token_ids")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise invalid_field("chat.messages", f"the chat template refuses them: {error}") from error
        return tuple(ids)

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        for position, token in enumerate(ids):
            if not 0 <= token < self._vocab_size:
                raise invalid_field(
                    f"token_ids.ids[{position}]", f"{token} is not in [0, {self._vocab_size})"
                )
        return ids

    def _bounded(self, ids: tuple[int, ...], field: str) -> tuple[int, ...]:
        if not ids:
            raise invalid_field(field, "holds no tokens")
        if len(ids) >= self._max_context_tokens:
            raise MeshError(
                Code.INVALID_ARGUMENT,
                Reason.PROMPT_TOO_LONG,
                f"{field}: {len(ids)} prompt tokens leave no room in a context of {self._max_context_tokens}",
                metadata={
                    "field": field,
                    "prompt_tokens": str(len(ids)),
                    "max_context_tokens": str(self._max_context_tokens),
                },
            )
        return ids


def check_chat(messages: Sequence[ChatMessage]) -> None:
    """Raises MeshError INVALID_ARGUMENT with the field's path."""
    if not messages:
        raise invalid_field("chat.messages", "is empty")
    if len(messages) > MAX_CHAT_MESSAGES:
        raise invalid_field("chat.messages", f"{len(messages)} messages are more than {MAX_CHAT_MESSAGES}")
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise invalid_field(
                f"chat.messages[{position}].role",
                f"{message.role[:40]!r} is not one of 'system', 'user', 'assistant'",
            )
