"""A job takes no secret along unless the user names it, packed by Ray's own functions from a user's own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raywgen.cluster.outgoing import check_outgoing
from raywgen.cluster.secrets import PATTERNS, is_secret_variable, secret_in
from raywgen.ray_address import ClusterError
from tests.packing import packed

ROOT = Path(__file__).parents[2]
# Written in parts, so that no scanner takes this file for a leak.
KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
HEX = "9f8a7b6c5d4e" + "3f2a1b0c9d8e7f6a5b4c3d2e1f0a"
GITHUB = "ghp" + "_16C7e42F292c6912E7710c838347Ae178B4a"
KEPT = [
    ".env",
    ".env.production",
    "service/.envrc",
    "prod.env",
    ".aws/credentials",
    ".azure/accessTokens.json",
    ".config/gcloud/application_default_credentials.json",
    "service-account-training.json",
    ".ssh/config",
    "deploy/id_rsa",
    "deploy/id_ed25519",
    "certs/server.pem",
    "certs/server.key",
    "client.p12",
    "trust.jks",
    "passwords.kdbx",
    ".netrc",
    ".pgpass",
    ".pypirc",
    ".npmrc",
    ".docker/config.json",
    "kubeconfig",
    ".kube/config",
    ".git-credentials",
    ".htpasswd",
    ".huggingface/token",
    ".cache/huggingface/token",
    ".config/wandb/settings",
    ".kaggle/kaggle.json",
    "credentials.json",
    "conf/secrets.yaml",
    "terraform.tfstate",
    "terraform.tfvars",
    ".bash_history",
]
"""Names that secret scanners know."""
CODE = {
    "jobs/train.py": "from secrets import token_hex\npassword = input('password: ')\n",
    "tokenizer.json": '{"added_tokens": [], "token": "<pad>"}',
    "special_tokens_map.json": "{}",
    "environment.yaml": "dependencies: [python=3.11]\n",
    "keys.py": "KEY = 'learning_rate'\n",
    "README.md": "Write the key to https://user@example.org/; export HF_TOKEN=...; the header is BEGIN PRIVATE KEY.\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own folder: no clone, no ignore file, no git."""
    for name, text in CODE.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def check(folder: Path, *send: str, environment: dict[str, Any] | None = None, arguments: list[str] | None = None):
    return check_outgoing(folder, environment or {}, arguments or [], send)


def test_known_names_stay_here_in_any_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in KEPT:
        write(folder / name, "secret")
    outgoing = check(folder)
    assert outgoing.left_out == sorted(KEPT)
    assert packed(folder, tmp_path_factory.mktemp("package") / "package.zip", outgoing.excludes) == CODE.keys()


def test_a_file_that_is_named_goes_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in (".env", ".aws/credentials", ".aws/config", "odd [1]!.pem", "odd 1!.pem"):
        write(folder / name, "secret")
    outgoing = check(folder, ".aws/config", "odd [1]!.pem", str(folder / ".env"))
    assert outgoing.left_out == [".aws/credentials", "odd 1!.pem"]
    sent = packed(folder, tmp_path_factory.mktemp("package") / "package.zip", outgoing.excludes)
    assert sent == {*CODE, ".env", ".aws/config", "odd [1]!.pem"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("notes.txt", f"deploy\n{KEY}", "notes.txt (a private key)"),
        ("conf.ini", f"[default]\nkey = {AWS}\n", "conf.ini (an AWS key)"),
        ("conf.ini", "aws_secret_access_key = wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY", "conf.ini (an AWS secret key)"),
        ("jobs/upload.py", f"login('{GITHUB}')\n", "jobs/upload.py (a GitHub token)"),
        ("a.txt", "github_pat" + "_11ABCDEFG0abcdefghijklmn", "a.txt (a GitHub token)"),
        ("a.txt", "hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "a.txt (a Hugging Face token)"),
        ("a.txt", "xoxb" + "-123456789012-abcdefghij", "a.txt (a Slack token)"),
        ("a.txt", "sk-" + "proj-A1b2C3d4E5f6G7h8I9j0K1l2", "a.txt (an API key)"),
        ("a.txt", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4", "a.txt (a token (JWT))"),
        ("a.json", '{"type": "service_account", "project_id": "p"}', "a.json (a Google service account)"),
        ("a.yaml", "db: postgres://user:hunter2@db.example.org/x", "a.yaml (a password in an address)"),
        ("settings.py", 'API_KEY = "9f8A7d6C5b4E3a2F1q0W8e7R"', "settings.py (a password or key)"),
        ("train.sh", f"export WANDB_API_KEY={HEX}\npython train.py", "train.sh (a password or key)"),
        ("tracking.yaml", f"wandb:\n  api_key: {HEX}", "tracking.yaml (a password or key)"),
        ("Makefile", f"DEPLOY_TOKEN := {HEX}", "Makefile (a password or key)"),
        ("notes.ipynb", json.dumps({"source": [f'api_key = "{HEX}"']}), "notes.ipynb (a password or key)"),
        ("api_token.txt", "abc", "api_token.txt (its name says so)"),
        ("token", "abc", "token (its name says so)"),
        ("PASSWORDS.TXT", "abc", "PASSWORDS.TXT (its name says so)"),
        ("ID_RSA", "abc", "ID_RSA (its name is one under which secrets are kept)"),
    ],
)
def test_what_looks_like_a_secret_is_refused(folder: Path, name: str, text: str, said: str) -> None:
    write(folder / name, text)
    with pytest.raises(ClusterError) as refused:
        check(folder)
    assert said in str(refused.value)
    assert f"--send {name}" in str(refused.value)
    assert text.strip() not in str(refused.value)
    assert check(folder, name).left_out == []
    (folder / ".rayignore").write_text(f"/{name}\n")
    assert check(folder).left_out == []


def test_other_encodings_and_links_are_seen(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    write(home / ".aws" / "credentials", "nothing")
    (folder / "wide.txt").write_bytes(f"token {GITHUB}".encode("utf-16"))
    (folder / "link").symlink_to(home / ".aws" / "credentials")
    (folder / "image.bin").write_bytes(b"\0\1\2" + GITHUB.encode())
    with pytest.raises(ClusterError) as refused:
        check(folder)
    assert "wide.txt (a GitHub token)" in str(refused.value)
    assert f"link (a link to {home}" in str(refused.value)
    assert "image.bin" not in str(refused.value)


def test_there_is_no_blanket_word(folder: Path) -> None:
    write(folder / ".aws/credentials", "secret")
    for name, said in (
        (".", "is a folder; name the files one by one"),
        (".aws", "is a folder; name the files one by one"),
        ("*", "holds no such file"),
        (".aws/*", "holds no such file"),
    ):
        with pytest.raises(ClusterError, match=said):
            check(folder, name)
    (folder / ".gitignore").write_text(".aws/\n")
    with pytest.raises(ClusterError, match="an ignore file keeps it here"):
        check(folder, ".aws/credentials")


def test_variables_and_arguments_are_looked_at(folder: Path) -> None:
    environment = {"env_vars": {"WANDB_API_KEY": "0123456789abcdef", "OMP_NUM_THREADS": "1", "NOTE": GITHUB}}
    with pytest.raises(ClusterError) as refused:
        check(folder, environment=environment)
    assert "WANDB_API_KEY (an environment" in str(refused.value)
    assert "NOTE (an environment" in str(refused.value)
    assert "OMP" not in str(refused.value)
    check(folder, "WANDB_API_KEY", "NOTE", environment=environment)
    with pytest.raises(ClusterError, match=r"corpus \(a password in an address in the job's arguments\)"):
        check(folder, arguments=["corpus=s3://key:word1234@bucket/corpus", "seed=1"])
    with pytest.raises(ClusterError, match="holds a password in an address"):
        check(folder, environment={"pip": ["--extra-index-url https://me:word1234@pypi.example.org/simple", "torch"]})


def test_excludes_of_the_user_hold_too(folder: Path) -> None:
    write(folder / "notes.txt", KEY)
    outgoing = check(folder, environment={"excludes": ["notes.txt"]})
    assert outgoing.excludes[0] == "notes.txt"


def test_modules_that_lie_here_are_not_sent_unseen(folder: Path) -> None:
    with pytest.raises(ClusterError, match="py_modules"):
        check(folder, environment={"py_modules": [str(folder)]})
    check(folder, environment={"py_modules": ["s3://bucket/nets.zip"]})


def test_the_clone_holds_none_and_ignores_the_same_names() -> None:
    assert check_outgoing(ROOT, {}, ["configs/igpg/digits.yaml", "seed=1"]).left_out == []
    assert set(PATTERNS) <= set((ROOT / ".rayignore").read_text().splitlines())


@pytest.mark.parametrize("value", ["", "true", "/run/secrets/token", "~/.ray/auth_token", "$TOKEN", "42"])
def test_places_and_switches_are_no_secrets(value: str) -> None:
    assert not is_secret_variable("RAY_AUTH_TOKEN_PATH", value)


def test_words_are_no_secrets() -> None:
    for text in (
        b"token = 'beginning_of_sentence'",
        b"the sk-estimator-doc-link of a page",
        b"hf_model_name",
        b"task-1",
        b"tokens_per_block=model.layer1.conv2d_3x3_block4",
        b"token_embedding: build_token_embedding_2d_v2_of_blocks",
    ):
        assert secret_in(text) is None
