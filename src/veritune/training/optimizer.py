"""The optimisers, by the names their users know."""

from typing import Any

import torch
from bitsandbytes.optim import adamw, lion

from .. import config


class _OneWait:
    """Steps one of bitsandbytes' optimisers without its wait for the GPU after every tensor: an adapter has hundreds,
    and where processes share a GPU each wait takes milliseconds. All runs on one stream, so its order is kept."""

    @torch.no_grad()
    def step(self: Any, closure: None = None) -> None:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        last = None
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    if not self.state[p]:
                        self.init_state(group, p, number, index)
                    self.prefetch_state(p)
                    self.update_step(group, p, number, index)
                    last = p
        if self.is_paged and last is not None and last.is_cuda:  # pages move beside the stream
            torch.cuda.synchronize(last.device)


class AdamW8bit(_OneWait, adamw.AdamW8bit): ...


class PagedAdamW32bit(_OneWait, adamw.PagedAdamW32bit): ...


class Lion8bit(_OneWait, lion.Lion8bit): ...


def make(parameters: list[torch.nn.Parameter], settings: config.Train) -> torch.optim.Optimizer:
    """An optimiser over an adapter's parameters (float32), beta = (0.9, 0.999); Lion's are (0.9, 0.99).

    adamw_torch: AdamW, Loshchilov & Hutter 2019. The 8-bit states are those of Dettmers et al. 2022. lion_8bit: Chen et
    al. 2023; it wants a learning rate several times smaller than AdamW's.
    """
    lr, decay = settings.lr, settings.weight_decay
    match settings.optimizer:
        case "adamw_torch":
            fused = parameters[0].is_cuda
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=fused)
        case "adamw_8bit":
            return AdamW8bit(parameters, lr=lr, weight_decay=decay)
        case "paged_adamw_32bit":
            return PagedAdamW32bit(parameters, lr=lr, weight_decay=decay)
        case "lion_8bit":
            # Its signature says int where it means float.
            return Lion8bit(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=decay)  # pyright: ignore[reportArgumentType]
