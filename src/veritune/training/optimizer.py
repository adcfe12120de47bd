"""The optimisers, by the names their users know."""

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.lion import Lion8bit

from .. import config


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
