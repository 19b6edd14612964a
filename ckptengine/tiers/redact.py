"""URLs without their secrets.

A URL may carry a user, a password or a signed query, and file-system options hold keys.  None of that may reach a
message, a log, a manifest or a repr: places are shown by `redacted_url`, and foreign text goes through a `Scrubber`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*)://(?P<rest>.*)", re.DOTALL)
_USERINFO = re.compile(
    r"://(?P<user>[^/?#\s'\"]*"
    # What stands before the last @ is a secret that was not encoded, unless the host has a port, or is Amazon's name.
    r"|(?!arn:)[^:/?#\s'\"@]+:(?!\d*(?:[/?#]|$))[^\s'\"]*)@"
)
_QUERY = re.compile(r"(://[^?#\s'\"]*)[?#][^\s'\"]*")
_SECRET_QUERY = re.compile(r"[?&][^=&#]*(?:key|secret|token|sig|pass|cred|sas|auth)[^=&#]*=[^&#]*", re.IGNORECASE)
_SECRET_OPTION = re.compile(r"key|secret|token|pass|credential|sas|connection_string|user|auth", re.IGNORECASE)
_CLOUDS = ("AWS_", "AZURE_", "GOOGLE_", "GCS_")
_SHORTEST_SECRET = 4
"""Shorter values ("true", a port) would blank out half of every message."""


def is_url(path: str) -> bool:
    return _URL.fullmatch(path) is not None


def redacted_url(url: str) -> str:
    """``url`` without user, password, query and fragment."""
    return _QUERY.sub(r"\1", _USERINFO.sub("://", url))


def split_url(url: str) -> tuple[str, str, tuple[str, str] | None]:
    """(protocol, ``url`` without user information, (user, password) or None)."""
    match = _URL.fullmatch(url)
    if match is None:
        return "file", url, None
    scheme = match["scheme"]
    found = _USERINFO.match(url, len(scheme))
    if found is None:
        return scheme, url, None
    user, _, password = found["user"].partition(":")
    return scheme, f"{scheme}://{url[found.end() :]}", (unquote(user), unquote(password))


def for_fsspec(url: str) -> tuple[str, dict[str, Any]]:
    """``url`` as fsspec takes it, and the storage options that it carries.

    S3's file systems take no keys from a URL; others read theirs from it, where a user may be a container.
    """
    scheme, bare, user = split_url(url)
    last = scheme.rpartition("::")[2]
    if user is None or not last.startswith("s3"):
        return url, {}
    keys = {"key": user[0], "secret": user[1]}
    return bare, keys if last == scheme else {last: keys}


def identity_of(url: str) -> str:
    """What tells a place from every other one, whatever the credentials: as it is shown, with a sum of what is not."""
    scheme, bare, user = split_url(url)
    shown = redacted_url(url)
    whole = bare if user is None or not user[0] or scheme.rpartition("::")[2].startswith("s3") else f"{user[0]}@{bare}"
    whole = _SECRET_QUERY.sub("", whole)
    return shown if whole == shown else f"{shown} ({zlib.crc32(whole.encode()):08x})"


def secrets_of(url: str) -> list[str]:
    """What of ``url`` must not be shown."""
    _, bare, user = split_url(url)
    return [*(user or ()), bare.partition("?")[2]]


def secrets_in(options: Mapping[str, object], *more: str) -> list[str]:
    """Every string among (nested) file-system options whose name sounds like a secret, and ``more``."""
    found = [value for value in more if value]
    for key, value in options.items():
        if isinstance(value, Mapping):
            found += secrets_in(value)
        elif isinstance(value, str) and _SECRET_OPTION.search(str(key)):
            found.append(value)
    return found


def secrets_of_environment() -> list[str]:
    """What cloud services' packages take from there."""
    return secrets_in({name: value for name, value in os.environ.items() if name.startswith(_CLOUDS)})


class Scrubber:
    """Takes known secrets, those of the environment, and whatever looks like credentials in a URL, out of text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        secrets = [*secrets, *secrets_of_environment()]
        forms = {form for secret in secrets for form in (secret, quote(secret), quote(secret, ""), quote_plus(secret))}
        self._forms = sorted((form for form in forms if len(form) >= _SHORTEST_SECRET), key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Scrubber({len(self._forms)} forms)"

    def scrub(self, text: str) -> str:
        """``text`` with ``***`` in the place of secrets, on one line, at most 500 characters."""
        for form in self._forms:
            text = text.replace(form, "***")
        return " ".join(redacted_url(text).split())[:500]
