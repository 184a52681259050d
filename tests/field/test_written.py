"""What `generate` writes of files that nobody can build holds masks, tables and ties as the files had them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raywgen.config import load_config
from raywgen.corpus import Corpus, CorpusError
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.igpg import IGPGConfig
from raywgen.training import TrainConfig, launch
from raywgen.training.data import measure_normalizers
from raywgen.weights import StateDict, load_state_dict
from tests.field.builders import build, save

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = torch.full((4, 4), -torch.inf).triu(1)
SMALL = [
    "tokenizer={chunk_length: 8, quantiser: {num_levels: 2, num_codes: 8}, num_steps: 4, batch_size: 4, width: 16}",
    "prior={width: 16, num_layers: 1, num_heads: 2, num_steps: 4, batch_size: 4}",
    "task_loss.num_steps=0",
]


def net(seed: int) -> StateDict:
    embed = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed))
    return {
        "embed.weight": embed,
        "attn.mask": MASK,
        "places": torch.arange(20),
        "bn.num_batches_tracked": torch.tensor(seed + 5),
        "wave": torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)),
        "head.weight": embed,
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("written")
    for seed in range(6):
        # Half of them in another order and dtype.
        state = net(seed)
        if seed % 2:
            half = state["embed.weight"].bfloat16()
            state = dict(sorted((state | {"embed.weight": half, "head.weight": half}).items()))
        save(root / "in" / f"{seed}.pt", state)
    return build(root, root / "in")


def test_networks_are_written_with_what_no_generator_writes(corpus: Corpus, tmp_path: Path) -> None:
    assert len(corpus.networks) == 1
    out = str(tmp_path / "run")
    generator = load_config(IGPGConfig, None, SMALL)
    launch([TrainConfig(method="igpg", corpus=corpus.location, out=out, num_workers=0, generator=generator)])
    for into in ("files", "corpus"):
        config = GenerateConfig(
            generator=out, corpus=corpus.location, out=str(tmp_path / into), num=2, temperature=1.0, into=into
        )
        rows = generate(config)
        written = Corpus.open(tmp_path / into) if into == "corpus" else None
        for row in rows:
            state = load_state_dict(row.path) if written is None else written.state_dict(row.checkpoint_id)
            assert set(state) == set(net(0))
            assert torch.equal(state["attn.mask"], MASK)
            assert torch.equal(state["places"], torch.arange(20))
            assert int(state["bn.num_batches_tracked"]) == 0
            assert torch.equal(state["embed.weight"], state["head.weight"])
            assert bool(state["wave"].real.any())
            assert bool(state["wave"].imag.any())
            assert state["embed.weight"].dtype == torch.float32


def test_references_are_not_disturbed_by_masks(corpus: Corpus) -> None:
    ((layout, normalizer),) = measure_normalizers(corpus).values()
    assert layout.num_values == 7 * 4 + 2 * 3
    assert bool(normalizer.base_D.isfinite().all())
    assert float(normalizer.scale_D.max()) < 3


def test_packed_networks_are_refused_before_training(tmp_path: Path) -> None:
    for seed in range(2):
        packed = torch.randint(0, 255, (4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        save(tmp_path / "in" / f"{seed}.pt", net(seed) | {"layer.qweight": packed})
    location = build(tmp_path, tmp_path / "in").location
    with pytest.raises(CorpusError, match=r"'layer\.qweight' \(uint8\[4, 8\]\).*packed weights"):
        launch([TrainConfig(method="igpg", corpus=location, out=str(tmp_path / "run"), num_workers=0)])
