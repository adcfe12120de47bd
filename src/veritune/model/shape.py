"""A model's widths and counts from its configuration alone: no weights, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError


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
            )
        except KeyError as error:
            raise ModelError(f"the memory of a model of type {kind!r} is not foreseen: it has no {error}") from None
        if any("expert" in name for name in config):
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
