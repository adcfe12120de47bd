"""The readout: logits at each row's last token only, the label loss, and P(correct).

No head runs over the other positions: for a few dozen rows out of thousands of tokens the projection on the vocabulary
costs almost nothing.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens.trie import Trie
from .attention import Paths, paths_of
from .narrow import is_narrow


def label_logits(model: Any, trie: Trie, device: torch.device) -> Tensor:
    """Logits of the token after each row, float32 [rows, vocabulary], of a causal language model of transformers'
    whose attention is `attention.NAME`."""
    ids, positions = (torch.from_numpy(a).to(device, non_blocking=True) for a in (trie.ids, trie.positions))
    return logits_of(model, ids, positions, paths_of(trie, device))


def logits_of(model: Any, ids: Tensor, positions: Tensor, paths: Paths) -> Tensor:
    """The same of a trie's arrays on the device: ids and positions int64 [T]."""
    keep = 0 if is_narrow(model) else paths.ends  # 0: of all that there is
    out = model(input_ids=ids[None], position_ids=positions[None], paths=paths, logits_to_keep=keep, use_cache=False)
    return out.logits[0].float()


def rowwise_logits(model: Any, rows: list[np.ndarray], device: torch.device, after: np.ndarray | None = None) -> Tensor:
    """The same, row by row through the model's own attention: for models whose attention does more than paths express.

    Slow, and exact by construction. Tokens in `after` stand behind each row, where a causal model cannot see them.
    """
    out = []
    for row in rows:
        whole = row if after is None else np.concatenate((row, after))
        ids = torch.from_numpy(whole.astype(np.int64)).to(device)
        end = torch.tensor([len(row) - 1], device=device)
        out.append(model(input_ids=ids[None], logits_to_keep=end, use_cache=False).logits[0, -1].float())
    return torch.stack(out)


def label_loss(logits: Tensor, labels: Tensor, answer_ids: tuple[int, int]) -> Tensor:
    """Cross-entropy over the whole vocabulary at the label, summed over rows; labels: bool [rows]."""
    true, false = answer_ids
    return F.cross_entropy(logits, torch.where(labels, true, false), reduction="sum")


def p_correct(logits: Tensor, answer_ids: tuple[int, int]) -> Tensor:
    """P(correct) = softmax over the two answer words, float64 [rows]."""
    true, false = answer_ids
    return torch.sigmoid((logits[:, true] - logits[:, false]).double())
