"""Uploads a trained generator to the Hugging Face hub, by the conventions of its client."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raywgen.extras import hub_needed
from raywgen.files import write_text
from raywgen.generators import Generator
from raywgen.generators.bundle_copies import CONFIG, local_bundle
from raywgen.inputs import MAX_JSON_BYTES, inside, read_regular
from raywgen.sealed import sealed_json, unseal
from raywgen.storage import Storage

CARD = "README.md"


class HubError(ValueError):
    """The hub does not take a generator; the message says why."""


def push_bundle(
    generator: Generator,
    folder: str,
    repo_id: str,
    commit_message: str,
    private: bool | None,
    token: str | None,
    *,
    branch: str | None,
    create_pr: bool | None,
) -> str:
    """Uploads the files of a bundle and a model card in one commit, and returns the commit's address.

    Of the corpus that the generator was trained on, the name is uploaded in place of the path.

    Args:
        generator: The generator, for the card.
        folder: The bundle.
        repo_id: `owner/name`; the repository is made if there is none.
        commit_message: Message of the commit.
        private: Whether a new repository is private; None as the owner has set it.
        token: Token of the hub; None for that of the client.
        branch: Branch; None for the main one.
        create_pr: Whether to open a pull request.

    Raises:
        HubError: There is no bundle, the client is not installed, or the hub refuses it.
    """
    if not folder:
        raise HubError("this generator was not loaded from a folder; push what raywgen.load(...) returns")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise HubError(hub_needed("push_to_hub", "huggingface_hub")) from error
    with TemporaryDirectory(prefix="raywgen-") as temporary:
        facts = _copy_files(local_bundle(folder), Path(temporary))
        write_text(Path(temporary) / CARD, model_card(generator, repo_id, facts))
        try:
            api = HfApi(token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None:
                api.create_branch(name, branch=branch, exist_ok=True)
            done = api.upload_folder(
                repo_id=name,
                folder_path=temporary,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        except Exception as error:  # The hub's client raises errors of several libraries.
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise HubError(
                f"{repo_id} cannot be pushed to the hub ({reason}); check the name, the connection, and that the token "
                "of `hf auth login` or HF_TOKEN may write"
            ) from error
    return str(done.commit_url)


def model_card(generator: Generator, repo_id: str, facts: dict[str, Any]) -> str:
    """Returns the text of a model card, whose head the hub reads."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        library_name="raywgen", tags=["raywgen", "weight-generation", generator.method.rpartition(":")[2].lower()]
    )
    num_parameters = sum(parameter.numel() for parameter in generator.parameters())
    rows = "\n".join(
        f"| `{layout.generated[0].name}`, ... | {len(layout.tensors)} | {layout.num_values:,} |"
        for layout in generator.layouts
    )
    arguments = "instruction=..., data=(samples, labels)" if generator.data.has_tasks else "instruction=NAME"
    known = "\n".join(f"- {key}: {value}" for key, value in facts.items() if isinstance(value, str | int | float))
    return (
        f"---\n{head.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}: a generator of neural-network weights\n\n"
        f"A {generator.method} generator of {num_parameters:,} parameters. It writes the weights of a network into a "
        "module that you give it:\n\n"
        f"```python\nimport raywgen\n\ngenerator = raywgen.load({repo_id!r})\n"
        f"model = generator.fill(model, {arguments})\n```\n\n"
        "Judge what it writes on data of your own before you use it.\n\n"
        f"## Networks that it was trained on\n\n| first tensor | tensors | values |\n|---|---|---|\n{rows}\n\n"
        f"## Training\n\n- method: {generator.method}\n{known}\n"
    )


def _copy_files(bundle: Path, target: Path) -> dict[str, Any]:
    """Copies the files of a bundle that its config names, and returns the facts that are made public."""
    content = unseal(read_regular(bundle / CONFIG, MAX_JSON_BYTES), is_required=False)
    facts: dict[str, Any] = content.get("facts", {})
    if "corpus" in facts:
        facts["corpus"] = str(facts["corpus"]).rstrip("/").rpartition("/")[2]
    source = Storage.at(bundle)
    for name in map(inside, content.get("files", {})):
        source.download(name, target / name)
    write_text(target / CONFIG, sealed_json(content, indent=1))
    return facts
