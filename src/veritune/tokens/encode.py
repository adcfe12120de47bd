"""A row becomes token ids. What a question or a solution says can never become a control token.

The fixed texts of the frame are read by the tokenizer as it is. Question and solution are read by a copy of it without
added tokens, so that `<|im_end|>` in a solution is nine ordinary characters.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..errors import DataError, ModelError
from .prompt import Frame

Ids = np.ndarray  # int32 [tokens]
CUT = " … "


@dataclass(frozen=True)
class Encoder:
    """Encodes rows inside one frame; build it with `encoder`."""

    frame: Frame
    content: Tokenizer
    control: frozenset[int]
    unknown: int | None
    """The token of what a vocabulary cannot spell, if the tokenizer has one."""
    prefix: Ids
    middle: Ids
    suffix: Ids
    cut: Ids
    known: dict[str, Ids] | None = None
    """Ids of contents encoded before, for those who encode the same rows again and again."""

    def rows(self, questions: Sequence[str], solutions: Sequence[str]) -> tuple[list[Ids], list[bool]]:
        """Ids of each row, int32 [its tokens], up to the token before the label; and whether it was cut to fit."""
        distinct = {question: i for i, question in enumerate(dict.fromkeys(questions))}
        question_ids = self.texts(list(distinct))
        solution_ids = self.texts(solutions)
        room = self.frame.max_length - len(self.prefix) - len(self.middle) - len(self.suffix)
        rows, cut = [], []
        for question, solution in zip(questions, solution_ids, strict=True):
            asked = question_ids[distinct[question]]
            cut.append(len(asked) + len(solution) > room)
            if cut[-1]:
                asked = self.shorten(asked, max(room - len(solution), room // 2))
                solution = self.shorten(solution, room - len(asked))
            rows.append(np.concatenate((self.prefix, asked, self.middle, solution, self.suffix)))
        return rows, cut

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of contents, none of them a control token. Raises DataError if a text is not valid Unicode or a tokenizer
        cannot spell it out."""
        if self.known is None:
            return self._texts(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known.update(zip(new, self._texts(new), strict=True))
        return [self.known[text] for text in texts]

    def fingerprint(self, texts: Sequence[str]) -> str:
        """16 hexadecimal digits that change with how any of these contents is read: by them a tokenizer is known."""
        digest = hashlib.sha256()
        for ids in self.texts(texts):
            digest.update(b"%d " % len(ids) + ids.tobytes())
        return digest.hexdigest()[:16]

    def _texts(self, texts: Sequence[str]) -> list[Ids]:
        try:
            encoded = self.content.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:  # what tokenizers says to half of a surrogate pair
            broken = next((text for text in texts if text != text.encode(errors="replace").decode()), "")
            raise DataError(f"not valid Unicode: {broken[:80]!r}") from None
        return [
            np.array(item.ids if self.control.isdisjoint(item.ids) else self.spell(text, item), dtype=np.int32)
            for text, item in zip(texts, encoded, strict=True)
        ]

    def spell(self, text: str, encoded: Encoding) -> list[int]:
        """Ids in which each control token is written out, letter by letter: for vocabularies that hold a control
        token's text as an ordinary piece, and for characters they have no token for, which become question marks
        (SmolLM2 has none for U+001D, and its unknown token is the one that ends a text)."""
        ids: list[int] = []
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if token not in self.control:
                ids.append(token)
                continue
            for letter in self.content.encode_batch(list(text[start:end]), add_special_tokens=False):
                known = letter if self.unknown not in letter.ids else self.content.encode("?", add_special_tokens=False)
                ids += known.ids
        if not self.control.isdisjoint(ids):
            raise DataError(f"this tokenizer cannot spell {text[:80]!r} without a control token")
        return ids

    def shorten(self, ids: Ids, room: int) -> Ids:
        """Takes tokens out of the middle, leaving a mark, so that `room` are left."""
        if len(ids) <= room:
            return ids
        kept = max(room - len(self.cut), 0)
        head = kept // 2
        return np.concatenate((ids[:head], self.cut, ids[len(ids) - (kept - head) :]))[-room:]


def encoder(frame: Frame, tokenizer: Any) -> Encoder:
    """An encoder for a frame and a transformers fast tokenizer. Raises ModelError if the tokenizer is not a fast one,
    or if the frame's fixed texts leave too little of `max_length`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json first")
    spec = json.loads(backend.to_str())
    # Some vocabularies (Gemma's) add line breaks and runs of spaces as tokens of their own: those are ordinary text.
    control = frozenset(
        token["id"] for token in spec["added_tokens"] if token["special"] or token["content"].strip("\u2581 \t\r\n")
    )
    spec["added_tokens"] = []
    for key in ("post_processor", "truncation", "padding"):
        spec[key] = None
    content = Tokenizer.from_str(json.dumps(spec))

    def fixed(text: str) -> Ids:
        return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    prefix, middle, suffix = fixed(frame.prefix), fixed(frame.middle), fixed(frame.suffix)
    room = frame.max_length - len(prefix) - len(middle) - len(suffix)
    if room < 16:
        raise ModelError(
            f"prompt.max_length = {frame.max_length} leaves {room} tokens for question and solution; "
            f"the fixed prompt takes {frame.max_length - room}"
        )
    cut = np.zeros(0, dtype=np.int32)
    plain = Encoder(frame, content, control, tokenizer.unk_token_id, prefix, middle, suffix, cut)
    return replace(plain, cut=plain.texts([CUT])[0])
