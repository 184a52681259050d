"""Published networks through IGPG: coded within a budget of bits, and written again by a prior trained on their tokens.

The code needs no training, so that every network is one it never saw; `heldout` is also unknown to the prior. With one
network per condition a prior that succeeds has only retrieved: `agreement` and `distance` say how far it did.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from raywgen.benchmarks.pretrained_networks import (
    Images,
    Pretrained,
    PretrainedError,
    correct,
    find_networks,
    points,
    read_images,
)
from raywgen.benchmarks.pretrained_prior import TokenPrior, TokenPriorConfig, Written, told_of
from raywgen.benchmarks.recipes import SeededConfig, over_seeds
from raywgen.generators.codec import AllocatedCodec, AllocatedConfig, rate_report
from raywgen.generators.codec.report import round_to_nearest, snr_db
from raywgen.nn.batch_norm import match_statistics, reestimate_statistics
from raywgen.nn.quantisers import QuantiserConfig, TrellisConfig
from raywgen.progress import Bar, Reporter
from raywgen.weights import StateDict

_BESIDE = ("beside_reconstructed", "reconstructed_stored", "reconstructed_reestimated", "round_to_nearest")


def _codec() -> AllocatedConfig:
    trellis = QuantiserConfig(kind="trellis", trellis=TrellisConfig(state_bits=12))
    # 8 bits for the small tensors nearly doubled the divergence of a ResNet-20's answers.
    return AllocatedConfig(quantiser=trellis, small_bits=10)


def _low_bits() -> AllocatedConfig:
    trellis = QuantiserConfig(kind="trellis", trellis=TrellisConfig(state_bits=12))
    # At 2 bits a grid of 8 for the small tensors would take a twentieth of all bits.
    return AllocatedConfig(quantiser=trellis, bits_per_value=2.0, small_bits=4, alike="values")


def _beside(folder: str, setting: str, name: str) -> str:
    """The file of that name in a folder, beside it, or beside the folder of a file."""
    path = Path(folder)
    places = [path, path.parent, path.parent.parent]
    found = [place / name for place in places if (place / name).is_file()]
    if not found:
        raise ValueError(f"no {name} in {path} or beside it; give {setting}=PATH")
    return str(found[0])


@dataclass(kw_only=True)
class Config(SeededConfig):
    """What is coded, learned and judged.

    Attributes:
        dir: Folder of the networks, or one file.
        heldout: File or folder of networks that the prior never sees; without it the last of `dir` is left out.
        data: Training images: unlabelled ones for the statistics, labelled ones for the condition. By default
            `cifar10-train.parquet` in `dir` or beside it.
        test_data: Test images; by default `cifar10-test.parquet` likewise.
        mean: Of the networks' input normalisation, one a channel.
        std: Likewise.
        num_images: Test images of `original` and `reconstructed`; 0 for all.
        num_beside: Test images, fewer, of all other accuracies and of `beside_original`; 0 for all.
        num_unlabelled: Training images for the statistics.
        codec: Of `reconstructed`.
        low_bits: Of `snr_gap_db`.
        generator: Tokens and prior of `generated`.
    """

    dir: str = ""
    heldout: str = ""
    data: str = ""
    test_data: str = ""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    num_images: int = 0
    num_beside: int = 1000
    num_unlabelled: int = 500
    codec: AllocatedConfig = field(default_factory=_codec)
    low_bits: AllocatedConfig = field(default_factory=_low_bits)
    generator: TokenPriorConfig = field(default_factory=TokenPriorConfig)
    out: str = "runs/benchmarks/igpg-pretrained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dir:
            raise ValueError("give dir=PATH of a folder of networks")
        self.data = self.data or _beside(self.dir, "data", "cifar10-train.parquet")
        self.test_data = self.test_data or _beside(self.dir, "test_data", "cifar10-test.parquet")
        if self.num_unlabelled < 2:
            raise ValueError(f"num_unlabelled={self.num_unlabelled}: must be at least 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """All images: the test's, fewer of them, and training images for statistics and conditions."""

    test: Images
    beside: Images
    train: Images


def measure(config: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """Codes and judges every network, trains the prior on those that are not held out, and lets it write them."""
    root = config.root()
    networks, heldout = chosen_networks(config.dir, config.heldout)
    rows, conditions = [], {}
    for seed in config.all_seeds:
        row, conditions = _one_seed(config, root, networks, heldout, seed)
        rows.append(row)
    figures, spreads = over_seeds(rows)
    return figures, conditions | config.conditions(spreads)


def chosen_networks(folder: str, heldout: str) -> tuple[list[Pretrained], list[Pretrained]]:
    """Networks to learn, and networks held out: those of `heldout`, or the last of the folder.

    Raises:
        PretrainedError: There are none, one is on both sides, or the only one of a folder would be left out.
    """
    networks = find_networks(folder)
    if not heldout:
        if len(networks) < 2:
            raise PretrainedError(f"{folder} holds one network; give heldout=PATH too, or a folder of several")
        return networks[:-1], networks[-1:]
    others = find_networks(heldout)
    names = {network.name for network in others}
    kept = [network for network in networks if network.name not in names]
    if not kept:
        raise PretrainedError(f"all networks of {folder} are held out; give heldout= other networks")
    return kept, others


def _one_seed(
    config: Config, root: str, networks: list[Pretrained], heldout: list[Pretrained], seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    as_told = (config.mean, config.std)
    data = _Data(
        test=read_images(config.test_data, config.num_images, *as_told),
        beside=read_images(config.test_data, config.num_beside, *as_told),
        train=read_images(config.data, config.num_unlabelled, *as_told, seed=seed),
    )
    reporter = Reporter()
    with reporter.step("code", "write and judge networks") as bar:
        each = {}
        for index, network in enumerate([*networks, *heldout]):
            row = _coded(config, network, data, bar, index, len(networks) + len(heldout))
            each[network.name] = row
            told = ", ".join(f"{name} {row[name]:.2f}" for name in ("original", "reconstructed", "bits_per_value"))
            reporter.console.print(f"  {network.name}: {told}", highlight=False)
    names, heldout_names = ([network.name for network in part] for part in (networks, heldout))
    figures = _means(each, names, "") | _means(each, heldout_names, "heldout_")
    figures["largest_loss"] = max(row["original"] - row["reconstructed"] for row in each.values())
    figures |= _most_and_means(each)
    with reporter.step("2 bits", "measure held-out networks against the bound"):
        figures |= _at_low_bits(config.low_bits, heldout)
    generated, written, is_trained = _generated(config, root, networks, data, seed, reporter)
    conditions = {
        "networks": names,
        "heldout": heldout_names,
        "images": {part: len(getattr(data, part).y_S) for part in ("test", "beside", "train")},
        "each": each,
        "written": told_of(written),
        "prior_trained_now": is_trained,
        "codec": asdict(config.codec),
    }
    return figures | generated, conditions


def _coded(
    config: Config, network: Pretrained, data: _Data, bar: Bar, index: int, num_networks: int
) -> dict[str, float]:
    """Rates and accuracies of one network; statistics are stored, matched to the coded weights unless said else."""
    codec, original = AllocatedCodec(config.codec), network.module()
    bar.named(index, num_networks, f"{network.name}: encode")
    first = codec.encode(network.state)
    stored = codec.decode(first)
    x_SCHW = data.train.x_SCHW
    coded = codec.with_statistics(first, stored | match_statistics(network.module(stored), original, x_SCHW))
    decoded = codec.decode(coded)
    rate = rate_report(codec, first, network.state)
    rounded, rounded_snr_db = _rounded(network, codec, stored, rate.large_bits_per_value)
    bar.named(index, num_networks, f"{network.name}: run")
    right_S, right_again_S = correct(original, data.test), correct(network.module(decoded), data.test)
    beside = {
        "beside_reconstructed": decoded,
        "reconstructed_stored": stored,
        "reconstructed_reestimated": stored | reestimate_statistics(network.module(stored), x_SCHW),
        "round_to_nearest": rounded | match_statistics(network.module(rounded), original, x_SCHW),
    }
    return {
        "original": 100 * float(right_S.double().mean()),
        "reconstructed": 100 * float(right_again_S.double().mean()),
        "equally_right": 100 * float((right_S == right_again_S).double().mean()),
        "beside_original": points(original, data.beside),
        **{name: points(network.module(state), data.beside) for name, state in beside.items()},
        "bits_per_value": sum(codec.bits(coded).values()) / coded.layout.num_values,
        "values_per_token": rate.values_per_token,
        "snr_db": rate.snr_db,
        "round_to_nearest_snr_db": rounded_snr_db,
        "codebook_values": float(codec.num_codebook_values),
        "decoder_values": float(rate.decoder_values),
    }


def _rounded(
    network: Pretrained, codec: AllocatedCodec, stored: StateDict, bits_per_value: float
) -> tuple[StateDict, float]:
    """Large tensors rounded to as many levels as their code has bits, with the better of two steps."""
    layout, large = network.layout, codec.large_tensors(network.layout)
    best: tuple[StateDict, float] = ({}, -float("inf"))
    for is_best in (True, False):
        rounded = round_to_nearest(layout, network.state, int(2**bits_per_value), is_best)
        snr = snr_db(large, network.state, rounded)
        if snr > best[1]:
            best = (stored | {spec.name: rounded[spec.name].view(spec.shape) for spec in large}, snr)
    return best


def _means(each: dict[str, dict[str, float]], names: list[str], prefix: str) -> dict[str, float]:
    """Accuracies over some networks."""
    figures = ("original", "reconstructed", "beside_original", *_BESIDE)
    return {f"{prefix}{figure}": mean(each[name][figure] for name in names) for figure in figures}


def _most_and_means(each: dict[str, dict[str, float]]) -> dict[str, float]:
    """Rates over all networks: the highest number of bits, means of the others."""
    rows = list(each.values())
    means = ("values_per_token", "snr_db", "round_to_nearest_snr_db", "codebook_values", "decoder_values")
    return {"bits_per_value": max(row["bits_per_value"] for row in rows)} | {
        name: mean(row[name] for row in rows) for name in means
    }


def _at_low_bits(config: AllocatedConfig, heldout: list[Pretrained]) -> dict[str, float]:
    """Signal to noise of held-out networks at few bits, the worst of them against the bound."""
    codec = AllocatedCodec(config)
    reports = [rate_report(codec, codec.encode(network.state), network.state) for network in heldout]
    return {
        "snr_gap_db": max(report.snr_gap_db for report in reports),
        "low_bits_per_value": max(report.bits_per_value for report in reports),
        "low_bits_snr_db": mean(report.snr_db for report in reports),
        "low_bits_round_to_nearest_snr_db": mean(
            max(report.nearest_snr_db, report.nearest_extremes_snr_db) for report in reports
        ),
    }


def _generated(
    config: Config, root: str, networks: list[Pretrained], data: _Data, seed: int, reporter: Reporter
) -> tuple[dict[str, float], dict[str, Written], bool]:
    """What the prior writes; its networks' statistics are re-estimated on the unlabelled images."""
    tokens = TokenPrior(config.generator, networks, data.train, seed)
    with reporter.step("prior", "train on tokens") as bar:
        is_trained = tokens.train_or_load(root, bar.update)
    if not is_trained:
        reporter.console.print("  a prior of the same recipe is kept; fresh=1 trains it again", highlight=False)
    with reporter.step("write", "write networks again") as bar:
        written, accuracies, limits = {}, [], []
        for index, network in enumerate(networks):
            bar.named(index, len(networks), network.name)
            written[network.name] = tokens.write(network)
            accuracies.append(_judged(network, written[network.name].values_D, data))
            limits.append(_judged(network, tokens.reconstruct(network), data))
    figures = {
        "generated": mean(accuracies),
        "tokens_reconstructed": mean(limits),
        "generated_distance": mean(one.distance for one in written.values()),
        "tokens_distance": mean(tokens.distance(network, tokens.reconstruct(network)) for network in networks),
        "generated_agreement": mean(one.agreement for one in written.values()),
        "generated_nats_per_token": mean(one.nats_per_token for one in written.values()),
        "tokens_bits_per_value": config.generator.bits_per_value,
        **{name: float(value) for name, value in tokens.num_values.items()},
    }
    return figures, written, is_trained


def _judged(network: Pretrained, values_D: Tensor, data: _Data) -> float:
    state = network.layout.unflatten(values_D)
    module = network.module(state | reestimate_statistics(network.module(state), data.train.x_SCHW))
    return points(module, data.beside)
