"""Products with a frozen weight in whatever precision it is held, plus a low-rank update, as single operators.

`plus` computes x W^T + low up^T, `plus_back` the gradient of x where several layers took it. W stands as it is, as NF4
(bitsandbytes) or as FP8. Each product is an operator that a compiler does not look into, so that the update is added in
place: compiled, it would be added to a copy.

FP8 (e4m3, Micikevicius et al. 2022): weights are scaled by row once, in both layouts, activations and gradients by row
each time. The update itself stays in bf16. Where there are no FP8 products the same numbers are multiplied in float32.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from ..errors import ConfigError
from .load import layers

Kind = Literal["plain", "nf4", "fp8"]
FP8 = torch.float8_e4m3fn


@torch.library.custom_op("veritune::product_plus", mutates_args=())
def product_plus(x: Tensor, w: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None) -> Tensor:
    """x [T, k], w [n, k], bias [n], low [T, r], up [n, r] -> x w^T + bias + low up^T [T, n]."""
    if low is None or up is None:
        return nn.functional.linear(x, w, bias)
    # The small product first: the large one then adds to it as it writes, which costs less than a second pass, and the
    # sum is rounded once.
    y = low @ up.t() if bias is None else torch.addmm(bias, low, up.t())
    return y.addmm_(x, w.t())


@product_plus.register_fake
def _(x: Tensor, w: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.custom_op("veritune::product_plus_nf4", mutates_args=())
def product_plus_nf4(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    """The same with w [n, k] unpacked from NF4 for this product only."""
    return product_plus(x, unpack(packed, absmax, x.shape[1], x.dtype), bias, low, up)


@product_plus_nf4.register_fake
def _(x: Tensor, packed: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], 2 * packed.numel() // x.shape[1])


@torch.library.custom_op("veritune::product_plus_fp8", mutates_args=())
def product_plus_fp8(
    x: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same with x [T, k] and w [n, k] in FP8, `scale` [T, 1] and `w_scale` [1, n] in float32; -> `dtype`."""
    y = product_fp8(x, scale, w, w_scale, bias, dtype)
    return y if low is None or up is None else y.addmm_(low, up.t())


def product_fp8(
    x: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x w^T + bias of FP8 numbers and their scales, in `dtype`."""
    if x.is_cuda:
        return torch.ops.aten._scaled_mm(x, w.t(), scale, w_scale, bias, None, dtype, True)
    y = ((x.float() * scale) @ (w.float().t() * w_scale)).to(dtype)
    return y if bias is None else y + bias


@product_plus_fp8.register_fake
def _(x: Tensor, scale: Tensor, w: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=others[-1])


@torch.library.custom_op("veritune::products_back", mutates_args=())
def products_back(grads: list[Tensor], ws: list[Tensor], low: Tensor | None, up: Tensor | None) -> Tensor:
    """Sum of grad w over layers, grad [T, n], w [n, k], + low up^T, low [T, r], up [k, r] -> [T, k]."""
    return _sum_of(zip(grads, ws, strict=True), low, up)


@products_back.register_fake
def _(grads: list[Tensor], ws: list[Tensor], *others: Any) -> Tensor:
    return grads[0].new_empty(grads[0].shape[0], ws[0].shape[1])


@torch.library.custom_op("veritune::products_back_nf4", mutates_args=())
def products_back_nf4(
    grads: list[Tensor], packed: list[Tensor], absmax: list[Tensor], low: Tensor | None, up: Tensor | None
) -> Tensor:
    """The same with each w unpacked from NF4 for its product only."""
    k = 2 * packed[0].numel() // grads[0].shape[1]
    each = zip(grads, packed, absmax, strict=True)
    return _sum_of(((grad, unpack(values, largest, k, grad.dtype)) for grad, values, largest in each), low, up)


@products_back_nf4.register_fake
def _(grads: list[Tensor], packed: list[Tensor], *others: Any) -> Tensor:
    return grads[0].new_empty(grads[0].shape[0], 2 * packed[0].numel() // grads[0].shape[1])


def _sum_of(pairs: Iterable[tuple[Tensor, Tensor]], low: Tensor | None, up: Tensor | None) -> Tensor:
    y = None if low is None or up is None else low @ up.t()
    for grad, w in pairs:
        y = grad @ w if y is None else y.addmm_(grad, w)
    assert y is not None, "there is a layer"
    return y


@torch.library.custom_op("veritune::products_back_fp8", mutates_args=())
def products_back_fp8(
    grads: list[Tensor], scales: list[Tensor], ws: list[Tensor], w_scales: list[Tensor], low: Tensor | None,
    up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same with grads and w^T [k, n] in FP8 and their scales; -> `dtype`."""
    each = zip(grads, scales, ws, w_scales, strict=True)
    first, *others = (product_fp8(grad, scale, w, w_scale, None, dtype) for grad, scale, w, w_scale in each)
    for other in others:
        first.add_(other)
    return first if low is None or up is None else first.addmm_(low, up.t())


@products_back_fp8.register_fake
def _(grads: list[Tensor], scales: list[Tensor], ws: list[Tensor], *others: Any) -> Tensor:
    return grads[0].new_empty(grads[0].shape[0], ws[0].shape[0], dtype=others[-1])


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, k] in FP8, and each row's scale in float32 [rows, 1]."""
    # 448 is e4m3's largest number, here as a literal: torch 2.11's compiler fails on a constant of the module.
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).to(FP8), scale


def plus(
    kind: Kind, x: Tensor, frozen: tuple[Tensor, ...], bias: Tensor | None, low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias + low up^T, with W as `frozen_parts` gave it; without an update, the product alone."""
    if kind == "plain":
        return product_plus(x, frozen[0], bias, low, up)
    if kind == "nf4":
        return product_plus_nf4(x, frozen[0], frozen[1], bias, low, up)
    return product_plus_fp8(*quantise_rows(x), frozen[0], frozen[1], bias, low, up, x.dtype)


def plus_back(
    kind: Kind, grads: Sequence[Tensor], frozen: Sequence[Sequence[Tensor]], low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum of grad W over layers, + low up^T: the gradient of what they all took. grad [T, n], low [T, r], up [k, r] ->
    [T, k]."""
    held = [list(parts) for parts in zip(*frozen, strict=True)]
    if kind == "plain":
        return products_back(list(grads), held[0], low, up)
    if kind == "nf4":
        return products_back_nf4(list(grads), *held, low, up)
    values, scales = (list(parts) for parts in zip(*map(quantise_rows, grads), strict=True))
    return products_back_fp8(values, scales, *held[2:], low, up, grads[0].dtype)


class _Fp8(torch.autograd.Function):
    """x W^T + bias with a frozen FP8 weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *frozen: Tensor) -> Tensor:
        ctx.save_for_backward(*frozen[2:])
        return product_fp8(*quantise_rows(x), frozen[0], frozen[1], bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_column, scale = ctx.saved_tensors
        grad = product_fp8(*quantise_rows(grads[0]), by_column, scale, None, grads[0].dtype)
        return grad, None, None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer that holds its weight in FP8: by row, and to train by column too, for the gradient."""

    by_row: Tensor  # [n, k]
    row_scale: Tensor  # [1, n]
    by_column: Tensor  # [k, n]
    column_scale: Tensor  # [1, k]

    def forward(self, input: Tensor) -> Tensor:
        """Under an adapter without dropout, `plus` takes this layer's place."""
        flat = input.reshape(-1, input.shape[-1])
        if torch.is_grad_enabled():
            y = _Fp8.apply(flat, self.bias, self.by_row, self.row_scale, self.by_column, self.column_scale)
        else:
            y = product_fp8(*quantise_rows(flat), self.by_row, self.row_scale, self.bias, input.dtype)
        return y.view(*input.shape[:-1], y.shape[-1])


def to_fp8(model: nn.Module, *, train: bool = True) -> None:
    """Turns every linear layer inside a model's decoder layers, the adapter's own excepted, into FP8, in place; but a
    GPU's FP8 products take widths in steps of 16 only, so that a gate of one stays as it is. Not to `train`, a weight
    is held once.

    Raises ConfigError on a GPU without FP8 products.
    """
    for layer in layers(model):
        for name, module in layer.named_modules():
            if type(module) is nn.Linear and "lora_" not in name and not any(n % 16 for n in module.weight.shape):
                if module.weight.is_cuda and torch.cuda.get_device_capability(module.weight.device) < (8, 9):
                    raise ConfigError(
                        "model.base = 'fp8': this GPU has no FP8 products (they came with compute capability 8.9); use "
                        "'bf16', or 'nf4' to save memory"
                    )
                module.__class__ = Fp8Linear
                weight = module.weight.detach()
                for part, of in (("row", weight), ("column", weight.t()))[: 2 if train else 1]:
                    values, scale = quantise_rows(of)
                    module.register_buffer(f"by_{part}", values.contiguous(), persistent=False)
                    module.register_buffer(f"{part}_scale", scale.t().contiguous(), persistent=False)
                # An empty weight keeps device and dtype, which PEFT reads off it.
                module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)


def unpack(packed: Tensor, absmax: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """NF4 (blocks of 64) as a matrix [n, k]. packed: uint8 [n k / 2, 1], absmax: float32 [n k / 64]."""
    shape = torch.Size((2 * packed.numel() // k, k))
    state = QuantState(absmax=absmax, shape=shape, blocksize=64, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state)


def single_absmax(module: Linear4bit) -> None:
    """Gives an NF4 layer of double quantisation, where `plus` knows it, the largest values of its blocks in float32, no
    longer quantised themselves: 0.4 bits a weight more, one unpacking a product less."""
    weight: Any = module.weight
    state = weight.quant_state
    if state is not None and state.quant_type == "nf4" and state.blocksize == 64:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        module.register_buffer("absmax", absmax.float(), persistent=False)


def frozen_parts(module: nn.Module) -> tuple[Kind, tuple[Tensor, ...]] | None:
    """How a base layer holds its weight, and the tensors of it; None for a kind of layer that `plus` does not know."""
    if type(module) is nn.Linear:
        return "plain", (module.weight,)
    if type(module) is Fp8Linear:
        back = (module.by_column, module.column_scale) if hasattr(module, "by_column") else ()
        return "fp8", (module.by_row, module.row_scale, *back)
    if isinstance(module, Linear4bit) and hasattr(module, "absmax"):
        return "nf4", (module.weight, module.get_buffer("absmax"))
    return None


def hold_unpacked(model: nn.Module) -> None:
    """Unpacks every NF4 layer under an adapter to bf16 for good: the same numbers, four times the memory, no unpacking
    at every product."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, Linear4bit) and (parts := frozen_parts(base)) is not None:
            packed, absmax = parts[1]
            plain = nn.Linear(base.in_features, base.out_features, device="meta")
            weight = unpack(packed, absmax, base.in_features, torch.bfloat16)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = base.bias
            module.base_layer = plain  # pyright: ignore[reportArgumentType]
