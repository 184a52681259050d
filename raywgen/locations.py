"""Locations of files and folders as text: local paths, and URIs with their queries."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

_RETRY_SECONDS = 60


def absolute(location: str | Path) -> str:
    """Makes a path absolute, for processes with another working directory; URIs do not change."""
    return str(location) if "://" in str(location) else str(Path(location).absolute())


def location_parts(location: str | Path) -> tuple[str, str, str]:
    """Splits a location into the path, the question mark, and the query of a URI, which names the endpoint."""
    text = str(location)
    return text.partition("?") if "://" in text else (text, "", "")


def joined(location: str | Path, relative: str) -> str:
    """Returns the location of a file or folder below a local path or a URI, whose query stays at its end."""
    base, mark, query = location_parts(location)
    return f"{base.rstrip('/')}/{relative}{mark}{query}"


def as_uri(text: str) -> str:
    """Quotes a URI whose path may hold spaces, accents, brackets or a lone %."""
    base, mark, query = text.partition("?")
    scheme, _, rest = base.partition("://")
    bucket, slash, path = rest.partition("/")
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        path = quote(path)
    elif re.search(r"[^\w.~!$&'()*+,;=:@/%-]", path, re.ASCII):
        path = quote(path, safe="/%")
    return f"{scheme}://{bucket}{slash}{path}{mark}{query}"


def with_settings(uri: str) -> str:
    """Adds to a URI what Arrow does not do by itself.

    `AWS_ENDPOINT_URL` names stores such as MinIO and Ceph, and other S3 clients obey it. Without a limit Arrow tries to
    reach Google's store for a quarter of an hour.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and uri.startswith("s3://") and "endpoint_override=" not in uri:
        return _with_query(uri, f"endpoint_override={quote(endpoint, safe='')}")
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        return _with_query(uri, f"retry_limit_seconds={_RETRY_SECONDS}")
    return uri


def _with_query(uri: str, setting: str) -> str:
    return f"{uri}{'&' if '?' in uri else '?'}{setting}"
