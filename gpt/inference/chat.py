"""Conversations as token ids: a chat template is rendered as transformers renders it, in a sandbox.

A template comes with a model from elsewhere, so it is code that nobody here has read. Jinja's sandbox keeps it from
everything but the messages. What a message says never becomes a special token: nobody can end their own turn and speak
for the system.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpt.data.chat_template import CHAT_TEMPLATE_FILE, ChatTemplate
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.utils.helper import first_line

MARK, UNMARK = "\ufdd0", "\ufdd1"
"""Characters around the name of a special token in a message; Unicode assigns them to nothing, ever."""

Message = Mapping[str, Any]
"""A turn of a conversation: role, content, and whatever else the template reads."""


class ChatEncoder:
    """Encodes conversations for a chat model.

    Args:
        tokenizer: the model's tokenizer.
        template: its chat template.

    Raises:
        UserError: the template is no valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._special_tokens = tokenizer, template.special_tokens
        try:
            self._template = _build_environment().from_string(template.source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template of the tokenizer is not valid: {first_line(error)}; mend {CHAT_TEMPLATE_FILE}, or "
                "remove it to serve completions alone"
            ) from error
        longest_first = sorted(tokenizer.special_names, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or "(?!)"  # which matches nothing
        self._names, self._marked = re.compile(names), re.compile(f"{MARK}({names}){UNMARK}|[{MARK}{UNMARK}]")

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that asks for the next turn of the assistant.

        Raises:
            UserError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template may fail as any program does
            raise UserError(f"the chat template refuses these messages: {first_line(error)}") from error

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the text that asks for the next turn of the assistant.

        Raises:
            UserError: the template refuses the conversation, or a message is not valid Unicode.
        """
        # Odd pieces are names of special tokens that stand in a message; None for a mark that the template cut off.
        pieces = self._marked.split(self.render([self._mark(message) for message in messages]))
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if piece:
                ids += (self._tokenizer.encode if index % 2 else self._tokenizer.encode_special)(piece).tolist()
        return ids

    def _mark(self, value: Any) -> Any:
        """Return a message, or a part of one, with marks around the names of special tokens in it."""
        if isinstance(value, str):
            plain = value.replace(MARK, "").replace(UNMARK, "")
            return self._names.sub(rf"{MARK}\g<0>{UNMARK}", plain)
        if isinstance(value, Mapping):
            return {key: self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, list) else value


class GenerationTag(Extension):
    """The tag `generation`, which marks the assistant's turns for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        """Return the content of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _build_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers renders chat templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _format_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _format_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Return a value as JSON; Jinja's own filter escapes the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
