"""The network: weights, attention along trie paths, the label readout."""
