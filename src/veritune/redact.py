"""Secrets stay out of what is written: settings that hold one are refused, texts lose theirs.

A secret is the value of an environment variable whose name says so (HF_TOKEN, WANDB_API_KEY, PGPASSWORD, ...), the
user part of a URL or its token-like parameters, and what has the form of a hub's or a tracker's key.
"""

import os
import re

NAMES = re.compile(r"TOKEN(?!IZ)|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
SHORTEST = 8  # a shorter value is a switch or a word, and would be found everywhere
HIDDEN = "***"
# scheme://user:password@ (the password is the secret), scheme://token@ (where it is long), ?token=...
PASSWORD = re.compile(r"(?P<keep>[a-z][a-z0-9+.-]*:/{1,3}[^\s/@:]*:)(?P<secret>[^\s/@]+)(?=@)", re.IGNORECASE)
USER = re.compile(r"(?P<keep>[a-z][a-z0-9+.-]*:/{1,3})(?P<secret>[^\s/@:]{16,})(?=@)", re.IGNORECASE)
PARAMETER = re.compile(
    r"(?P<keep>[?&;](?:[a-z0-9_-]*(?:token|key|secret|password|passwd|signature))=)(?P<secret>[^\s&;#'\"]+)",
    re.IGNORECASE,
)
SHAPES = re.compile(r"(?P<keep>)(?P<secret>\b(?:hf_[A-Za-z0-9]{16,}\b|(?:api_org_|wandb_v1_)[A-Za-z0-9_]{16,}))")
PATTERNS = (PASSWORD, USER, PARAMETER, SHAPES)


def _values() -> list[str]:
    """The values of the environment's secrets, the longest first."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST}
    # A path that is there only says where a secret lies; but a key in base64 can begin with "/" too.
    return sorted((value for value in found if not (value[0] == "/" and os.path.exists(value))), key=len, reverse=True)


def redact(text: str) -> str:
    """The text with *** in place of each secret."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\g<keep>{HIDDEN}", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text
