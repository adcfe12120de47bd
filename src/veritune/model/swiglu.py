"""A gated MLP under LoRA as one autograd function: SwiGLU (Shazeer 2020) between three adapted layers.

What gate and up give is kept without their updates, which are added where it is read. On a GPU that, and those
products with narrow matrices that would read all of it once more, are part of SwiGLU's own pass (`swiglu_kernels`),
behind operators that a compiler does not look into; elsewhere they are plain products. h = silu(gate) * up is computed
again in the backward pass.

Put in place by changing an instance's class: names and parameters stay the family's own.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import why_not
from .lora import FAST, apart, flat_of, parts_of
from .precision import plus, plus_back
from .shape import MOST_RANK, NARROW


@torch.library.custom_op("veritune::swiglu", mutates_args=())
def swiglu(
    gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, b_gate: Tensor, b_up: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """h = silu(gate + low_gate b_gate^T) * (up + low_up b_up^T). gate and up [T, n], low [T, r], b [n, r], a [r, n] ->
    [T, n], and parts whose sum is h a^T, float32 [parts, T, r]."""
    if not _fast(gate):
        return _plain(gate, up, low_gate, low_up, b_gate, b_up, a)
    from . import swiglu_kernels

    return swiglu_kernels.forward(gate, up, low_gate, low_up, b_gate, b_up, a)


@swiglu.register_fake
def _(gate: Tensor, up: Tensor, low: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    parts = 1
    if _fast(gate):
        from . import swiglu_kernels

        parts = swiglu_kernels.forward_parts(gate.shape[1])
    return torch.empty_like(gate), low.new_empty(parts, *low.shape, dtype=torch.float32)


@torch.library.custom_op("veritune::swiglu_backward", mutates_args=())
def swiglu_backward(
    grad: Tensor, grad_low: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, b_gate: Tensor,
    b_up: Tensor, a: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of h is grad + grad_low a: -> those of gate and up [T, n], and of b_gate, b_up and a^T, float32
    [3, n, r]."""
    if not _fast(gate):
        return _plain_backward(grad, grad_low, gate, up, low_gate, low_up, b_gate, b_up, a)
    from . import swiglu_kernels

    return swiglu_kernels.backward(grad, grad_low, gate, up, low_gate, low_up, b_gate, b_up, a)


@swiglu_backward.register_fake
def _(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    narrow = grad.new_empty(3, *others[-2].shape, dtype=torch.float32)
    return torch.empty_like(grad), torch.empty_like(grad), narrow


def _fast(wide: Tensor) -> bool:
    return wide.is_cuda and wide.dtype in (torch.bfloat16, torch.float16)


def _plain(
    gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, b_gate: Tensor, b_up: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    h = F.silu(torch.addmm(gate, low_gate, b_gate.t())).mul_(torch.addmm(up, low_up, b_up.t()))
    return h, (h @ a.t())[None].float()


def _plain_backward(
    grad: Tensor, grad_low: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, b_gate: Tensor,
    b_up: Tensor, a: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gate, up = torch.addmm(gate, low_gate, b_gate.t()), torch.addmm(up, low_up, b_up.t())
    grad, silu = torch.addmm(grad, grad_low, a), F.silu(gate)
    grad_gate, grad_up = torch.ops.aten.silu_backward(grad * up, gate), grad * silu
    each = zip((grad_gate, grad_up, silu.mul_(up)), (low_gate, low_up, grad_low), strict=True)
    return grad_gate, grad_up, torch.stack([wide.t() @ low for wide, low in each]).float()


def furthest(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """The most that what `swiglu` and its backward pass gave is off, in parts of the norm of what is right."""
    found, right = ((h, parts.sum(0), *others) for h, parts, *others in (found, right))
    each = zip(found, right, strict=True)
    return max(float((x.double() - to.double()).norm() / to.double().norm()) for x, to in each)


@cache
def problem_of_kernels(rank: int) -> str | None:
    """Why a GPU's kernels do not work, tried forward and backward beside plain products; None: they do."""

    def attempt() -> str | None:
        from . import swiglu_kernels

        shapes = (70, 200), (70, rank), *[(70, 200)] * 2, *[(70, rank)] * 2, *[(200, rank)] * 2, (rank, 200)
        numbers = torch.Generator().manual_seed(0)
        grad, *given = (torch.randn(shape, generator=numbers).cuda().bfloat16() for shape in shapes)
        found = *swiglu_kernels.forward(*given[1:]), *swiglu_kernels.backward(grad, *given)
        off = furthest(found, (*_plain(*given[1:]), *_plain_backward(grad, *given)))
        return None if off < 0.02 else f"they are off by {off:.0%}"

    return why_not(attempt)


class _LoraMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), each layer x W^T + bias + scaling (x A^T) B^T with a frozen W. x: [T, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Any, scalings: tuple[float, float, float], *flat: Tensor) -> Tensor:
        biases, a, b, frozen = apart(flat, 3)
        wide = torch.cat(a[:2])
        lows = [low * s for low, s in zip((x @ wide.t()).split(len(a[0]), 1), scalings[:2], strict=True)]
        gate, up = (plus(kind, x, of, bias) for of, bias in zip(frozen[:2], biases[:2], strict=True))
        h, parts = swiglu(gate, up, *lows, *b[:2], a[2])
        lows.append((parts.sum(0) * scalings[2]).to(x.dtype))
        ctx.save_for_backward(x, gate, up, wide, a[2], *lows, *b, *(tensor for of in frozen for tensor in of))
        ctx.scalings, ctx.kind, ctx.held = scalings, kind, len(frozen[0])
        return plus(kind, h, frozen[2], biases[2], lows[2], b[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, gate, up, wide, a, *others) = grads, ctx.saved_tensors
        lows, b, frozen = others[:3], others[3:6], others[6:]
        held = [frozen[i * ctx.held : (i + 1) * ctx.held] for i in range(3)]
        grad_low = (grad @ b[2]) * ctx.scalings[2]
        grad_h = plus_back(ctx.kind, [grad], held[2:])
        grad_gate, grad_up, narrow = swiglu_backward(grad_h, grad_low, gate, up, *lows[:2], *b[:2], a)
        each = zip((grad_gate, grad_up), b[:2], ctx.scalings[:2], strict=True)
        grad_lows = torch.cat([(of @ one) * scaling for of, one, scaling in each], 1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = plus_back(ctx.kind, (grad_gate, grad_up), held[:2], grad_lows, wide.t())
        narrow = narrow.to(x.dtype)
        grad_a = [*(grad_lows.t() @ x).split(len(a)), narrow[2].t()]
        grad_b = [narrow[0], narrow[1], grad.t() @ lows[2]]
        return grad_x, None, None, None, None, None, *grad_a, *grad_b, *[None] * len(frozen)


class FusedMLP:
    """An MLP that computes a pass with gradients at once, where its three layers have an adapter of the usual kind."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        parts = parts_of(layers, x.dtype) if torch.is_grad_enabled() else None
        ranks = {len(part.a) for part in parts or ()}
        if parts is None or len(ranks) > 1 or max(ranks) > MOST_RANK:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return _LoraMLP.apply(x.reshape(-1, x.shape[-1]), *flat_of(parts)).view(x.shape)


@cache
def _fused(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (FusedMLP, kind), {})


def speed_up(model: Any) -> None:
    """Makes a model's gated MLPs `FusedMLP`s on a GPU, where the kernels work. On a CPU it would be slower."""
    if _fast(model.get_input_embeddings().weight) and problem(model) is None:
        fuse(model)


def problem(model: Any) -> str | None:
    """Why gated MLPs are computed layer by layer on a GPU on which they could be one function; None: they are not."""
    fusible = _fusible(model)
    if not (fusible and _fast(model.get_input_embeddings().weight)):
        return None
    rank = len(next(iter(fusible[0].gate_proj.lora_A.values())).weight)
    return problem_of_kernels(min(rank, MOST_RANK))


def fuse(model: nn.Module) -> None:
    """Makes every gated MLP of three LoRA linears of `lora` a `FusedMLP`."""
    for module in _fusible(model):
        module.__class__ = _fused(type(module))


def separate(model: nn.Module) -> None:
    """Makes every `FusedMLP` what it was."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.__class__ = type(module).__bases__[1]


def _fusible(model: nn.Module) -> list[Any]:
    names = {f"{family.capitalize()}MLP" for family in NARROW}
    mlps: list[Any] = [module for module in model.modules() if type(module).__name__ in names]
    return [
        mlp for mlp in mlps
        if mlp.config.hidden_act == "silu"
        and all(isinstance(layer, FAST) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    ]  # fmt: skip
