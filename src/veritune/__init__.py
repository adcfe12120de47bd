"""veritune fine-tunes a language model into a verifier of mathematical solutions."""

import os

__version__ = "0.1.0"

# Torch reads this when it first takes GPU memory. Micro-batches of many sizes would else leave gaps between them, 8 %
# of the memory where it is short.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
