"""Recognises files and values that hold secrets, by the names and forms that secret scanners know.

The names follow the published lists of gitleaks, detect-secrets, trufflehog and GitHub's secret scanning.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PATTERNS = (
    # Environments and their settings.
    ".env*",
    "*.env",
    ".flaskenv",
    ".secrets*",
    "secrets.y*ml",
    "secrets.json",
    "secrets.toml",
    "secrets.ini",
    "secret.y*ml",
    "secret.json",
    # Clouds and their tools.
    ".aws/",
    ".azure/",
    ".gcp/",
    ".gcloud/",
    "**/.config/gcloud/",
    "application_default_credentials.json",
    "service-account*.json",
    "service_account*.json",
    "*-service-account.json",
    "client_secret*.json",
    "credentials.json",
    "credentials.y*ml",
    "credentials.csv",
    "credentials.ini",
    "credentials.toml",
    "*_credentials.json",
    "*-credentials.json",
    ".boto",
    ".s3cfg",
    ".passwd-s3fs",
    ".oci/",
    "rclone.conf",
    ".databrickscfg",
    ".snowsql/",
    ".vault-token",
    ".vault_pass*",
    ".terraform/",
    ".terraformrc",
    "terraform.rc",
    "credentials.tfrc.json",
    "*.tfstate*",
    "*.tfvars",
    "*.tfvars.json",
    # Keys and certificates.
    ".ssh/",
    ".gnupg/",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "*.pem",
    "*.key",
    "*.ppk",
    "*.p12",
    "*.pfx",
    "*.pkcs12",
    "*.jks",
    "*.keystore",
    "*.kdb",
    "*.kdbx",
    "*.ovpn",
    "*.agekey",
    # Clusters, registries and repositories.
    ".kube/",
    "kubeconfig*",
    "*.kubeconfig",
    "**/.docker/config.json",
    ".dockercfg",
    ".dockerconfigjson",
    ".npmrc",
    ".yarnrc.yml",
    ".pypirc",
    "**/.cargo/credentials*",
    "**/.gem/credentials",
    ".git-credentials",
    "**/.config/gh/",
    "**/.config/hub",
    "**/.ray/auth_token",
    # Logins and databases.
    ".netrc",
    "_netrc",
    ".htpasswd",
    ".pgpass",
    "pgpass.conf",
    ".my.cnf",
    ".mylogin.cnf",
    ".*_history",
    # Machine learning.
    ".huggingface/",
    "**/.cache/huggingface/token",
    "**/.cache/huggingface/stored_tokens",
    ".wandb/",
    "**/.config/wandb/",
    ".kaggle/",
    "kaggle.json",
    ".comet.config",
    ".modal.toml",
    "**/.streamlit/secrets.toml",
)
"""Patterns, as in `.gitignore`, of files that hold secrets; a job never sends them unless the user names them."""

_CODE = {".py", ".pyi", ".ipynb", ".md", ".rst", ".sh", ".js", ".ts", ".c", ".cpp", ".h", ".cu", ".rs", ".go", ".html"}
_WORDS = re.compile(
    r"(?:^|[._\- ])(?:secrets?|credentials?|passw(?:or)?ds?|api[_-]?keys?|access[_-]?keys?|(?:auth|access|api|hf|gh|"
    r"bearer)[_-]?tokens?|private[_-]?keys?)(?:$|[._\- ])|^\.?tokens?(?:\.\w+)?$",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"secret|passw|token|credential|api_?key|access_?key|private_?key|auth_?key|connection_?string|_key$|^key$|_pat$",
    re.IGNORECASE,
)
# Paths, small numbers and the like are no secrets, even in such a variable.
_HARMLESS = re.compile(r"^(?:|true|false|none|\d{1,5}|\$\{?\w+\}?|[./~][^\n]*)$", re.IGNORECASE)
_ENTROPY = 3.5
"""Entropy in bits per character above which a value counts as a key, as in gitleaks."""


@dataclass(frozen=True, slots=True)
class _Rule:
    what: str
    literals: tuple[bytes, ...]
    """Lower-case texts; the expression is tried only if one of them occurs."""
    form: re.Pattern[bytes]


def _rule(what: str, literals: str, form: str, flags: int = 0) -> _Rule:
    return _Rule(what, tuple(literals.encode().split()), re.compile(form.encode(), flags))


_RULES = (
    _rule("a private key", "-----begin", r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"),
    _rule("a private key", "putty-user-key", r"PuTTY-User-Key-File-\d"),
    _rule("a private key", "age-secret-key", r"AGE-SECRET-KEY-1[A-Z0-9]{20}"),
    _rule("an AWS key", "akia asia abia acca", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"),
    _rule(
        "an AWS secret key",
        "secret_access_key secretaccesskey",
        r"secret_?access_?key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+=]{16}",
        re.IGNORECASE,
    ),
    _rule("a Google key", "aiza ya29.", r"\bAIza[\w-]{30}|\bya29\.[\w-]{20}"),
    _rule("a Google service account", "service_account", r"\"type\"\s*:\s*\"service_account\""),
    _rule("an Azure key", "accountkey sharedaccesskey", r"(?:Account|SharedAccess)Key=[A-Za-z0-9+/=]{30}", re.I),
    _rule("a GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"\b(?:gh[pousr]|github_pat)_[A-Za-z0-9_]{20}"),
    _rule("a GitLab token", "glpat-", r"\bglpat-[\w-]{16}"),
    _rule("a Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{30}"),
    _rule(
        "a Slack token",
        "xox xapp- hooks.slack.com",
        r"\bxox[abeoprs]-[A-Za-z0-9-]{10}|\bxapp-\d-[\w-]{10}|hooks\.slack\.com/services/\w",
    ),
    _rule("an API key", "sk-", r"\bsk-(?=[\w-]{0,80}\d)(?=[\w-]{0,80}[A-Z])[A-Za-z0-9_-]{20}"),
    _rule("a payment key", "k_live_", r"\b[sr]k_live_[A-Za-z0-9]{16}"),
    _rule("a package registry's token", "npm_ pypi-", r"\bnpm_[A-Za-z0-9]{30}|\bpypi-[\w-]{50}"),
    _rule("a Databricks token", "dapi", r"\bdapi[0-9a-f]{32}\b"),
    _rule("a mail service's key", "sg.", r"\bSG\.[\w-]{16,}\.[\w-]{16}"),
    _rule("a token (JWT)", "eyj", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8}"),
    _rule("a login (netrc)", "machine", r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S"),
    _rule("a cluster's key", "client-key-data", r"client-key-data:\s*[A-Za-z0-9+/=]{20}"),
    _rule("a registry's login", '"auth"', r"\"auth\"\s*:\s*\"[A-Za-z0-9+/=]{16,}\""),
    _rule(
        "a password in an address",
        "://",
        r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"{}$<>`]{1,80}:[^\s/:@'\"{}$<>`]{3,80}@[\w.-]",
    ),
)
_ASSIGNED = re.compile(
    rb"(?:secret|passw(?:or)?d|passwd|token|api_?key|access_?key|auth_?key|private_?key)[\w-]{0,20}[\"']?\s{0,4}(?::|=|=>)"
    rb"\s{0,4}\\?[\"']([A-Za-z0-9+/=_~.!@#%^&*-]{16,200})\\?[\"']",
    re.IGNORECASE,
)
# Values without quotes, as in YAML, shells and Makefiles. Values with few digits are names in code.
_UNQUOTED = re.compile(
    rb"(?:secret|passw(?:or)?d|passwd|token|api_?key|access_?key|auth_?key|private_?key)[\w-]{0,20}\s{0,4}:?[=:]\s{0,4}"
    rb"(?=(?:[A-Za-z+/=~_-]*\d){4})([A-Za-z0-9+/=~_-]{20,200})(?=[\s\\\"',;]|$)",
    re.IGNORECASE,
)
_ASSIGNED_LITERALS = (b"secret", b"passw", b"token", b"key")


def looks_secret_by_name(path: str) -> bool:
    """Whether a word in a file's name says that it holds a secret, beyond the patterns of `PATTERNS`."""
    name = path.rpartition("/")[2]
    return Path(name).suffix.lower() not in _CODE and _WORDS.search(name) is not None


def secret_in(content: bytes) -> str | None:
    """Returns the kind of secret that a text holds, or None."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # Shells of Windows write UTF-16.
        content = content.decode("utf-16", errors="replace").encode()
    lower = content.lower()
    for rule in _RULES:
        if any(literal in lower for literal in rule.literals) and rule.form.search(content):
            return rule.what
    if any(literal in lower for literal in _ASSIGNED_LITERALS):
        for form in (_ASSIGNED, _UNQUOTED):
            if any(_is_random(match[1]) for match in form.finditer(content)):
                return "a password or key"
    return None


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, by its name or by its value."""
    by_name = _VARIABLE.search(name) is not None and not _HARMLESS.match(value)
    return by_name or secret_in(value.encode()) is not None


def _is_random(value: bytes) -> bool:
    """Whether letters and digits are mixed as in keys, unlike in words, paths and dotted names."""
    kinds = (re.search(rb"\d", value), re.search(rb"[A-Za-z]", value))
    counts = Counter(value)
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return all(kinds) and entropy >= _ENTROPY
