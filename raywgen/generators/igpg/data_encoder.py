"""Encodes labelled samples by a frozen encoder, before the set encoder reads them (IGPG, section 3: CLIP).

Here F counts the values of a raw sample, E the features of an encoded one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.tasks.encoders import EncoderError, load_encoder
from raywgen.weights import KeyedNoise

# The cache holds up to 64 MiB of features.
_KEPT_VALUES = 1 << 24
_SAME = 1e-3


class DataEncoder(nn.Module):
    """Encodes samples, each once, and caches their features.

    Samples are encoded one at a time, so that a sample's features do not depend on the rest of the batch. The encoder
    is no part of this module's state: loading a generator needs the encoder under the same name. The state holds the
    encoder's features of a fixed input instead, so that another encoder of that name is recognised.

    Args:
        name: The encoder, as `load_encoder` takes it.
        num_values: F, values of a raw sample.

    Raises:
        EncoderError: There is no such encoder, or it does not take such samples.
    """

    probe_1E: Tensor

    def __init__(self, name: str, num_values: int) -> None:
        super().__init__()
        self._name, self._num_values = name, num_values
        # In a tuple, so that it is neither trained nor saved.
        self._frozen = (load_encoder(name),)
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.register_buffer("probe_1E", self._probe())
        self.register_load_state_dict_post_hook(_check_probe)

    @property
    def num_features(self) -> int:
        """Returns E, the number of features."""
        return self.probe_1E.shape[1]

    def forward(self, samples_BSF: Tensor) -> Tensor:
        """Returns features `(B, S, E)`.

        Raises:
            EncoderError: Some features are not finite.
        """
        flat_NF = samples_BSF.detach().flatten(0, 1)
        rows = flat_NF.float().cpu().contiguous().numpy()
        digests = [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]
        found: dict[bytes, Tensor] = {}
        for index, digest in enumerate(digests):
            if digest in found:
                continue
            if digest in self._kept:
                self._kept.move_to_end(digest)
            else:
                self._kept[digest] = self._encode(flat_NF[index : index + 1])[0]
            found[digest] = self._kept[digest]
        while len(self._kept) > max(1, _KEPT_VALUES // self.num_features):
            self._kept.popitem(last=False)
        return torch.stack([found[digest] for digest in digests]).to(samples_BSF).unflatten(0, samples_BSF.shape[:2])

    def _encode(self, x_1F: Tensor) -> Tensor:
        (encoder,) = self._frozen
        return encoder.to(x_1F.device)(x_1F.float()).cpu()

    def _probe(self) -> Tensor:
        return self._encode(KeyedNoise(0, torch.zeros(1, dtype=torch.int64)).normal(self._num_values))


def _check_probe(module: nn.Module, _: Any) -> None:
    """Raises `EncoderError` where the encoder is not the one whose features were saved."""
    assert isinstance(module, DataEncoder)
    fresh_1E, saved_1E = module._probe(), module.probe_1E.cpu()
    # Another build of torch rounds differently; another encoder differs by far more.
    if float((fresh_1E - saved_1E).norm()) > _SAME * float(saved_1E.norm()):
        raise EncoderError(
            f"data_encoder={module._name}: its features are not those that this generator was trained on; give the "
            "encoder it was trained with"
        )
