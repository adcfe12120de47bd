"""One layer's SwiGLU under LoRA on a GPU: the kernels of `model.swiglu_kernels` beside compiled plain products.

    python benchmarks/swiglu.py --tokens 9600 --width 14336 --rank 16

Plain: the updates of gate and up added to their products, SwiGLU, and the narrow products that take what it gives,
forward and backward, as torch compiles them. GB/s: what must be read and written once, by the time it took.
"""

import argparse
from unittest.mock import patch

import torch
from attention import timed

from veritune.model import swiglu, swiglu_kernels

FORWARD = (
    (64, 64, 8, 4, 3), (64, 64, 8, 4, 2), (64, 64, 4, 4, 3), (64, 64, 16, 4, 3), (128, 64, 8, 8, 3), (64, 32, 16, 4, 3),
)  # fmt: skip
BACKWARD = (
    (32, 64, 16, 2, 1), (32, 64, 8, 2, 1), (32, 64, 32, 2, 1), (32, 64, 16, 4, 1), (32, 64, 16, 2, 3),
    (64, 64, 16, 4, 1), (64, 64, 16, 4, 2), (32, 128, 16, 4, 1), (16, 64, 16, 1, 1), (32, 32, 16, 1, 1),
)  # fmt: skip
"""See `swiglu_kernels`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=9600)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    o = parser.parse_args()
    torch.manual_seed(0)
    tokens, width, rank = o.tokens, o.width, o.rank
    shapes = [(tokens, rank), *[(tokens, width)] * 2, *[(tokens, rank)] * 2, *[(width, rank)] * 2, (rank, width)]
    grad, *given = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((tokens, width), *shapes))
    plain, plain_back = torch.compile(swiglu._plain), torch.compile(swiglu._plain_backward)
    right = *swiglu_kernels.forward(*given[1:]), *swiglu_kernels.backward(grad, *given)
    off = swiglu.furthest(right, (*plain(*given[1:]), *plain_back(grad, *given)))
    print(f"kernels and plain products: {off:.1e} apart")

    def say(name: str, took: float, times: int) -> None:
        print(f"{name:36} {took:6.3f} ms, {2e-6 * tokens * width * times / took:5.0f} GB/s", flush=True)

    say("forward, compiled plain products", timed(lambda: plain(*given[1:])), 3)
    say("backward, compiled plain products", timed(lambda: plain_back(grad, *given)), 5)
    for how in FORWARD:
        with patch.object(swiglu_kernels, "FORWARD", how):
            say(f"forward {how}", timed(lambda: swiglu_kernels.forward(*given[1:])), 3)
    for how in BACKWARD:
        with patch.multiple(swiglu_kernels, BACKWARD=how, BACKWARD_WIDE=how):
            say(f"backward {how}", timed(lambda: swiglu_kernels.backward(grad, *given)), 5)


if __name__ == "__main__":
    main()
