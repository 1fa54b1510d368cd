"""What must not enter a record, a log or an error: passwords, tokens, signed addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
SECRET_NAME = r"(?:api_?key|access_?key(?:_?id)?|token|secret|passw(?:or)?d|credentials?|signature)"
NAMED = re.compile(rf"(?:^|[._-]){SECRET_NAME}$", re.IGNORECASE)
ASSIGNED = re.compile(
    rf"((?:^|[\s'\"+._-]){SECRET_NAME}['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*)[^\s,'\"}}]+", re.IGNORECASE
)
BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
USER = re.compile(r"([a-z][\w+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
QUERY = re.compile(r"([a-z][\w+.-]*://[^\s?'\"]+\?)[^\s'\"#]+", re.IGNORECASE)
IN_ENVIRONMENT = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
SHORTEST = 8  # shorter values of such variables occur in ordinary words


def masked(text: str) -> str:
    """A text without secrets.

    Credentials and queries of addresses, values that follow a name such as `api_key`, and values of
    environment variables with such a name.

    >>> masked("https://me:pw@host/a.tar?X-Amz-Signature=0 gave 403")
    'https://***@host/a.tar?*** gave 403'
    """
    for name, value in os.environ.items():
        if IN_ENVIRONMENT.search(name.upper()) and len(value) >= SHORTEST:
            text = text.replace(value, MASK)
    text = USER.sub(rf"\1{MASK}@", text)
    text = QUERY.sub(rf"\1{MASK}", text)
    text = BEARER.sub(rf"\1 {MASK}", text)
    return ASSIGNED.sub(rf"\1{MASK}", text)


def masked_values(value: Any) -> Any:
    """Plain containers without secrets in their texts, or below keys that name one."""
    if isinstance(value, Mapping):
        return {
            key: MASK if entry and NAMED.search(str(key)) else masked_values(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked_values(entry) for entry in value]
    return masked(value) if isinstance(value, str) else value
