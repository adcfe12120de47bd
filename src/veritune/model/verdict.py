"""The readout: logits at each row's last token only, the label loss, and P(correct).

No head runs over the other positions: for a few dozen rows out of thousands of tokens the projection on the vocabulary
costs almost nothing.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens.trie import Trie
from .attention import Paths, paths_of
from .narrow import is_narrow

Way = Literal["paths", "padded", "single"]
"""How rows are computed: as tries, sharing their beginnings; through the model's own attention beside rows of like
length; or so, each by itself."""
MOST_BESIDE = 16
"""Rows beside each other: each is projected on the vocabulary at the ends of all."""


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


def rowwise_logits(
    model: Any, rows: list[np.ndarray], device: torch.device, way: Way = "single", after: np.ndarray | None = None
) -> Tensor:
    """The same through the model's own attention: for models whose attention does more than paths express.

    "single" is slow, and exact by construction. "padded" is exact where `self_check.check_paths` says so: a causal
    model does not see what stands behind a row. Tokens in `after` stand behind each row, too.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for part in like_lengths(rows) if way == "padded" else [[i] for i in range(len(rows))]:
        wholes = [rows[i] if after is None else np.concatenate((rows[i], after)) for i in part]
        ids = np.zeros((len(part), max(map(len, wholes))), dtype=np.int64)
        for line, whole in zip(ids, wholes, strict=True):
            line[: len(whole)] = whole
        ends = torch.tensor([len(rows[i]) - 1 for i in part], device=device)
        logits = model(input_ids=torch.from_numpy(ids).to(device), logits_to_keep=ends, use_cache=False).logits
        kept = logits.shape[1] == len(part)  # some families give the logits of all positions
        for line, i in enumerate(part):
            found[i] = logits[line, line if kept else len(rows[i]) - 1].float()
    return torch.stack(found)


def like_lengths(rows: list[np.ndarray]) -> list[list[int]]:
    """The rows' numbers, in batches of which at most a fifth will be padding."""
    parts: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if parts and len(parts[-1]) < MOST_BESIDE and len(rows[i]) <= 1.25 * len(rows[parts[-1][0]]):
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def label_loss(logits: Tensor, labels: Tensor, answer_ids: tuple[int, int]) -> Tensor:
    """Cross-entropy over the whole vocabulary at the label, summed over rows; labels: bool [rows]."""
    true, false = answer_ids
    return F.cross_entropy(logits, torch.where(labels, true, false), reduction="sum")


def p_correct(logits: Tensor, answer_ids: tuple[int, int]) -> Tensor:
    """P(correct) = softmax over the two answer words, float64 [rows]."""
    true, false = answer_ids
    return torch.sigmoid((logits[:, true] - logits[:, false]).double())


def at_share(p: np.ndarray, trained: float, wanted: float) -> np.ndarray:
    """P(correct) among rows of which the share `wanted` is correct, from p (float64 [rows]) of a verifier that was
    trained on rows of which `trained` are: the odds change as those of the labels do (Saerens et al. 2002, section
    2.2). Both shares are between 0 and 1."""
    ratio = wanted / (1 - wanted) * (1 - trained) / trained
    return p * ratio / (1 - p + p * ratio)
