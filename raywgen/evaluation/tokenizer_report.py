"""Measures bits, distortion and accuracy of a run's tokeniser, on networks that it was trained on and on others.

Networks are read, coded and judged in blocks, of which nothing but sums is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus, NetworkFacts
from raywgen.evaluation.tokenizer_facts import SPLITS, SplitReport, TokenizerReport
from raywgen.generators import Generator
from raywgen.generators.bundle import load_bundle
from raywgen.generators.reporting import WeightCode
from raywgen.inputs import MAX_JSON_BYTES, parse_json
from raywgen.locations import joined
from raywgen.nn.devices import resolved_device
from raywgen.storage import Storage, read_file
from raywgen.tasks import Task, balanced_accuracy, build_network, build_task, stacked_logits
from raywgen.training.config import read_train_config
from raywgen.training.run_folder import BUNDLE, CONFIG
from raywgen.training.stored_weights import StoredWeights, whole_blocks
from raywgen.trust import check_address, reading
from raywgen.weights import Layout, Normalizer

DB_PER_BIT = 20 * math.log10(2)

TOKENIZER = "tokenizer.json"
_VALUES_OF_A_SPLIT = 1 << 25
_NETWORKS_OF_A_PASS = 16
_LEAST_POWER = 1e-30


def report_run(run_dir: str | Path) -> TokenizerReport | None:
    """Measures the tokeniser of a run folder on the corpus it was trained on, and writes `tokenizer.json` into it.

    A run that has the file already is not measured again.

    Returns:
        The report; None where the run's generator has no tokens.

    Raises:
        BundleError, ConfigError, CorpusError: The folder holds no finished run, or its corpus cannot be read.
    """
    storage = Storage.at(run_dir)
    if storage.size(TOKENIZER) is not None:
        return TokenizerReport.from_json(parse_json(read_file(joined(run_dir, TOKENIZER), MAX_JSON_BYTES)))
    generator = load_bundle(joined(run_dir, BUNDLE)).to(resolved_device("auto"))
    code = generator.weight_code()
    if code is None:
        return None
    config = joined(run_dir, CONFIG)
    location = read_train_config(config).corpus
    with reading(config):
        check_address(location, "corpus")
    corpus = Corpus.open(location)
    report = tokenizer_report(generator, code, corpus)
    storage.write(TOKENIZER, json.dumps(asdict(report), indent=1).encode())
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
        tally = _Tally(usage_LV=torch.zeros(code.num_levels, code.num_codes, dtype=torch.int64))
        for rows, network in _chosen(generator, corpus, split, num_networks):
            error = _measure(tally, generator, code, corpus, rows, _Judge(corpus, network, rows, num_samples))
            no_accuracy = no_accuracy or error
        if tally.num_networks:
            reports.append(_split_report(split, tally, code, has_accuracy=not no_accuracy))
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


@dataclass(slots=True)
class _Tally:
    """Counts over the networks of a split, block by block.

    Attributes:
        usage_LV: Uses of each code of each level, by tokens that carry values.
        num_networks: Networks.
        num_values: Values of all networks.
        signal: Sum of squares of all values, in units of each tensor's scale.
        noise: Sum of squares of all errors, likewise.
        accuracies: Accuracy of networks and of their reconstructions, `(B, 2)` for each block.
    """

    usage_LV: Tensor
    num_networks: int = 0
    num_values: int = 0
    signal: float = 0.0
    noise: float = 0.0
    accuracies: list[Tensor] = field(default_factory=list)


def _measure(
    tally: _Tally, generator: Generator, code: WeightCode, corpus: Corpus, rows: pa.Table, judge: _Judge
) -> str:
    """Adds networks of one layout to a tally; returns why their accuracy is not known, or nothing."""
    layout, no_accuracy = judge.network.layout, ""
    normalizer, is_real_WL = generator.normalizers[layout.id][1], code.real_tokens(layout)
    for index_B, values_BD in whole_blocks(StoredWeights(corpus, layout, rows), layout.num_values):
        given_BD = values_BD.to(generator.device)
        codes_BWL, decoded_BD = code.encode(given_BD, layout), generator.reconstruct(given_BD, layout)
        tally.usage_LV += code_counts(codes_BWL, code.num_codes, is_real_WL).cpu()
        signal_BD = normalizer.normalise(given_BD)
        tally.signal += float(signal_BD.double().square().sum())
        tally.noise += float((normalizer.normalise(decoded_BD) - signal_BD).double().square().sum())
        tally.num_networks += len(values_BD)
        tally.num_values += values_BD.numel()
        if no_accuracy:
            continue
        try:
            tally.accuracies.append(judge.accuracies(index_B, values_BD, decoded_BD.cpu()))
        except (ValueError, KeyError, OSError) as error:
            no_accuracy = f"{judge.network.name}: {error}"
    return no_accuracy


@dataclass(frozen=True)
class _Judge:
    """Runs networks of one layout on the test samples of their tasks."""

    corpus: Corpus
    network: NetworkFacts
    rows: pa.Table
    num_samples: int

    def accuracies(self, index_B: Tensor, values_BD: Tensor, decoded_BD: Tensor) -> Tensor:
        """Returns the accuracy of some of the networks and of their reconstructions, `(B, 2)`, ordered by tasks.

        Raises:
            ValueError: The corpus does not say how the network is built, or what it was trained for.
        """
        places: dict[str, list[int]] = {}
        for place, row in enumerate(index_B.tolist()):
            places.setdefault(self._tasks[row].id, []).append(place)
        return torch.cat(
            [
                self._of_task(self._tasks[int(index_B[of_one[0]])], values_BD[of_one], decoded_BD[of_one])
                for of_one in places.values()
            ]
        )

    def _of_task(self, task: Task, *values_ND: Tensor) -> Tensor:
        # Evenly spread, because samples may be sorted by class.
        step = max(1, -(-len(task.test_y_S) // self.num_samples))
        x_SF, labels_S = task.test_inputs[::step], task.test_y_S[::step]
        columns = []
        for each_ND in values_ND:
            passes = map(self.network.layout.unflatten, each_ND.split(_NETWORKS_OF_A_PASS))
            found = [balanced_accuracy(stacked_logits(self._module, state, x_SF), labels_S) for state in passes]
            columns.append(torch.cat(found))
        return torch.stack(columns, dim=1)

    @cached_property
    def _module(self) -> nn.Module:
        if not self.network.recipe:
            raise ValueError("the corpus has no recipe of this network")
        return build_network(self.network.recipe).eval()

    @cached_property
    def _tasks(self) -> list[Task]:
        names = self.rows.column("task_id").to_pylist()
        if not set(names) <= set(self.corpus.tasks):
            raise ValueError("checkpoints of the corpus name no task, or one that it does not know")
        return [build_task(self.corpus.tasks[name].recipe) for name in names]


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


def _split_report(split: str, tally: _Tally, code: WeightCode, *, has_accuracy: bool) -> SplitReport:
    num_tokens = int(tally.usage_LV.sum())
    bits = num_tokens * math.log2(code.num_codes) / tally.num_values
    snr = 10 * math.log10(max(tally.signal, _LEAST_POWER) / max(tally.noise, _LEAST_POWER))
    use = [code_use(usage_V.unsqueeze(0)) for usage_V in tally.usage_LV]
    accuracy_2 = torch.cat(tally.accuracies).mean(dim=0) if has_accuracy else None
    return SplitReport(
        split=split,
        num_networks=tally.num_networks,
        bits_per_value=bits,
        values_per_token=tally.num_values / num_tokens,
        snr_db=snr,
        snr_gap_db=DB_PER_BIT * bits - snr,
        codes_used=tuple(used for used, _ in use),
        code_perplexity=tuple(perplexity for _, perplexity in use),
        original_accuracy=None if accuracy_2 is None else float(accuracy_2[0]),
        reconstructed_accuracy=None if accuracy_2 is None else float(accuracy_2[1]),
    )


def _num_normalizer_values(layout: Layout, normalizer: Normalizer) -> int:
    """Counts the numbers of a normaliser: each tensor has one scale, and one base where networks share no start."""
    num_tensors = len(layout.generated)
    return num_tensors + (num_tensors if normalizer.start_D is None else layout.num_values)


def code_counts(codes_BWL: Tensor, num_codes: int, is_real_WL: Tensor | None = None) -> Tensor:
    """Counts the uses of each code of each level, int64 `(L, V)`, by all tokens or by those that carry values."""
    counts = []
    for level, codes_BW in enumerate(codes_BWL.unbind(-1)):
        codes_X = codes_BW.flatten() if is_real_WL is None else codes_BW[:, is_real_WL[:, level]].flatten()
        counts.append(torch.bincount(codes_X, minlength=num_codes))
    return torch.stack(counts)


def code_use(usage_LV: Tensor) -> tuple[float, float]:
    """Returns the share of the codes that occur, and their perplexity; means over the L levels."""
    used, perplexity = [], []
    for usage_V in usage_LV.double():
        share_X = usage_V[usage_V > 0] / usage_V.sum()
        used.append(len(share_X) / len(usage_V))
        perplexity.append(float(torch.exp(-(share_X * share_X.log()).sum())))
    return sum(used) / max(1, len(used)), sum(perplexity) / max(1, len(perplexity))
