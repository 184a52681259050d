"""Measures bits, distortion and accuracy of a run's tokeniser, on networks that it was trained on and on others.

Shape letters beyond the legend in `raywgen.weights`: X chunks of all networks, P networks of a pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus, NetworkFacts
from raywgen.evaluation.tokenizer_facts import SPLITS, SplitReport, TokenizerReport
from raywgen.files import write_text
from raywgen.generators import Generator
from raywgen.generators.bundle import load_bundle
from raywgen.generators.reporting import WeightCode
from raywgen.inputs import read_json
from raywgen.tasks import Task, balanced_accuracy, build_network, build_task, stacked_logits
from raywgen.training.config import read_train_config
from raywgen.training.run_folder import BUNDLE, CONFIG
from raywgen.trust import check_address, reading
from raywgen.weights import Layout, Normalizer, NormalizerTable

DB_PER_BIT = 20 * math.log10(2)

TOKENIZER = "tokenizer.json"
_VALUES_OF_A_SPLIT = 1 << 25
_VALUES_OF_A_PASS = 1 << 22
_NETWORKS_OF_A_PASS = 16


def report_run(run_dir: str | Path) -> TokenizerReport | None:
    """Measures the tokeniser of a run folder on the corpus it was trained on, and writes `tokenizer.json` into it.

    A run that has the file already is not measured again.

    Returns:
        The report; None where the run's generator has no tokens.

    Raises:
        BundleError, ConfigError, CorpusError: The folder holds no finished run, or its corpus cannot be read.
    """
    root, path = Path(run_dir), Path(run_dir) / TOKENIZER
    if path.is_file():
        return TokenizerReport.from_json(read_json(path))
    generator = load_bundle(root / BUNDLE)
    code = generator.weight_code()
    if code is None:
        return None
    location = read_train_config(root / CONFIG).corpus
    with reading(str(root / CONFIG)):
        check_address(location, "corpus")
    corpus = Corpus.open(location)
    report = tokenizer_report(generator, code, corpus)
    write_text(path, json.dumps(asdict(report), indent=1))
    return report


@torch.no_grad()
def tokenizer_report(
    generator: Generator, code: WeightCode, corpus: Corpus, *, num_networks: int = 256, num_samples: int = 1000
) -> TokenizerReport:
    """Measures a generator's tokeniser on a corpus.

    Args:
        generator: The generator with the tokeniser.
        code: The tokeniser's code of weights.
        corpus: The corpus; layouts that the generator does not know are left out.
        num_networks: Maximum number of networks of each split, evenly spread over layouts and checkpoints; fewer where
            they are large, but at least one of each layout.
        num_samples: Maximum number of test samples of each task.
    """
    corpus.arrange(generator.layouts)
    no_accuracy, reports = "", []
    for split in SPLITS:
        parts = []
        for rows, network in _chosen(generator, corpus, split, num_networks):
            part = _Part(generator, code, network, corpus.values(rows))
            try:
                part.judge(_tasks(rows, corpus), num_samples)
            except (ValueError, KeyError, OSError) as error:
                no_accuracy = no_accuracy or f"{network.name}: {error}"
            parts.append(part)
        if parts:
            reports.append(_split_report(split, parts, generator.normalizers, code, has_accuracy=not no_accuracy))
    return TokenizerReport(
        coder=code.coder,
        quantiser=code.quantiser,
        num_levels=code.num_levels,
        num_codes=code.num_codes,
        codebook_values=code.num_codebook_values,
        decoder_values=code.num_decoder_values,
        normalizer_values=sum(_num_normalizer_values(*known) for known in generator.normalizers.values()),
        no_accuracy=no_accuracy,
        splits=tuple(reports),
    )


class _Part:
    """Networks of one layout with their tokens, their reconstructions and the accuracy of both."""

    def __init__(self, generator: Generator, code: WeightCode, network: NetworkFacts, values_ND: Tensor) -> None:
        self.network = network
        self.values_ND = values_ND
        rows = max(1, _VALUES_OF_A_PASS // network.layout.num_values)
        layout, passes = network.layout, values_ND.split(rows)
        self.codes_XL = torch.cat([code.encode(part_ND, layout).flatten(0, 1) for part_ND in passes])
        self.is_real_XL = code.real_tokens(layout).repeat(len(values_ND), 1)
        self.decoded_ND = torch.cat([generator.reconstruct(part_ND, layout) for part_ND in passes])
        self.accuracies_N2 = torch.zeros(0, 2)

    def power(self, normalizer: Normalizer) -> tuple[float, float]:
        """Returns the sums of squares of signal and noise, in units of each tensor's scale."""
        signal_ND = normalizer.normalise(self.values_ND)
        noise_ND = normalizer.normalise(self.decoded_ND) - signal_ND
        return float(signal_ND.double().square().sum()), float(noise_ND.double().square().sum())

    def judge(self, tasks: list[Task], num_samples: int) -> None:
        """Measures the accuracy of every network and of its reconstruction.

        Raises:
            ValueError: The corpus does not say how the network is built.
        """
        if not self.network.recipe:
            raise ValueError("the corpus has no recipe of this network")
        module = build_network(self.network.recipe).eval()
        places: dict[str, list[int]] = {}
        for place, task in enumerate(tasks):
            places.setdefault(task.id, []).append(place)
        found = [self._judge(module, tasks[of_one[0]], of_one, num_samples) for of_one in places.values()]
        self.accuracies_N2 = torch.cat(found)

    def _judge(self, module: nn.Module, task: Task, places: list[int], num_samples: int) -> Tensor:
        # Evenly spread, because samples may be sorted by class.
        step = max(1, -(-len(task.test_y_S) // num_samples))
        x_SF, labels_S = task.test_inputs[::step], task.test_y_S[::step]
        found = []
        for place_P in torch.tensor(places).split(_NETWORKS_OF_A_PASS):
            states = [
                self.network.layout.unflatten(values_ND[place_P]) for values_ND in (self.values_ND, self.decoded_ND)
            ]
            accuracy = [balanced_accuracy(stacked_logits(module, state, x_SF), labels_S) for state in states]
            found.append(torch.stack(accuracy, dim=1))
        return torch.cat(found)


def _chosen(
    generator: Generator, corpus: Corpus, split: str, num_networks: int
) -> Iterator[tuple[pa.Table, NetworkFacts]]:
    """Yields facts of some networks of every layout."""
    splits = set(corpus.facts.column("split").to_pylist()) - {"base"}
    wanted = [name for name in sorted(splits) if (name == "train") == (split == SPLITS[0])]
    known = {name: network for name, network in corpus.networks.items() if name in generator.normalizers}
    for layout_id, network in known.items():
        rows = corpus.select(layout_id=layout_id, split=wanted)
        affordable = _VALUES_OF_A_SPLIT // len(known) // network.layout.num_values
        num = min(rows.num_rows, max(1, min(num_networks // len(known), affordable)))
        if num:
            yield rows.take(torch.linspace(0, rows.num_rows - 1, num).round().long().tolist()), network


def _tasks(rows: pa.Table, corpus: Corpus) -> list[Task]:
    names = rows.column("task_id").to_pylist()
    if not set(names) <= set(corpus.tasks):
        raise ValueError("checkpoints of the corpus name no task, or one that it does not know")
    return [build_task(corpus.tasks[name].recipe) for name in names]


def _split_report(
    split: str, parts: list[_Part], normalizers: NormalizerTable, code: WeightCode, *, has_accuracy: bool
) -> SplitReport:
    num_values = sum(part.values_ND.numel() for part in parts)
    codes_XL, is_real_XL = (
        torch.cat(each) for each in zip(*((part.codes_XL, part.is_real_XL) for part in parts), strict=True)
    )
    num_tokens = int(is_real_XL.sum())
    bits = num_tokens * math.log2(code.num_codes) / num_values
    powers = [part.power(normalizers[part.network.layout.id][1]) for part in parts]
    signal, noise = (max(sum(each), 1e-30) for each in zip(*powers, strict=True))
    snr = 10 * math.log10(signal / noise)
    columns = zip(codes_XL.t(), is_real_XL.t(), strict=True)
    use = [code_use(codes_X[is_real_X].unsqueeze(1), code.num_codes) for codes_X, is_real_X in columns]
    accuracy_2 = torch.cat([part.accuracies_N2 for part in parts]).mean(dim=0)
    return SplitReport(
        split=split,
        num_networks=sum(len(part.values_ND) for part in parts),
        bits_per_value=bits,
        values_per_token=num_values / num_tokens,
        snr_db=snr,
        snr_gap_db=DB_PER_BIT * bits - snr,
        codes_used=tuple(used for used, _ in use),
        code_perplexity=tuple(perplexity for _, perplexity in use),
        original_accuracy=float(accuracy_2[0]) if has_accuracy else None,
        reconstructed_accuracy=float(accuracy_2[1]) if has_accuracy else None,
    )


def _num_normalizer_values(layout: Layout, normalizer: Normalizer) -> int:
    """Counts the numbers of a normaliser: each tensor has one scale, and one base where networks share no start."""
    num_tensors = len(layout.generated)
    return num_tensors + (num_tensors if normalizer.start_D is None else layout.num_values)


def code_use(codes_NL: Tensor, num_codes: int) -> tuple[float, float]:
    """Returns the share of the codes that occur, and their perplexity; means over the L levels."""
    used, perplexity = [], []
    for codes_N in codes_NL.t():
        counts_V = torch.unique(codes_N, return_counts=True)[1].double()
        share_V = counts_V / counts_V.sum()
        used.append(len(counts_V) / num_codes)
        perplexity.append(float(torch.exp(-(share_V * share_V.log()).sum())))
    return sum(used) / max(1, len(used)), sum(perplexity) / max(1, len(perplexity))
