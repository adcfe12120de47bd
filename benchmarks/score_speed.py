"""Scoring speed: veritune, vLLM and plain transformers on the rows of workload.py, each in its own process.

    python benchmarks/score_speed.py veritune     ROWS.npz [--shape 8b | --model DIR] [--base bf16|fp8] [--scores FILE]
    python benchmarks/score_speed.py vllm         ROWS.npz --model DIR [--base bf16|fp8]
    python benchmarks/score_speed.py transformers ROWS.npz --model DIR [--batch 64]

Every engine gets token ids, the solutions of a question side by side, and gives P(correct) from one position a row. The
adapter is merged for all, so the base alone is what is timed. `peers.py make DIR` writes the 8B shape as a folder, with
the same weights as `--shape 8b`. Prints a RESULT line: examples/s is the median of three windows after a warm-up.
vLLM needs an environment of its own.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import workload

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_WORKER_MULTIPROC_METHOD="spawn"
)
Score = Callable[[list[np.ndarray]], np.ndarray]
"""Rows (int32 [length] each) -> P(correct), float64 [rows]."""


def veritune(o: argparse.Namespace, answers: tuple[int, int], rows: list[np.ndarray]) -> Score:
    import torch
    from train_speed import random_base

    from veritune import config
    from veritune.model import load, precision, self_check
    from veritune.model.compiled import compile_layers
    from veritune.model.verdict import label_logits
    from veritune.model.verifier import MICRO_BATCH_TOKENS, score_ids
    from veritune.tokens.trie import build, split

    device = load.pick_device("auto")
    budget = o.tokens or MICRO_BATCH_TOKENS[device.type]
    settings = config.Model(path=o.model or o.shape, base=o.base)
    base = load.load_base(settings) if o.model else random_base(o.shape, device, o.base)
    print("paths:", self_check.check_paths(base, 2048) or "ok", flush=True)
    if o.base == "fp8":
        precision.to_fp8(base.model, train=False)

    first = build([rows[i] for i in split(rows[:1024], budget)[0]])

    def centred() -> Any:
        with torch.inference_mode():
            found = label_logits(base.model, first, device)
            return found - found.mean(-1, keepdim=True)

    if device.type == "cuda" and not o.eager:
        print("compiled:", compile_layers(base.model, centred, "logits", precision=o.base) or "ok", flush=True)
    return lambda them: score_ids(base.model, them, answers, device, budget)


def vllm(o: argparse.Namespace, answers: tuple[int, int], rows: list[np.ndarray]) -> Score:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"quantization": "fp8"} if o.base == "fp8" else {}
    if o.scores:  # otherwise vLLM only has to name the likeliest token, the least it can be asked for
        options["logprobs_mode"] = "processed_logprobs"
    model = LLM(
        model=o.model, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.85,
        max_model_len=max(map(len, rows)) + 1, enable_prefix_caching=True, max_num_batched_tokens=o.tokens or 16384,
        max_num_seqs=1024, **options,
    )  # fmt: skip
    words: dict[str, Any] = {"logprobs": 2, "allowed_token_ids": list(answers)} if o.scores else {}
    ask = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **words)

    def score(them: list[np.ndarray]) -> np.ndarray:
        found = model.generate([{"prompt_token_ids": row.tolist()} for row in them], ask, use_tqdm=False)
        if not o.scores:
            return np.zeros(len(them))
        logprobs = [each.outputs[0].logprobs[0] for each in found]
        return np.array([np.exp(of[answers[0]].logprob) for of in logprobs])

    return score


def transformers(o: argparse.Namespace, answers: tuple[int, int], rows: list[np.ndarray]) -> Score:
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).eval()

    def score(them: list[np.ndarray]) -> np.ndarray:
        out, order = np.empty(len(them)), np.argsort([len(row) for row in them])
        with torch.inference_mode():
            for start in range(0, len(order), o.batch):
                part = order[start : start + o.batch]
                width = max(len(them[i]) for i in part)
                ids = torch.zeros(len(part), width, dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for line, i in enumerate(part):
                    ids[line, width - len(them[i]) :] = torch.from_numpy(them[i].astype(np.int64))
                    mask[line, width - len(them[i]) :] = 1
                logits = model(
                    input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=1, use_cache=False
                ).logits[:, -1, list(answers)]
                out[part] = torch.softmax(logits.double(), -1)[:, 0].cpu().numpy()
        return out

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("veritune", "vllm", "transformers"))
    parser.add_argument("rows", type=Path)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--model", help="a model folder in place of a shape")
    parser.add_argument("--base", default="bf16", choices=("bf16", "fp8", "fp32"))
    parser.add_argument("--tokens", type=int, help="tokens computed at once; default: as veritune scores; vLLM: 16384")
    parser.add_argument("--batch", type=int, default=64, help="rows at once, of transformers")
    parser.add_argument("--window", type=int, default=1024, help="rows in a window")
    parser.add_argument("--eager", action="store_true", help="do not compile veritune's layers")
    parser.add_argument("--scores", type=Path, help="where to write the rows' P(correct), as JSON")
    o = parser.parse_args()
    started = time.perf_counter()
    rows, _, _, answers = workload.read(o.rows)
    warm, windows = o.window // 4, 3
    assert len(rows) >= warm + windows * o.window, "the file has too few rows"
    score = {"veritune": veritune, "vllm": vllm, "transformers": transformers}[o.engine](o, answers, rows)
    score(rows[:8])
    ready = time.perf_counter() - started
    score(rows[:warm])
    speeds, scores = [], []
    for number in range(windows):
        part = rows[warm + number * o.window : warm + (number + 1) * o.window]
        start = time.perf_counter()
        scores += score(part).tolist()
        seconds = time.perf_counter() - start
        speeds.append((len(part) / seconds, sum(map(len, part)) / seconds))
    import torch

    examples, tokens = (statistics.median(kind) for kind in zip(*speeds, strict=True))
    on_gpu = torch.cuda.is_available()
    result = {
        "engine": f"{o.engine} {o.base}", "model": o.model or o.shape, "examples/s": round(examples, 1),
        "prompt tokens/s": round(tokens), "ready s": round(ready, 1),
        # vLLM takes what it is given, in a process of its own
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu and o.engine != "vllm" else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }  # fmt: skip
    print("RESULT " + json.dumps(result), flush=True)
    if o.scores:
        o.scores.write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
