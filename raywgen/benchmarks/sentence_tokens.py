"""A sentence encoder as IGPG's tokens: a corpus of its file as it lies, and a tokeniser trained on windows of it.

Tensors of one dimension (biases, weights of norms), two in a thousand values, are kept in half precision beside the
tokens: a token's error is that of its chunk, and norms are off by more than what they multiply.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from raywgen.benchmarks.recipes import folder_of
from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.evaluation.tokenizer_report import code_counts
from raywgen.generation import load
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.progress import Reporter
from raywgen.training import TrainConfig, launch
from raywgen.training.encode_corpus import EncodeConfig, encode_corpus
from raywgen.weights import Layout, StateDict

_BITS_OF_A_NUMBER = 32
_BITS_OF_A_HALF = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenised:
    """One network as tokens.

    Attributes:
        generator: The generator whose tokeniser made them.
        layout: Layout of the network, as the generator arranges it.
        codes_ML: The tokens, int64.
        state: The network itself.
    """

    generator: IGPG
    layout: Layout
    codes_ML: Tensor
    state: StateDict

    @torch.no_grad()
    def decode(self, codes_ML: Tensor) -> StateDict:
        """Returns the network that tokens stand for, with small tensors and counters as they are kept."""
        normalizer = self.generator.normalizers[self.layout.id][1]
        (values_D,) = self.generator.tokenizer.decoded_values(codes_ML.unsqueeze(0), self.layout, normalizer)
        kept = {name: value for name, value in self.state.items() if not value.is_floating_point()}
        return self.layout.unflatten(values_D, kept) | halved(small_tensors(self.state))

    def corrupted(self, accuracy: float, seed: int) -> Tensor:
        """Returns tokens of which the given share are right for sure.

        Each other one is that of a drawn chunk, at the same level: a draw from what tokens of that level are.
        """
        random = torch.Generator().manual_seed(seed)
        is_wrong_ML = torch.rand(self.codes_ML.shape, generator=random) >= accuracy
        chunk_ML = torch.randint(len(self.codes_ML), self.codes_ML.shape, generator=random)
        return torch.where(is_wrong_ML, self.codes_ML.gather(0, chunk_ML), self.codes_ML)

    def by_level(self) -> tuple[float, float]:
        """Returns what a prior that knows only how often each level's codes occur reaches.

        Returns:
            The share of right tokens of one that writes the commonest, and the mean entropy of a token, in bits.
        """
        counts = code_counts(self.codes_ML.unsqueeze(0), self.generator.tokenizer.quantiser.num_codes)
        share_LV = counts.double() / len(self.codes_ML)
        entropy_L = -torch.xlogy(share_LV, share_LV).sum(dim=1) / math.log(2)
        return float(share_LV.amax(dim=1).mean()), float(entropy_L.mean())

    @property
    def num_bits(self) -> float:
        """Bits of tokens, small tensors, codebooks, decoder and normaliser."""
        tokenizer = self.generator.tokenizer
        quantiser = tokenizer.quantiser
        numbers = quantiser.num_codebook_values + sum(each.numel() for each in tokenizer.decoder.parameters())
        numbers += 2 * len(self.layout.generated)
        halves = sum(value.numel() for value in small_tensors(self.state).values())
        tokens = self.codes_ML.numel() * math.log2(quantiser.num_codes)
        return tokens + _BITS_OF_A_NUMBER * numbers + _BITS_OF_A_HALF * halves


def small_tensors(state: StateDict) -> StateDict:
    """Returns the tensors of at most one dimension, without counters."""
    return {name: value for name, value in state.items() if value.dim() < 2 and value.is_floating_point()}


def halved(state: StateDict) -> StateDict:
    """Rounds values to half precision."""
    return {name: value.half().to(value.dtype) for name, value in state.items()}


def encoder_corpus(root: str, folder: str) -> Corpus:
    """Builds a corpus of the weights in a folder of the hub, which is kept under a hash of its files.

    Raises:
        CorpusError: There are none, or they cannot be read.
        ValueError: The folder holds several networks.
    """
    files = {path.name: [path.stat().st_size, path.stat().st_mtime] for path in sorted(Path(folder).glob("*.*"))}
    out = folder_of(root, "corpus", {"model": str(Path(folder).absolute()), "files": files})
    corpus = build_corpus(BuildConfig(out=out, sources=[folder], distributed=False, strict=True))
    if corpus.facts.num_rows != 1:
        raise ValueError(f"{folder} holds {corpus.facts.num_rows} networks; give model= a folder of one encoder")
    return corpus


def tokenised(root: str, corpus: Corpus, state: StateDict, config: TokenizerConfig, reporter: Reporter) -> Tokenised:
    """Trains a tokeniser on windows of a corpus of one network, and encodes the network.

    Args:
        root: Folder of all kept parts.
        corpus: The corpus.
        state: Its network.
        config: The tokeniser.
        reporter: Shows progress.
    """
    igpg = IGPGConfig(
        tokenizer=config,
        prior=PriorConfig(num_steps=0, width=64, num_layers=1, window=512),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )
    run = folder_of(root, "tokenizer", {"corpus": corpus.location, "tokenizer": asdict(config)})
    with reporter.step("train", f"a tokeniser of {config.quantiser.num_levels} tokens a chunk") as bar:
        launch(
            [TrainConfig(method="igpg", generator=igpg, corpus=corpus.location, out=run, num_workers=0, device="cpu")],
            bar.training,
        )
    with reporter.step("encode", corpus.location) as bar:
        encoding = EncodeConfig(corpus=corpus.location, tokenizer=run, out=f"{run}-tokens", where="here", device="cpu")
        tokens = encode_corpus(encoding, bar.update)
    generator = load(run, device="cpu").generator.eval()
    assert isinstance(generator, IGPG)
    (layout,) = generator.layouts
    (name,) = corpus.facts.column("checkpoint_id").to_pylist()
    codes_1ML = tokens.of(layout.id, [name]).codes(torch.zeros(1, dtype=torch.int64))
    return Tokenised(generator=generator, layout=layout, codes_ML=codes_1ML[0], state=state)
