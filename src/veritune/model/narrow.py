"""The last decoder layer at the label rows only: past its attention nobody asks for the other tokens, so its MLP and
all that follows need not compute them.

Put in place by changing an instance's class: names and parameters stay the family's own.
`self_check.check_paths` compares its numbers with those of stock layers.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn

from .shape import NARROW


class NarrowLayer:
    """A decoder layer that gives only the tokens at `paths.ends`: [1, T, hidden] -> [1, rows, hidden]. Without `paths`
    it is what it was."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Tensor:
        paths = named.get("paths")
        if paths is None:
            return super().forward(hidden_states, *inputs, **named)  # pyright: ignore[reportAttributeAccessIssue]
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        ends = (hidden_states + attended)[:, paths.ends]
        return ends + self.mlp(self.post_attention_layernorm(ends))


@cache
def _narrowed(kind: type) -> type:
    return type(f"Narrow{kind.__name__}", (NarrowLayer, kind), {})


def narrow(model: Any) -> None:
    """Makes a model's last layer a `NarrowLayer`, where its family is known."""
    last = _last(model)
    kind = type(last)
    if kind.__name__ in (f"{family.capitalize()}DecoderLayer" for family in NARROW):
        last.__class__ = _narrowed(kind)


def is_narrow(model: Any) -> bool:
    """Whether the model gives hidden states, and so logits, of the label rows alone."""
    return isinstance(_last(model), NarrowLayer)


def _last(model: Any) -> Any:
    layers = getattr(model.get_decoder(), "layers", None)
    return layers[-1] if layers else None
