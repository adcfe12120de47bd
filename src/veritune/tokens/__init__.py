"""A row becomes token ids; many rows become one trie-shaped batch."""
