"""The words around a question and a solution: the instruction, the template and the two answer words.

The only place that knows them. `render` turns the settings and a tokenizer into a `Frame` of three fixed texts and two
answer tokens; the frame is stored with the adapter and is all that scoring needs, so a template that changes by
itself (one that prints today's date, say) cannot change what a trained verifier sees.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..config import Prompt
from ..errors import ConfigError, ModelError

QUESTION, SOLUTION = "\u2045question\u2046", "\u2045solution\u2046"
BODY = f"{{instruction}}\n\nQuestion:\n{QUESTION}\n\nSolution:\n{SOLUTION}"
PLAIN_END = "\n\nAnswer:"
DIFFER = "the two words must differ in their token"


@dataclass(frozen=True)
class Frame:
    """What stands before, between and after question and solution, and the two words that answer.

    A row's tokens are prefix + question + middle + solution + suffix; the label is the token after the suffix.
    """

    prefix: str
    middle: str
    suffix: str
    answers: tuple[str, str]
    """The words for correct and incorrect."""
    answer_ids: tuple[int, int]
    """Their token ids."""
    max_length: int
    """Tokens a row may have, without the label."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Any) -> "Frame":
        """Raises ValueError for values that `to_json` would not have written."""
        try:
            return TypeAdapter(Frame).validate_python(values)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors()]
        raise ValueError("; ".join(wrong))


def filled(prompt: Prompt) -> str:
    """The instruction with the answer words in it. Raises ConfigError for what is wrong whatever the tokenizer: the
    same word twice, or other braces."""
    true, false = prompt.answers
    if true == false:
        raise ConfigError(f"prompt.answers = {prompt.answers}: {DIFFER}")
    try:
        return prompt.instruction.format(true=true, false=false)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"prompt.instruction: only {{true}} and {{false}} may stand in braces (double other braces): {error}"
        ) from None


def render(prompt: Prompt, tokenizer: Any) -> Frame:
    """Fixes the prompt for one tokenizer (a transformers fast tokenizer).

    Raises ConfigError if the template cannot hold a question and a solution, or if an answer word is not one token.
    """
    instruction = filled(prompt)
    chat = bool(tokenizer.chat_template) if prompt.template == "auto" else prompt.template == "chat"
    if chat and not tokenizer.chat_template:
        raise ConfigError("prompt.template = 'chat': this tokenizer has no chat template; use 'plain' or 'auto'")
    body = BODY.replace("{instruction}", instruction)
    text = _chat(body, tokenizer) if chat else (tokenizer.bos_token or "") + body + PLAIN_END
    if text.count(QUESTION) != 1 or text.count(SOLUTION) != 1 or text.index(QUESTION) > text.index(SOLUTION):
        raise ConfigError("prompt.template: the chat template does not keep a message's text; use template = 'plain'")
    prefix, rest = text.split(QUESTION)
    middle, suffix = rest.split(SOLUTION)
    ids = tuple(_answer_id(word, suffix, tokenizer, leading_space=not chat) for word in prompt.answers)
    if ids[0] == ids[1]:
        raise ConfigError(f"prompt.answers = {prompt.answers}: {DIFFER}")
    return Frame(prefix, middle, suffix, prompt.answers, (ids[0], ids[1]), prompt.max_length)


def check_answers(frame: Frame, tokenizer: Any) -> None:
    """Raises ModelError if a frame's answer tokens are not its words in this tokenizer: it is another model's. One that
    lowers what it reads has "true" for "True"."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for word, number in zip(frame.answers, frame.answer_ids, strict=True):
        read = tokenizer.decode([number]).strip() if 0 <= number < len(tokenizer) else None
        if read is None or (read != word.strip() and ids(read) != ids(word.strip())):
            raise ModelError(
                f"the adapter answers {word!r} with token {number}, which is {read!r} for this base model's tokenizer: "
                "it was trained on another base model"
            )


def _chat(body: str, tokenizer: Any) -> str:
    message = [{"role": "user", "content": body}]
    try:
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # a template is a program of its author's: anything can come out of it
        raise ConfigError(f"prompt.template: the chat template failed ({error}); use template = 'plain'") from None


def _answer_id(word: str, suffix: str, tokenizer: Any, *, leading_space: bool) -> int:
    """The one token that `word` adds after `suffix`."""
    spoken = f" {word}" if leading_space else word
    before = tokenizer.encode(suffix, add_special_tokens=False)
    after = tokenizer.encode(suffix + spoken, add_special_tokens=False)
    added = (
        after[len(before) :] if after[: len(before)] == before else tokenizer.encode(spoken, add_special_tokens=False)
    )
    if not word.strip() or len(added) != 1:
        pieces = tokenizer.convert_ids_to_tokens(added)
        raise ConfigError(
            f"prompt.answers: {word!r} is {len(added)} tokens for this tokenizer ({pieces}), but must be one; "
            "try True/False, Yes/No or another common word"
        )
    return added[0]
