"""The projection on the vocabulary with float32 results, whatever the weights are held in.

Logits are tens in size, where bf16 numbers stand 0.125 to 0.25 apart: two answers' logits would differ by a multiple of
that, rows would tie, and P(correct) would come in steps. Products of bf16 numbers are summed in float32 anyway; here
the sum is kept as it is. Put in place by changing an instance's class, so that a family's own scaling or cap of its
logits is computed in float32, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 8192
"""Words of the vocabulary whose weights a CPU holds in float32 at once: it has no product of bf16 with such results."""


class _Product(torch.autograd.Function):
    """x w^T in float32 of a frozen w. x: [n, hidden], w: [words, hidden], both bf16 or fp16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        if x.is_cuda:
            return torch.mm(x, w.t(), out_dtype=torch.float32)
        wide = x.float()
        return torch.cat([wide @ part.float().t() for part in w.split(BLOCK)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return grads[0].to(w.dtype) @ w, None


class WideHead(nn.Linear):
    """A frozen linear layer of bf16 or fp16 weights that gives float32: [..., hidden] -> [..., words]. Trained, it is
    what it was."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(input)
        flat = input.reshape(-1, input.shape[-1]).to(self.weight.dtype)
        found = _Product.apply(flat, self.weight)
        found = found if self.bias is None else found + self.bias
        return found.view(*input.shape[:-1], found.shape[-1])


def widen(model: Any) -> None:
    """Makes a model's head a `WideHead`, where it is a plain layer in low precision."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16):
        head.__class__ = WideHead
