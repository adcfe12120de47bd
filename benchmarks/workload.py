"""One workload for every engine: real rows as token ids of the Llama-3 tokenizer, in veritune's prompt.

    python benchmarks/workload.py --data ../shared/data --tokenizer LLAMA3_FOLDER|GGUF --out rows.npz [--questions 600]

Writes ids (one flat int32 array with offsets), labels, questions (numbers) and the two answer ids: `--per-question`
solutions of each question, questions in random order. Without --data, generated rows of the same lengths.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def real(data: Path, tokenizer: Path, questions: int, per_question: int) -> dict[str, np.ndarray]:
    """Rows of the first `questions` questions of a random order that have enough solutions."""
    import polars as pl
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from veritune import config
    from veritune.tokens import encode, prompt

    if tokenizer.suffix == ".gguf":
        tok = AutoTokenizer.from_pretrained(str(tokenizer.parent), gguf_file=tokenizer.name)
    else:
        tok = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"), bos_token="<|begin_of_text|>")
        tok.chat_template = LLAMA3
    frame = prompt.render(config.Prompt(max_length=2048), tok)
    table = pl.read_ndjson(data / "train.jsonl.gz")
    rng = np.random.default_rng(0)
    groups = [g for _, g in table.group_by("qid", maintain_order=True) if len(g) >= per_question]
    chosen = [groups[i].sample(per_question, seed=0) for i in rng.permutation(len(groups))[:questions]]
    rows = pl.concat(chosen)
    ids, _ = encode.encoder(frame, tok).rows(rows["question"].to_list(), rows["solution"].to_list())
    return pack(ids, rows["is_correct"].to_numpy(), np.repeat(np.arange(len(chosen)), per_question), frame.answer_ids)


def generated(questions: int, per_question: int) -> dict[str, np.ndarray]:
    """Random ids with the lengths of real rows: a common beginning, a question, a solution."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(1000, 120_000, n, dtype=np.int32)  # noqa: E731
    head, middle, end = draw(34), draw(5), draw(5)
    ids, labels = [], []
    for _ in range(questions):
        asked = draw(int(np.clip(rng.lognormal(3.75, 0.45), 10, 300)))
        for _ in range(per_question):
            solution = draw(int(np.clip(rng.lognormal(4.85, 0.5), 20, 900)))
            ids.append(np.concatenate((head, asked, middle, solution, end)))
            labels.append(rng.random() < 0.5)
    return pack(ids, np.array(labels), np.repeat(np.arange(questions), per_question), (2575, 4139))


def pack(ids: list, labels: np.ndarray, questions: np.ndarray, answers: tuple[int, int]) -> dict[str, np.ndarray]:
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in ids])))
    flat = np.concatenate(ids).astype(np.int32)
    return {"ids": flat, "offsets": offsets, "labels": labels, "questions": questions, "answers": np.array(answers)}


def read(path: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, tuple[int, int]]:
    """Rows, labels, questions and answer ids of a file that `main` wrote."""
    z = dict(np.load(path))  # each look into the file itself would decompress it again
    rows = [z["ids"][a:b] for a, b in pairwise(z["offsets"])]
    return rows, z["labels"].astype(bool), z["questions"], (int(z["answers"][0]), int(z["answers"][1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--per-question", type=int, default=8)
    o = parser.parse_args()
    made = real(o.data, o.tokenizer, o.questions, o.per_question) if o.data else generated(o.questions, o.per_question)
    np.savez_compressed(o.out, **made)  # pyright: ignore[reportArgumentType]
    lengths = np.diff(made["offsets"])
    print(f"{o.out}: {len(lengths):,} rows, mean {lengths.mean():.0f} tokens, longest {lengths.max()}")


if __name__ == "__main__":
    main()
