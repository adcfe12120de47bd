"""The network: weights, attention along trie paths, the label readout."""

import logging

# Said at every import on a CPU: an optional kernel that we do not use is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
