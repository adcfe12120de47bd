"""veritune fine-tunes a language model into a verifier of mathematical solutions."""

__version__ = "0.1.0"
