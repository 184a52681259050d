"""Looks for secrets in the files and settings that a job would send, and holds them back unless the user names them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raywgen.cluster.secrets import PATTERNS, is_secret_variable, looks_secret_by_name, secret_in
from raywgen.cluster.working_dir import uploaded_files
from raywgen.compat import ignore_matcher
from raywgen.ray_address import ClusterError

_LOOKED_AT_BYTES = 8 << 20
"""Number of bytes that are examined of each file."""
_TEXT_BYTES = 4096
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The files and variables that a job may send.

    Attributes:
        excludes: Patterns for the runtime environment, which Ray applies in any folder, with or without ignore files.
        left_out: Files that would have been sent without these patterns.
    """

    excludes: list[str]
    left_out: list[str]


def check_outgoing(
    working_dir: str | Path, environment: Mapping[str, Any], arguments: Sequence[str], send: Sequence[str] = ()
) -> Outgoing:
    """Refuses a job that would send a secret that the user has not named.

    Args:
        working_dir: The folder that is sent.
        environment: The runtime environment, without the working directory.
        arguments: Arguments of the job, which every user of the cluster can read.
        send: Names that the user allows: files relative to `working_dir`, environment variables, keys of arguments.

    Raises:
        ClusterError: Something looks like a secret, or `send` names a file that is missing or ignored.
    """
    root = Path(working_dir)
    given = [str(pattern) for pattern in environment.get("excludes") or []]
    would_go = uploaded_files(root, given)
    variables = {str(name): str(value) for name, value in (environment.get("env_vars") or {}).items()}
    keys = {argument.partition("=")[0].lstrip("-") for argument in arguments}
    allowed = {_relative(name, root) for name in send}
    _check_allowed(allowed, set(would_go) | set(variables) | keys, root)

    is_kept = ignore_matcher(root, PATTERNS)
    left_out = sorted(name for name in would_go if is_kept(root / name) and name not in allowed)
    found = {name: what for name in sorted({*would_go} - {*left_out} - allowed) if (what := _secret_of(root, name))}
    found |= {
        name: "an environment variable of the runtime environment"
        for name, value in variables.items()
        if name not in allowed and is_secret_variable(name, value)
    }
    found |= {
        name: f"{what} in the job's arguments"
        for argument in arguments
        if (name := argument.partition("=")[0].lstrip("-")) not in allowed and (what := secret_in(argument.encode()))
    }
    if found:
        raise ClusterError(_refusal(found, root))
    for folder in environment.get("py_modules") or []:
        if Path(str(folder)).exists():
            raise ClusterError(
                f"py_modules of the runtime environment names {folder} here, which would be sent unexamined; "
                "put it into the working directory, or install it into the nodes' image"
            )
    rest = {key: value for key, value in environment.items() if key not in ("env_vars", "excludes")}
    if what := secret_in(str(rest).encode()):
        raise ClusterError(
            f"the runtime environment holds {what}, which every user of the cluster could read; install private "
            "packages into the nodes' image instead"
        )
    return Outgoing([*given, *PATTERNS, *(f"!/{_escape(name)}" for name in sorted(allowed & {*would_go}))], left_out)


def _check_allowed(allowed: set[str], known: set[str], root: Path) -> None:
    for name in sorted(allowed - known):
        where = root / name
        if where.is_dir():
            raise ClusterError(f"--send {name} is a folder; name the files one by one")
        if where.exists():
            raise ClusterError(f"--send {name}: an ignore file keeps it here; take it out of .rayignore or .gitignore")
        raise ClusterError(f"--send {name}: {root} holds no such file, and the job is given no such variable or key")


def _relative(name: str, root: Path) -> str:
    """Returns a path relative to the working directory, whether it was given from there, from here or in full."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(root.absolute()):
        return path.relative_to(root.absolute()).as_posix()
    return path.as_posix()


def _secret_of(root: Path, name: str) -> str | None:
    path = root / name
    if ignore_matcher(root, PATTERNS)(Path(root, name.lower())):
        return "its name is one under which secrets are kept"
    real = path.resolve()
    if real != root.resolve() / name and ignore_matcher(Path("/"), PATTERNS)(real):
        return f"a link to {real}"
    if looks_secret_by_name(name):
        return "its name says so"
    with path.open("rb") as file:
        content = file.read(_TEXT_BYTES)
        is_text = b"\0" not in content or content.startswith((b"\xff\xfe", b"\xfe\xff"))
        return secret_in(content + file.read(_LOOKED_AT_BYTES)) if is_text else None


def _refusal(found: Mapping[str, str], root: Path) -> str:
    named = [f"{name} ({what})" for name, what in list(found.items())[:_NAMED]]
    more = [f"{len(found) - _NAMED} more"] if len(found) > _NAMED else []
    return (
        f"a job would send what looks like a secret: {', '.join([*named, *more])}; add files to {root / '.rayignore'}, "
        f"take variables and arguments out, or allow each by name, such as --send {shlex.quote(next(iter(found)))}"
    )


def _escape(name: str) -> str:
    """Returns a pattern that matches this file alone."""
    return "".join(f"\\{sign}" if sign in "\\*?[]!# " else sign for sign in name)
