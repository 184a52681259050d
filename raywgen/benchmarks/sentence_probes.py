"""Sentence encoders of the hub, text sets, and linear probes by which encoders are judged.

Shape letters beyond the legend in `raywgen.weights`: S sentences, T tokens of a sentence, E features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raywgen.extras import hub_needed
from raywgen.tasks import TaskError
from raywgen.tasks.networks.text_models import packaged_folder
from raywgen.tasks.text_datasets import TextData, load_texts

_SENTENCES_OF_A_PASS = 32
_PENALTIES = np.logspace(-3, 2, 11)


RightBySet = dict[str, np.ndarray]
"""Whether each test sentence is classified correctly, bool `(S,)`, by the name of its set."""


class EncoderFolderError(ValueError):
    """A sentence encoder cannot be used; the message names the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """The sentences of one set that a probe is trained on, and those it is judged on.

    Attributes:
        name: Name of the set.
        train: Sentences and classes of training.
        test: Other sentences, and their classes.
    """

    name: str
    train: tuple[list[str], np.ndarray]
    test: tuple[list[str], np.ndarray]


def packaged_model() -> str:
    """Returns the folder of the encoder that comes as a package.

    Raises:
        EncoderFolderError: The package is not installed.
    """
    try:
        return packaged_folder()
    except TaskError as error:
        raise EncoderFolderError(f"{error}, by model=FOLDER") from error


def read_text_set(path: str, num_train: int, num_test: int, seed: int) -> TextSet:
    """Draws sentences of a Parquet file: training ones of its split `train`, test ones of `test`.

    Of a file without these parts, the first half of a drawn order trains and the other half tests.

    Raises:
        TaskError: The file is missing or damaged.
        ValueError: Fewer than two classes are drawn for training.
    """
    data = load_texts(path)
    order = np.random.default_rng(seed).permutation(len(data.sentences))
    splits = np.asarray(data.split)[order]
    if {"train", "test"} <= set(splits.tolist()):
        train, test = order[splits == "train"], order[splits == "test"]
    else:
        train, test = np.array_split(order, 2)
    found = TextSet(
        name=data.name.removeprefix("text-"), train=_taken(data, train[:num_train]), test=_taken(data, test[:num_test])
    )
    if len(set(found.train[1].tolist())) < 2 or not len(test):
        raise ValueError(f"{path}: {len(train)} training and {len(test)} test sentences hold no two classes; give more")
    return found


def _taken(data: TextData, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    return [data.sentences[row] for row in rows], data.labels.numpy()[rows]


class HubEncoder:
    """An encoder in a folder of the hub: its tokenizer, its network, and weights by the names of its file.

    Args:
        folder: The folder.
        max_tokens: Tokens after which sentences are cut.

    Raises:
        EncoderFolderError: `transformers` is not installed or cannot load the folder.
    """

    def __init__(self, folder: str, max_tokens: int) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise EncoderFolderError(hub_needed("a sentence encoder", "transformers")) from error
        if not (Path(folder) / "config.json").is_file():
            raise EncoderFolderError(f"{folder} holds no config.json; give model=FOLDER of an encoder of the hub")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.network: nn.Module = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
        except Exception as error:  # Its loaders raise errors of several libraries.
            raise EncoderFolderError(f"{folder}: transformers cannot load it ({error}); check the folder") from error
        self.folder, self._max_tokens = folder, max_tokens

    @cached_property
    def random_network(self) -> nn.Module:
        """The same architecture with weights as its training would begin with."""
        from transformers import AutoModel

        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return AutoModel.from_config(self.network.config).eval()

    def prefix(self, state: Mapping[str, Tensor]) -> str:
        """Returns by what the names of a file's tensors are longer than the network's.

        Raises:
            EncoderFolderError: The file holds other names.
        """
        own = self.network.state_dict()
        last = next(reversed(own))
        for prefix in ("", f"{getattr(self.network, 'base_model_prefix', '')}."):
            shared = [name for name in own if prefix + name in state]
            if shared and all(torch.equal(own[name], state[prefix + name].to(own[name])) for name in shared):
                return prefix
        raise EncoderFolderError(f"{self.folder}: its file holds no tensors by the network's names, such as {last}")

    def with_weights(self, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """Builds the network with other weights; what they lack, such as an unused head, stays as it is."""
        from transformers import AutoModel

        own = self.network.state_dict()
        module = AutoModel.from_config(self.network.config)
        module.load_state_dict({name: state.get(prefix + name, value) for name, value in own.items()})
        return module.eval()

    def inputs(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Returns the network's inputs for some sentences, padded to the longest of them."""
        tokens = self._tokenizer(
            list(sentences), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        return dict(tokens)

    @torch.inference_mode()
    def embed(self, network: nn.Module, sentences: Sequence[str]) -> np.ndarray:
        """Returns the mean of the last hidden state over each sentence's tokens, at unit length, float32 `(S, E)`."""
        lengths = [
            len(ids)
            for ids in self._tokenizer(list(sentences), truncation=True, max_length=self._max_tokens)["input_ids"]
        ]
        order_S = torch.tensor(lengths).argsort()
        parts = []
        for rows in order_S.split(_SENTENCES_OF_A_PASS):
            inputs = self.inputs([sentences[row] for row in map(int, rows)])
            is_real_ST1 = inputs["attention_mask"].unsqueeze(-1)
            hidden_STE = network(**inputs).last_hidden_state
            parts.append((hidden_STE * is_real_ST1).sum(dim=1) / is_real_ST1.sum(dim=1))
        features_SE = torch.nn.functional.normalize(torch.cat(parts), dim=1)
        return features_SE[order_S.argsort()].numpy()


def probe(train_SE: np.ndarray, train_S: np.ndarray, test_SE: np.ndarray, test_S: np.ndarray) -> np.ndarray:
    """Returns whether a ridge classifier is right on each test sentence, bool `(S,)`.

    Its penalty is that of the least squared error on training sentences, each left out in turn.
    """
    from sklearn.linear_model import RidgeClassifierCV

    return RidgeClassifierCV(alphas=_PENALTIES).fit(train_SE, train_S).predict(test_SE) == test_S


def judge(encoder: HubEncoder, network: nn.Module, sets: Sequence[TextSet]) -> RightBySet:
    """Trains a probe for each set on what a network makes of its sentences; returns which tests are right, by set."""
    right = {}
    for each in sets:
        features = [encoder.embed(network, sentences) for sentences, _ in (each.train, each.test)]
        right[each.name] = probe(features[0], each.train[1], features[1], each.test[1])
    return right


def loss_and_error(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Returns by how many points accuracy falls, the mean over sets, and the standard error of that.

    The error is that of paired differences over test sentences.
    """
    lost = [before[name].astype(float) - after[name] for name in before]
    error = np.sqrt(sum(part.var() / len(part) for part in lost)) / len(lost)
    return 100 * float(np.mean([part.mean() for part in lost])), 100 * float(error)
