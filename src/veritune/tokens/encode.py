"""A row becomes token ids. What a question or a solution says can never become a control token.

The fixed texts of the frame are read by the tokenizer as it is. Question and solution are read by a copy of it without
added tokens, so that `<|im_end|>` in a solution is nine ordinary characters.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

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
    prefix: Ids
    middle: Ids
    suffix: Ids
    cut: Ids

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
        """Ids of contents, none of them a control token. Raises DataError if a tokenizer cannot spell one out."""
        encoded = self.content.encode_batch(list(texts), add_special_tokens=False)
        out = [np.array(item.ids, dtype=np.int32) for item in encoded]
        for i, ids in enumerate(out):
            if not self.control.isdisjoint(ids.tolist()):
                out[i] = self.spell(texts[i])
        return out

    def spell(self, text: str) -> Ids:
        """Character by character: for vocabularies that hold a control token's text as an ordinary piece."""
        encoded = self.content.encode_batch(list(text), add_special_tokens=False)
        ids = [i for item in encoded for i in item.ids]
        if not self.control.isdisjoint(ids):
            raise DataError(f"this tokenizer cannot spell {text[:80]!r} without a control token")
        return np.array(ids, dtype=np.int32)

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
    unknown = tokenizer.unk_token_id
    control = frozenset(token["id"] for token in spec["added_tokens"]) - {unknown}
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
    cut = np.array(content.encode(CUT, add_special_tokens=False).ids, dtype=np.int32)
    return Encoder(frame, content, control, prefix, middle, suffix, cut)
