"""How settings and a tokenizer become a frame, and which ones are refused."""

import copy
import dataclasses
import json
from typing import Any

import polars as pl
import pytest
from tiny_models import CHAT, byte_level, worked_text
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veritune import config
from veritune.errors import ConfigError, ModelError
from veritune.tokens.encode import encoder
from veritune.tokens.prompt import Frame, check_answers, render
from veritune.training.feed import Rows


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def text_of(frame: Frame) -> str:
    return f"{frame.prefix}Q?{frame.middle}S.{frame.suffix}"


def test_chat_template(bpe: Any) -> None:
    frame = render(config.Prompt(), bpe)
    assert text_of(frame) == (
        "<|im_start|>user\nCheck the solution to the math problem step by step. Answer True if its final answer is "
        "correct, otherwise answer False.\n\nQuestion:\nQ?\n\nSolution:\nS.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert frame.answer_ids == tuple(bpe.convert_tokens_to_ids(["True", "False"]))


def test_plain_template(bpe: Any) -> None:
    frame = render(config.Prompt(template="plain"), bpe)
    assert text_of(frame) == (
        "<|im_start|>Check the solution to the math problem step by step. Answer True if its final answer is correct, "
        "otherwise answer False.\n\nQuestion:\nQ?\n\nSolution:\nS.\n\nAnswer:"
    )
    # After "Answer:" the word comes with its space.
    assert frame.answer_ids == tuple(bpe.convert_tokens_to_ids(["ĠTrue", "ĠFalse"]))


def test_auto_takes_plain_where_there_is_no_chat_template(bpe: Any) -> None:
    bare = with_template(bpe, None)
    assert render(config.Prompt(), bare) == render(config.Prompt(template="plain"), bpe)
    with pytest.raises(ConfigError, match="no chat template; use 'plain' or 'auto'"):
        render(config.Prompt(template="chat"), bare)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_other_answer_words(bpe: Any, template: Any) -> None:
    frame = render(config.Prompt(answers=("Yes", "No"), template=template), bpe)
    assert "Answer Yes if its final answer is correct, otherwise answer No." in frame.prefix
    assert [bpe.decode([i]).strip() for i in frame.answer_ids] == ["Yes", "No"]


def test_real_chat_templates(smollm2_tokenizer: Any, llama3: Any) -> None:
    smol, llama = render(config.Prompt(), smollm2_tokenizer), render(config.Prompt(), llama3)
    assert smol.prefix.startswith("<|im_start|>system\n")
    assert smol.suffix == "<|im_end|>\n<|im_start|>assistant\n"
    assert llama.suffix == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert llama.prefix.count("<|begin_of_text|>") == 1
    for tokenizer, frame in ((smollm2_tokenizer, smol), (llama3, llama)):
        assert tokenizer.convert_ids_to_tokens(list(frame.answer_ids)) == ["True", "False"]


def test_a_word_of_several_tokens_is_refused_with_its_pieces(bpe: Any) -> None:
    pieces = bpe.tokenize("Incorrect")
    assert len(pieces) > 1
    with pytest.raises(ConfigError) as caught:
        render(config.Prompt(answers=("True", "Incorrect")), bpe)
    message = str(caught.value)
    assert "'Incorrect' is" in message
    assert f"{len(pieces)} tokens" in message
    assert str(pieces) in message


@pytest.mark.parametrize("word", ["", " ", "\n"])
def test_an_empty_word_is_refused(bpe: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.answers"):
        render(config.Prompt(answers=("True", word)), bpe)


def test_equal_words_are_refused(bpe: Any) -> None:
    with pytest.raises(ConfigError, match="must differ"):
        render(config.Prompt(answers=("True", "True")), bpe)


def test_words_that_a_tokenizer_reads_alike_are_refused() -> None:
    """One that ignores case."""
    from tokenizers import normalizers

    tokenizer = byte_level(["true false yes no the answer is"] * 20)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="must differ"):
        render(config.Prompt(answers=("True", "true"), instruction="Check."), tokenizer)


def test_a_control_token_in_the_instruction_is_the_users_own(bpe: Any) -> None:
    """The instruction is a setting, not data: it may open a turn of its own."""
    frame = render(config.Prompt(instruction="Hi<|im_end|>\n<|im_start|>user\nCheck."), bpe)
    assert bpe.encode(frame.prefix).count(bpe.eos_token_id) == 1


def test_braces_in_the_instruction(bpe: Any) -> None:
    frame = render(config.Prompt(instruction="Sets are {{1, 2}}. Say {true} or {false}."), bpe)
    assert "Sets are {1, 2}. Say True or False." in frame.prefix
    for instruction in (
        "Say {yes}.",
        "Say {}.",
        "Say {0}.",
        "A set {1, 2}",
        "half {",
        "half }",
        "{true.real}",
        "{true[x]}",
    ):
        with pytest.raises(ConfigError, match=r"prompt\.instruction: only {true} and {false}"):
            render(config.Prompt(instruction=instruction), bpe)


def test_the_instruction_may_talk_of_templates(bpe: Any) -> None:
    frame = render(config.Prompt(instruction="{{instruction}} {{{{ m }}}} {{% x %}}"), bpe)
    assert "{instruction} {{ m }} {% x %}" in frame.prefix


def test_a_template_that_prints_the_date_is_fixed_when_it_is_rendered(bpe: Any) -> None:
    """Llama 3.1's does. A frame holds the text, so a verifier that is used next year sees the date of its training."""
    dated = with_template(bpe, "<|im_start|>system\nNow: {{ strftime_now('%H:%M:%S.%f') }}<|im_end|>\n" + CHAT)
    first, second = render(config.Prompt(), dated), render(config.Prompt(), dated)
    assert first.prefix != second.prefix
    stored = Frame.from_json(json.loads(json.dumps(first.to_json())))
    (row,), _ = encoder(stored, dated).rows(["Q?"], ["S."])
    assert dated.decode(row.tolist()) == text_of(first)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('system role is needed') }}", "failed .*system role is needed"),
        ("{% for m in messages %}{{ m['content'] ", "failed"),
        ("{{ messages[0]['nothing']['at all'] }}", "failed"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "does not keep a message's text"),
        ("{% for m in messages %}{{ m['content'][:40] }}{% endfor %}", "does not keep"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "does not keep"),
        ("{{ messages[0]['content'].split('Solution:')[::-1] | join('Solution:') }}", "does not keep"),
        ("a fixed text", "does not keep"),
    ],
)
def test_templates_that_cannot_hold_a_row_are_refused(bpe: Any, template: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        render(config.Prompt(), with_template(bpe, template))
    assert "'plain'" in str(caught.value)


def test_a_template_that_strips_keeps_the_row(bpe: Any) -> None:
    stripped = with_template(bpe, "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}: ")
    frame = render(config.Prompt(answers=("True", "False")), stripped)
    assert text_of(frame).endswith("Solution:\nS.]: ")


def test_a_template_that_thinks_is_told_not_to(bpe: Any) -> None:
    """Qwen 3's: the answer word must be the assistant's first, not the first of a train of thought."""
    thinking = with_template(
        bpe, CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}"
    )
    assert render(config.Prompt(), thinking).suffix.endswith("assistant\n<think>")


def test_a_frame_survives_json(bpe: Any) -> None:
    frame = render(config.Prompt(instruction='Ünïcode \u2028 \\ " {{}} Say {true}.', max_length=300), bpe)
    again = Frame.from_json(json.loads(json.dumps(frame.to_json())))
    assert again == frame
    assert isinstance(again.answer_ids, tuple)


def test_answer_and_gold_never_enter_a_row(bpe: Any) -> None:
    columns = {
        "id": ["a", "b"],
        "qid": ["q", "q"],
        "question": ["What is 3 * 4?"] * 2,
        "solution": ["12", "13"],
        "is_correct": [True, False],
    }
    encode = encoder(render(config.Prompt(), bpe), bpe)
    plain = Rows.of(pl.DataFrame(columns))
    told = Rows.of(pl.DataFrame({**columns, "answer": ["777", "888"], "gold": ["777", "777"]}))
    flipped = Rows.of(pl.DataFrame({**columns, "is_correct": [False, True]}))
    rows = [[row.tolist() for row in encode.rows(it.questions, it.solutions)[0]] for it in (plain, told, flipped)]
    assert rows[0] == rows[1] == rows[2]


def test_words_in_the_frame_are_the_instructions_alone(bpe: Any) -> None:
    """The label itself stands nowhere in a row: the frame names both words, equally often."""
    tokens = bpe.tokenize(text_of(render(config.Prompt(), bpe)))
    counts = [sum(token.strip("Ġ") == word for token in tokens) for word in ("True", "False")]
    assert counts == [1, 1]


def test_the_texts_of_training_make_the_words_single_tokens() -> None:
    """What the fixtures of other tests rest on."""
    tokenizer = byte_level(worked_text(20))
    for answers in (("True", "False"), ("Yes", "No")):
        assert len(set(render(config.Prompt(answers=answers), tokenizer).answer_ids)) == 2


def test_the_answers_of_a_tokenizer_that_lowers_what_it_reads_are_its_words() -> None:
    words = ["[UNK]", "true", "false", "yes"]
    model = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    frame = render(config.Prompt(template="plain"), tokenizer)
    assert [words[place] for place in frame.answer_ids] == ["true", "false"]
    check_answers(frame, tokenizer)
    with pytest.raises(ModelError, match="another base model"):
        check_answers(dataclasses.replace(frame, answer_ids=(words.index("yes"), frame.answer_ids[1])), tokenizer)
