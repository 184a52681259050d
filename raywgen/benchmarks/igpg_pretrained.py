"""Compresses published networks within a budget of bits, and has an IGPG trained on them generate them again.

The codec needs no training, so every network is new to it; the networks of `heldout` are new to IGPG too, which is
trained on a corpus of the others. With one network per condition a generator that succeeds has only retrieved it:
`agreement` and `novelty` measure how far it did.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from raywgen.benchmarks.pretrained_networks import (
    Images,
    Pretrained,
    PretrainedConfig,
    PretrainedError,
    correct,
    find_networks,
    percent,
)
from raywgen.benchmarks.pretrained_written import Written, pretrained_corpus, written_again
from raywgen.benchmarks.rates import rate_report, round_to_nearest, snr_db
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import trained_generators
from raywgen.corpus import Corpus
from raywgen.corpus.compression import CodecConfig, NetworkCodec
from raywgen.evaluation.novelty import error_overlap
from raywgen.evaluation.tokenizer_report import tokenizer_report
from raywgen.generators import OptimizerConfig
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig, SamplingConfig
from raywgen.nn.batch_norm import match_statistics, reestimate_statistics
from raywgen.nn.precision import Precision
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.progress import Bar, Reporter
from raywgen.training.session import ray_session
from raywgen.weights import StateDict

_BESIDE = ("beside_reconstructed", "reconstructed_stored", "reconstructed_reestimated", "round_to_nearest")


def _codec() -> CodecConfig:
    return CodecConfig(state_bits=12)


def _low_bits() -> CodecConfig:
    # At 2 bits a grid of 8 for the small tensors would take a twentieth of all bits.
    return CodecConfig(state_bits=12, bits_per_value=2.0, small_bits=4, count_equally="values")


def _igpg() -> IGPGConfig:
    # Each chunk is conditioned on its position alone: in a memorised network one wrong chunk would otherwise make all
    # later ones wrong. Longer chunks are fewer, so each is seen more often.
    return IGPGConfig(
        tokenizer=TokenizerConfig(
            num_steps=1, batch_size=4, chunk_length=64, window=1024, quantiser=QuantiserConfig(num_levels=12)
        ),
        prior=PriorConfig(
            num_steps=1800, batch_size=4, width=256, num_layers=2, window=256, independent_share=1.0,
            optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=0.0),
        ),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )  # fmt: skip


@dataclass(kw_only=True)
class IGPGPretrainedConfig(PretrainedConfig):
    """The networks, the codec and the generator.

    Attributes:
        heldout: File or folder of networks that IGPG is not trained on; by default the last of `dir`.
        num_beside: Test images, fewer than `num_images`, of all accuracies but `original` and `reconstructed`, and of
            `beside_original`; 0 for all.
        codec: Codec of the figure `reconstructed`.
        low_bits: Codec of the figure `snr_gap_db`.
        generator: IGPG of the figure `generated`.
        sampling: Settings of its sampling.
        temperature: Temperature of its tokens.
        precision: Precision of its training.
    """

    heldout: str = ""
    num_beside: int = 1000
    codec: CodecConfig = field(default_factory=_codec)
    low_bits: CodecConfig = field(default_factory=_low_bits)
    generator: IGPGConfig = field(default_factory=_igpg)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(chunks="independent"))
    temperature: float = 0.0
    precision: Precision = "auto"
    out: str = "runs/benchmarks/igpg-pretrained"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """All images: the test's, fewer of them, and training images for statistics and conditions."""

    test: Images
    beside: Images
    train: Images


def measure(config: IGPGPretrainedConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Compresses and judges every network, trains IGPG on those that are not held out, and lets it write them."""
    root = config.root()
    networks, heldout = chosen_networks(config.dir, config.heldout)
    rows, conditions = [], {}
    for seed in config.all_seeds:
        row, conditions = _one_seed(config, root, networks, heldout, seed)
        rows.append(row)
    figures, spreads = over_seeds(rows)
    return figures, conditions | config.conditions(spreads)


def chosen_networks(folder: str, heldout: str) -> tuple[list[Pretrained], list[Pretrained]]:
    """Returns the networks to learn and those held out, which are the ones of `heldout` or the last of the folder.

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
    config: IGPGPretrainedConfig, root: str, networks: list[Pretrained], heldout: list[Pretrained], seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    data = _Data(
        test=config.test_images(config.num_images),
        beside=config.test_images(config.num_beside),
        train=config.train_images(config.num_unlabelled, seed),
    )
    reporter = Reporter()
    with reporter.step("code", "write and judge networks") as bar:
        each = {}
        for index, network in enumerate([*networks, *heldout]):
            row = _coded(config, network, data, bar, index, len(networks) + len(heldout))
            each[network.name] = row
            summary = ", ".join(f"{name} {row[name]:.2f}" for name in ("original", "reconstructed", "bits_per_value"))
            reporter.console.print(f"  {network.name}: {summary}", highlight=False)
    names, heldout_names = ([network.name for network in part] for part in (networks, heldout))
    figures = _means(each, names, "") | _means(each, heldout_names, "heldout_")
    figures["largest_loss"] = max(row["original"] - row["reconstructed"] for row in each.values())
    figures |= _most_and_means(each)
    with reporter.step("2 bits", "measure held-out networks against the bound"):
        figures |= _at_low_bits(config.low_bits, heldout)
    generated, written = _generated(config, root, networks, data, seed, reporter)
    conditions = {
        "networks": names,
        "heldout": heldout_names,
        "images": {part: len(getattr(data, part).y_S) for part in ("test", "beside", "train")},
        "each": each,
        "written": written,
        "codec": asdict(config.codec),
        "generator": asdict(config.generator),
    }
    return figures | generated, conditions


def _coded(
    config: IGPGPretrainedConfig, network: Pretrained, data: _Data, bar: Bar, index: int, num_networks: int
) -> dict[str, float]:
    """Returns rates and accuracies of one network; stored statistics are matched to the coded weights by default."""
    codec, original = NetworkCodec(config.codec), network.module()
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
        "beside_original": percent(original, data.beside),
        **{name: percent(network.module(state), data.beside) for name, state in beside.items()},
        "bits_per_value": sum(codec.bits(coded).values()) / coded.layout.num_values,
        "values_per_token": rate.values_per_token,
        "snr_db": rate.snr_db,
        "round_to_nearest_snr_db": rounded_snr_db,
        "codebook_values": float(rate.codebook_values),
        "decoder_values": 0.0,
    }


def _rounded(
    network: Pretrained, codec: NetworkCodec, stored: StateDict, bits_per_value: float
) -> tuple[StateDict, float]:
    """Rounds large tensors to the number of levels of their code's bits, with the better of two step sizes."""
    layout, large = network.layout, codec.large_tensors(network.layout)
    best: tuple[StateDict, float] = ({}, -float("inf"))
    for is_best in (True, False):
        rounded = round_to_nearest(layout, network.state, int(2**bits_per_value), is_best)
        snr = snr_db(large, network.state, rounded)
        if snr > best[1]:
            best = (stored | {spec.name: rounded[spec.name].view(spec.shape) for spec in large}, snr)
    return best


def _means(each: dict[str, dict[str, float]], names: list[str], prefix: str) -> dict[str, float]:
    """Averages accuracies over some networks."""
    figures = ("original", "reconstructed", "beside_original", *_BESIDE)
    return {f"{prefix}{figure}": mean(each[name][figure] for name in names) for figure in figures}


def _most_and_means(each: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns rates over all networks: the highest number of bits, and means of the others."""
    rows = list(each.values())
    means = ("values_per_token", "snr_db", "round_to_nearest_snr_db", "codebook_values", "decoder_values")
    return {"bits_per_value": max(row["bits_per_value"] for row in rows)} | {
        name: mean(row[name] for row in rows) for name in means
    }


def _at_low_bits(config: CodecConfig, heldout: list[Pretrained]) -> dict[str, float]:
    """Returns signal to noise of held-out networks at few bits, and the largest distance from the bound."""
    codec = NetworkCodec(config)
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
    config: IGPGPretrainedConfig, root: str, networks: list[Pretrained], data: _Data, seed: int, reporter: Reporter
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Judges generated networks and those decoded from their tokens; returns means, and figures of each network."""
    generator, corpus = _trained(config, root, networks, seed)
    each = {}
    with reporter.step("write", "write networks again") as bar:
        for index, network in enumerate(networks):
            bar.named(index, len(networks), network.name)
            written = written_again(generator, corpus, network, config.sampling, config.temperature, seed)
            each[network.name] = _judged(network, written, data) | written.figures
    figures = {name: mean(row[name] for row in each.values()) for name in each[networks[0].name]}
    return figures | _igpg_sizes(generator, corpus), each


def _trained(config: IGPGPretrainedConfig, root: str, networks: list[Pretrained], seed: int) -> tuple[IGPG, Corpus]:
    task = _task(config)
    with ray_session() if config.num_workers else nullcontext():
        corpus = pretrained_corpus(root, networks, task)
        chosen = {"igpg": ("igpg", config.generator)}
        generator = trained_generators(config, root, corpus, chosen, shot=0, seed=seed)["igpg"].eval()
    assert isinstance(generator, IGPG)
    return generator, corpus


def _task(config: IGPGPretrainedConfig) -> dict[str, Any]:
    """Returns the recipe of the networks' common task, on the images by which they are judged."""
    paths = {"path": str(Path(config.data).absolute()), "test_path": str(Path(config.test_data).absolute())}
    limits = {"limit": config.num_unlabelled} | ({"test_limit": config.num_beside} if config.num_beside else {})
    return {"name": "images", **paths, **limits, "channels": len(config.mean), "mean": config.mean, "std": config.std}


def _igpg_sizes(generator: IGPG, corpus: Corpus) -> dict[str, float]:
    """Returns the rate of IGPG's tokens, and the number of values that it holds beside them."""
    report = tokenizer_report(generator, generator.weight_code(), corpus)
    num_values = sum(corpus.layout(layout_id).num_values for layout_id in corpus.facts.column("layout_id").to_pylist())
    return {
        "igpg_bits_per_value": report.splits[0].bits_per_value,
        "igpg_snr_db": report.splits[0].snr_db,
        "igpg_tokens": num_values / report.splits[0].values_per_token,
        "igpg_codebook_values": float(report.codebook_values),
        "igpg_decoder_values": float(report.decoder_values),
        "igpg_normalizer_values": float(report.normalizer_values),
        "igpg_prior_values": float(sum(parameter.numel() for parameter in generator.prior.parameters())),
        "igpg_learned_values": float(num_values),
    }


def _judged(network: Pretrained, written: Written, data: _Data) -> dict[str, float]:
    """Returns accuracy with written and with re-estimated statistics, and overlap of errors with the network's."""
    row = {}
    for name, values_D in (("generated", written.values_D), ("igpg_reconstructed", written.reconstructed_D)):
        state = network.layout.unflatten(values_D)
        new = state | reestimate_statistics(network.module(state), data.train.x_SCHW)
        wrong_S = ~correct(network.module(new), data.beside)
        row[f"{name}_stored"] = percent(network.module(state), data.beside)
        row[f"{name}_reestimated"] = 100 * float((~wrong_S).double().mean())
        overlap_1 = error_overlap(wrong_S.unsqueeze(0), ~correct(network.module(), data.beside).unsqueeze(0))
        row[f"{name}_error_overlap"] = float(overlap_1)
    return row
