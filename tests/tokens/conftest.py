"""Tokenizers to try content on: real ones where they are there, and ones built here, which run everywhere."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_level, pieces_with_controls, worked_text


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)


@pytest.fixture(scope="session")
def llama3(llama3_tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(llama3_tokenizer),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
            "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        ),
    )


@pytest.fixture(scope="session")
def bpe() -> Any:
    """Byte-level, with ChatML's special tokens and `<think>`, `</think>` added as ordinary ones."""
    return byte_level(worked_text())


@pytest.fixture(scope="session")
def unigram() -> Any:
    """SentencePiece-like; text matches its pieces `<s>` and `</s>`. Line breaks are added tokens, as in Gemma's."""
    return pieces_with_controls([("\n", False), ("\n\n", False), ("\u2581\u2581", False), ("<table>", False)])
