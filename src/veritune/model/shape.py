"""A model's widths and counts from its configuration alone: no weights, no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingError, ModelError, first_line
from . import header

NARROW = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose decoder layer is norm, attention, sum, norm, MLP, sum: the last one computes its queries and
its MLP for the label rows alone, and the MLP is SwiGLU; see `narrow` and `swiglu`."""
MOST_RANK = 64
"""The highest rank of a `swiglu.FusedMLP`, measured at 16, 32 and 64: a program of its kernels keeps sums for each,
three for every column, in registers, which do not hold many more."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model with gated MLPs (Llama, Qwen2, Qwen3, Mistral, SmolLM, Phi-3)."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """The readout's weights are the embedding's."""
    narrow: bool = False
    """Whether the last layer is a `narrow.NarrowLayer`."""

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Shape":
        """From a `config.json` of transformers'. Raises ModelError for a model that is built in another way."""
        config = config.get("text_config", config)
        kind = config.get("model_type", "?")
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            shape = Shape(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                inner=config["intermediate_size"],
                heads=heads,
                key_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocabulary=config["vocab_size"],
                tied=config.get("tie_word_embeddings", False),
                narrow=kind in NARROW,
            )
        except KeyError as error:
            raise ModelError(f"the memory of a model of type {kind!r} is not foreseen: it has no {error}") from None
        if any("expert" in name and value for name, value in config.items()):
            raise ModelError(f"the memory of a model of type {kind!r} is not foreseen: it has experts")
        return shape

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The widths (in, out) of each product of a layer, under the names that families give them."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.inner
        return {
            "q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h),
            "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h),
            "qkv_proj": (h, q + 2 * k), "gate_up_proj": (h, 2 * i),
        }  # fmt: skip

    @property
    def inside(self) -> int:
        """Weights of all layers' products."""
        return self.layers * (2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.inner)

    @property
    def outside(self) -> int:
        """All other weights: embedding, readout, norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def largest(self) -> int:
        """Weights of a layer's largest product."""
        return self.hidden * max(self.inner, self.queries)

    def adapted(self, targets: tuple[str, ...]) -> int:
        """How many products of a layer get an adapter."""
        return sum(name in targets for name in self.projections)

    def trained(self, targets: tuple[str, ...], rank: int) -> int:
        """Parameters of an adapter."""
        widths = [sum(widths) for name, widths in self.projections.items() if name in targets]
        return self.layers * rank * sum(widths)


def read(path: str) -> Shape:
    """The shape of a model as `config.Model.path` names it: a folder, a GGUF file, a hub id (of which only config.json
    is read, from the local cache or else the hub).

    Raises MissingError, and ModelError for what is no model or one built in another way.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _of_gguf(local)
    file = local / "config.json"
    if not local.is_dir():
        file = _of_hub(path)
    try:
        return Shape.of(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise MissingError(f"model.path = {path!r}: {file} is not there") from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None


def _of_hub(path: str) -> Path:
    import httpx
    from huggingface_hub import hf_hub_download

    from . import hub

    hub.check(path)
    if cached := hub.folder(path):
        return cached / "config.json"
    try:
        return Path(hf_hub_download(path, "config.json"))
    except (OSError, httpx.HTTPError) as error:  # the hub's own errors are OSErrors
        raise ModelError(
            f"model.path = {path!r}: its config.json cannot be downloaded ({first_line(error)}); a gated model needs "
            "an HF_TOKEN that opens it"
        ) from None


def _of_gguf(file: Path) -> Shape:
    values, tensors = header.read(file)
    kind = values.get("general.architecture", "?")
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "num_experts": "expert_count",
    }
    found = {name: values[f"{kind}.{key}"] for name, key in names.items() if f"{kind}.{key}" in values}
    if "token_embd.weight" in tensors:
        found["vocab_size"] = tensors["token_embd.weight"][1]
    return Shape.of({**found, "model_type": kind, "tie_word_embeddings": "output.weight" not in tensors})
