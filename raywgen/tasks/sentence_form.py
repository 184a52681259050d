"""The way in which a generator's tasks made samples of sentences, for a user's own sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raywgen.tasks.domain_texts import encode_texts
from raywgen.tasks.networks.text_models import check_causal_digest, check_digest
from raywgen.tasks.sentence_tasks import encode_sentences

_KINDS = ("sentence-groups", "sentence-words", "domain-texts")
_SHARED = ("base", "digest", "first_layer", "max_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceForm:
    """The way sentences become samples, and the network that reads them.

    Attributes:
        base: The text encoder, as `upper_layers` takes it, or the causal language model, as `next_word` does.
        digest: Digest of its weights.
        first_layer: The first of the layers that networks consist of.
        max_tokens: Tokens after which a sentence is cut.
        network: Recipe of the network.
    """

    base: str
    digest: str
    first_layer: int
    max_tokens: int
    network: Mapping[str, Any]

    @property
    def is_causal(self) -> bool:
        """Whether networks are adapters of a causal language model."""
        return self.network["base"]["name"] == "next-word"

    def samples(self, sentences: Sequence[str]) -> Tensor:
        """Returns samples `(S, F)` of sentences.

        Raises:
            TaskError: The model is missing, or has changed since the generator was trained.
        """
        if self.is_causal:
            check_causal_digest(self.base, self.digest)
            return encode_texts(sentences, self.base, self.first_layer, self.max_tokens)
        check_digest(self.base, self.digest)
        return encode_sentences(sentences, self.base, self.first_layer, self.max_tokens)


def sentence_form(tasks: Iterable[Mapping[str, Any]], networks: Sequence[Mapping[str, Any]]) -> SentenceForm | None:
    """Reads the form from the recipes of tasks and networks; None where they are of other kinds, or of several forms.

    Args:
        tasks: Recipes of all tasks.
        networks: Recipes of all networks.
    """
    every = list(tasks)
    forms = {tuple(str(task.get(name)) for name in _SHARED) for task in every}
    if len(forms) != 1 or len(networks) != 1 or any(task.get("name") not in _KINDS for task in every):
        return None
    return SentenceForm(
        base=every[0]["base"],
        digest=str(every[0].get("digest", "")),
        first_layer=every[0]["first_layer"],
        max_tokens=every[0]["max_tokens"],
        network=dict(networks[0]),
    )
