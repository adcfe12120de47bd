"""Tiny models and tokenizers that tests build for themselves: the families that share rows, and a whole model folder.

Weights are random and wider than a fresh model's (std 0.1), so that attention is far from uniform and a wrong key
shows.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Added, but not special: what Qwen does with <think> and <tool_call>.
ADDED = ("<think>", "</think>")
WORDS = ("True", "False", "Yes", "No")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI3_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
}


def tiny(family: str, *, seed: int = 0, dtype: str = "float32", drop: Sequence[str] = (), **changes: Any) -> Any:
    """A frozen random model of a family of transformers', small settings but for `changes`, without those in `drop`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SMALL, **FAMILIES.get(family, {}), **changes}
    described = AutoConfig.for_model(family, **{name: value for name, value in settings.items() if name not in drop})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(described, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def kept(compute: Callable[[], Any], known: Iterable[Any] = ()) -> tuple[Any, int]:
    """What `compute` gives, and the bytes that autograd keeps for it beside `known` tensors."""
    import torch

    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if (at := tensor.untyped_storage().data_ptr()) not in there:
            saved[at] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = compute()
    return found, sum(saved.values())


def worked_text(questions: int = 60) -> list[str]:
    """Texts of generated problems, with the answer words among them."""
    from veritune.data.generate import generate

    rows = generate(questions, solutions_per_question=2, seed=5)
    return [f"{row['question']}\n\n{row['solution']}\n{word} {word}" for row in rows for word in WORDS]


def byte_level(
    texts: Sequence[str], *, vocabulary: int = 700, special: Sequence[str] = SPECIAL, added: Sequence[str] = ADDED
) -> Any:
    """A byte-level BPE like GPT-2's or Llama 3's as a transformers fast tokenizer, with ChatML's template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[0],
        chat_template=CHAT,
    )


def pieces_with_controls(extra: Sequence[tuple[str, bool]] = ()) -> Any:
    """A SentencePiece-like Unigram tokenizer (spaces as U+2581, byte fallback) whose vocabulary holds the texts of its
    control tokens `<s>` and `</s>` as pieces that ordinary text can match. `extra`: further pieces, and whether each
    is special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "answer", "is", "total", "of", "pens", *WORDS, "+", "=", "*", "1", "2", "3", "10"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((text, -1.0) for text, _ in extra)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [("\u2581", -4.0), *((f"\u2581{word}", -5.0) for word in words), *((c, -9.0) for c in letters)]
    taken: dict[str, float] = {}
    for piece, score in vocabulary:
        taken.setdefault(piece, score)
    raw = Tokenizer(models.Unigram(list(taken.items()), unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Metaspace()]
    )
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    for text, special in extra:
        token = AddedToken(text, special=special, normalized=False)
        (raw.add_special_tokens if special else raw.add_tokens)([token])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def write_folder(folder: Path, *, family: str = "llama", seed: int = 0) -> Path:
    """A model folder as a hub would give it: weights, configuration, tokenizer with a chat template."""
    tokenizer = byte_level(worked_text())
    model = tiny(family, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(
    file: Path, *, seed: int = 0, model: Any = None, scaling: str = "", factors: Any = None, bias: str = ""
) -> Path:
    """A GGUF of a random 2-layer Llama in Q4_0 and float32, with the byte-level tokenizer; or of a `model` of 2 layers,
    as llama.cpp converts a Llama. scaling, factors: what it says of scaled positions. bias: a tensor more, of ones."""
    import gguf
    import numpy as np
    from gguf import quants

    tokenizer = byte_level(worked_text())
    tokens: list[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {*SPECIAL, *ADDED}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    hidden, wide, heads, layers = 64, 128, 4, 2
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(layers)
    out.add_context_length(1024)
    out.add_embedding_length(hidden)
    out.add_feed_forward_length(wide)
    out.add_head_count(heads)
    out.add_head_count_kv(heads // 2)
    out.add_rope_dimension_count(hidden // heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3 if token in special else 1 for token in tokens])
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_chat_template(CHAT)
    if scaling:
        out.add_string("llama.rope.scaling.type", scaling)
    if factors is not None:
        out.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    if bias:
        out.add_tensor(bias, np.ones(hidden, dtype=np.float32))
    rng = np.random.default_rng(seed)
    held = {}
    if model is not None:
        out.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
        for name, value in model.state_dict().items():
            held[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = value.numpy()

    def put(name: str, *shape: int) -> None:
        if held:
            values = held[name]
            if "attn_q" in name or "attn_k" in name:  # the halves that turn together stand beside each other there
                values = values.reshape(-1, 2, hidden // heads // 2, hidden).swapaxes(1, 2).reshape(shape)
            out.add_tensor(name, np.ascontiguousarray(values))
            return
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            out.add_tensor(name, values + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            out.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)

    put("token_embd.weight", len(tokens), hidden)
    put("output_norm.weight", hidden)
    put("output.weight", len(tokens), hidden)
    for layer in range(layers):
        for name, *shape in (
            ("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q", hidden, hidden), ("attn_k", hidden // 2, hidden),
            ("attn_v", hidden // 2, hidden), ("attn_output", hidden, hidden), ("ffn_gate", wide, hidden),
            ("ffn_up", wide, hidden), ("ffn_down", hidden, wide),
        ):  # fmt: skip
            put(f"blk.{layer}.{name}.weight", *shape)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file
