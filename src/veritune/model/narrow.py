"""Decoder layers along paths: the last one computes for the label rows alone, and to score the others leave their last
sum to the next.

Past the last layer's keys and values nobody asks for the other tokens, so its queries, its MLP and all that follows
need not compute them. A compiler joins a sum with the norm after it, but not across layers, since it compiles each by
itself.

Put in place by changing an instance's class: names and parameters stay the family's own.
`self_check.check_paths` compares the numbers with those of stock layers.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .attention import NAME, Paths
from .shape import NARROW

Hidden = Tensor | tuple[Tensor, Tensor]
"""Hidden states, [1, T, hidden], or two of which they are the sum."""


class PathLayer:
    """A decoder layer that gives what went past its MLP and what the MLP gives apart, where no gradient is asked for.
    Without `paths` it is what it was."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def __call__(self, hidden_states: Hidden, *inputs: Any, **named: Any) -> Hidden:
        if isinstance(hidden_states, Tensor) and named.get("paths") is not None and not torch.is_grad_enabled():
            hidden_states = hidden_states, torch.zeros_like(hidden_states)  # for the first layer to be as the others
        return super().__call__(hidden_states, *inputs, **named)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden_states: Hidden, *inputs: Any, **named: Any) -> Hidden:
        if named.get("paths") is None:
            return super().forward(hidden_states, *inputs, **named)  # pyright: ignore[reportAttributeAccessIssue]
        before = _sum(hidden_states)
        past = before + self.self_attn(hidden_states=self.input_layernorm(before), **named)[0]
        more = self.mlp(self.post_attention_layernorm(past))
        return past + more if torch.is_grad_enabled() else (past, more)


class NarrowLayer(PathLayer):
    """A last decoder layer that gives only the tokens at `paths.ends`: -> [1, rows, hidden]."""

    def forward(self, hidden_states: Hidden, *inputs: Any, **named: Any) -> Hidden:
        if named.get("paths") is None:
            return super().forward(hidden_states, *inputs, **named)
        before, ends = _sum(hidden_states), named["paths"].ends
        past = before[:, ends] + _attended(self.self_attn, self.input_layernorm(before), **named)
        return past + self.mlp(self.post_attention_layernorm(past))


def _sum(hidden: Hidden) -> Tensor:
    return hidden if isinstance(hidden, Tensor) else hidden[0] + hidden[1]


def _attended(
    attention: Any, x: Tensor, *, paths: Paths, position_embeddings: tuple[Tensor, Tensor], **named: Any
) -> Tensor:
    """What a family's attention gives at `paths.ends`: x [1, T, hidden] -> [1, rows, hidden]. Queries of all other
    tokens are zero."""
    ends = paths.ends
    q, k, v = (
        layer(of).unflatten(-1, (-1, attention.head_dim))
        for layer, of in ((attention.q_proj, x[:, ends]), (attention.k_proj, x), (attention.v_proj, x))
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = position_embeddings
    q, k = _turned(q, cos[:, ends], sin[:, ends]), _turned(k, cos, sin)
    # Of rows that end at the same token one gives its query.
    first = ~(ends[:, None] == ends).tril(-1).any(1)
    queries = q.new_zeros(x.shape[1], *q.shape[2:]).index_add_(0, ends, q[0] * first[:, None, None])
    out, _ = AttentionInterface()[NAME](
        attention,
        queries[None].transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        paths=paths,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
        **named,
    )
    return attention.o_proj(out[:, ends].flatten(2))


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [1, n, heads, d] at their positions, whose cosines and sines are [1, n, d], as all these families
    turn them: Su et al. 2021, section 3.4.2, with the halves of a head as the coordinates of a pair."""
    left, right = states.chunk(2, -1)
    return states * cos[:, :, None] + torch.cat((-right, left), -1) * sin[:, :, None]


@cache
def _changed(to: type, kind: type) -> type:
    return type(f"{to.__name__}Of{kind.__name__}", (to, kind), {})


def narrow(model: Any) -> None:
    """Makes a model's last layer a `NarrowLayer` and the others `PathLayer`s, where their family is known."""
    found = _layers(model)
    for layer in found:
        kind = type(layer)
        if kind.__name__ in (f"{family.capitalize()}DecoderLayer" for family in NARROW):
            layer.__class__ = _changed(NarrowLayer if layer is found[-1] else PathLayer, kind)


def is_narrow(model: Any) -> bool:
    """Whether the model gives hidden states, and so logits, of the label rows alone."""
    found = _layers(model)
    return bool(found) and isinstance(found[-1], NarrowLayer)


def _layers(model: Any) -> Sequence[Any]:
    return getattr(model.get_decoder(), "layers", None) or ()
