"""What the field tests of ingests share: small networks, and a corpus of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus


def net(seed: int = 0) -> dict[str, Tensor]:
    """A small network with a batch norm, of fixed random values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.weight": torch.randn(4, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7 + seed),
        "fc.weight": torch.randn(5, 4, generator=generator),
        "fc.bias": torch.randn(5, generator=generator),
    }


def save(path: Path, content: Any, **options: Any) -> Path:
    """By safetensors where the name says so, else by torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def build(tmp_path: Path, *sources: Path | str, out: str = "corpus", **options: Any) -> Corpus:
    listed = [str(source) for source in sources]
    return build_corpus(BuildConfig(out=str(tmp_path / out), sources=listed, distributed=False, **options))


def ids(corpus: Corpus) -> list[str]:
    return sorted(corpus.facts.column("checkpoint_id").to_pylist())


def reasons(corpus: Corpus, kind: str | None = None) -> dict[str, str]:
    rows = corpus.quarantine.to_pylist()
    return {row["checkpoint_id"]: row["reason"] for row in rows if kind in (None, row["kind"])}


def same(corpus: Corpus, name: str, state: dict[str, Tensor]) -> None:
    """Asserts that a checkpoint came in bit for bit."""
    facts = corpus.query([f"checkpoint_id={name}"])
    prefix = facts.column("key_prefix")[0].as_py()
    found = {prefix + key: tensor for key, tensor in corpus.state_dict(name).items()}
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
