"""Loss and accuracy on the user's samples stand beside chance, and what is no better is said to be so."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.generation import ChanceWarning, GenerateConfig, TrainedGenerator, generate
from raywgen.generation.judge import remedies
from raywgen.generators import DataSpec, Generated, GenerationRequest
from raywgen.tasks.standing import BETTER, DOUBTFUL
from raywgen.weights import load_state_dict
from tests.builders import condition, hypernetwork, igpg, layout_of, network
from tests.cli.test_use import output_of as shown_by
from tests.generation.test_generate import bundle

__all__ = ["bundle"]
ASK = "Is feature 0 above zero?"


def samples(num: int = 64) -> tuple[Tensor, Tensor]:
    drawn = condition(1, num_samples=num)
    return drawn.samples_BSF[0], drawn.labels_BS[0]


def solution(sign: float) -> Tensor:
    """A perceptron that answers whether feature 0 is above zero, rightly or, by its sign, always wrongly."""
    state = {name: torch.zeros_like(tensor) for name, tensor in network().state_dict().items()}
    state["0.weight"][0, 0], state["0.weight"][1, 0] = 1.0, -1.0
    state["2.weight"][1, 0] = state["2.weight"][0, 1] = sign
    return layout_of().flatten(state)


def writes(values_D: Tensor) -> TrainedGenerator:
    """A generator whose networks are always this one."""
    generator = hypernetwork()

    def same(request: GenerationRequest) -> Generated:
        num = len(request.condition)
        return Generated(values_BD=values_D.expand(num, -1), log_prob_B=torch.full((num,), 7.0))

    generator.generate = same  # pyright: ignore[reportAttributeAccessIssue]
    return TrainedGenerator(generator)


def test_a_good_network_is_returned_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = samples()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = writes(solution(1.0)).fill_with_report(network(), instruction=ASK, data=(x, y))
        writes(solution(1.0)).fill(network(), instruction=ASK, data=(x, y))
    found = filled.on_samples
    assert found is not None
    assert (found.accuracy, found.chance, found.num_samples, found.verdict) == (1.0, 0.5, 64, BETTER)
    assert found.majority == pytest.approx(float(torch.bincount(y).max()) / 64)
    assert (filled.log_prob, filled.best_of, filled.is_known) == (7.0, 8, True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Sequential on your samples, the best of 8 by its loss on them: {found.sentence()}"


def test_a_network_worse_than_chance_is_a_warning_with_remedies() -> None:
    with pytest.warns(ChanceWarning, match=r"worse than chance; .*best_of=32.*raywgen finetune") as warned:
        filled = writes(solution(-1.0)).fill_with_report(network(), instruction=ASK, data=samples())
    assert filled.on_samples is not None
    assert filled.on_samples.accuracy == 0
    assert Path(warned[0].filename).name == Path(__file__).name
    # Of a layout it never saw the first remedy is one that it did see.
    advice = remedies(igpg(), 8, is_known=False)
    assert advice.startswith("fill an architecture that the generator was trained on (of 38, 41 values); draw more")


def config(bundle: str, corpus: Corpus, out: Path, **changes: Any) -> GenerateConfig:
    return GenerateConfig(generator=bundle, corpus=corpus.location, out=str(out), best_of=2, **changes)


def test_generate_says_of_each_network_what_it_does_on_the_samples(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    task = zoo_corpus.tasks[next(iter(zoo_corpus.tasks))]
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.view(-1, 8, 8).numpy(), y=task.labels_S.numpy())
    mine = {"instruction": task.instruction, "data": str(tmp_path / "mine.npz"), "network": "mlp-64-6-2"}
    with pytest.warns(
        ChanceWarning, match=r"mlp-64-6-2: .* of 3 networks .* no better than chance .*chance 0\.50"
    ) as warned:
        rows = generate(config(bundle, zoo_corpus, tmp_path / "out", num=3, **mine))
    assert {one.filename for one in warned if one.category is ChanceWarning} == {__file__}
    counts = torch.bincount(task.labels_S)
    for row in rows:
        module = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
        module.load_state_dict(load_state_dict(row.path))
        right = (module(task.samples_SF).argmax(1) == task.labels_S).float()
        recall = torch.stack([right[task.labels_S == label].mean() for label in (0, 1)])
        assert row.example_accuracy == pytest.approx(float(recall.mean()))
        assert (row.chance, row.majority) == (0.5, pytest.approx(float(counts.max() / counts.sum())))
        assert row.example_loss is not None
        assert math.isfinite(row.example_loss)
    assert any(row.against_chance in DOUBTFUL for row in rows)
    assert json.loads((tmp_path / "out" / "networks.json").read_text()) == [row.to_json() for row in rows]


class Picture(nn.Module):
    """Takes images alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 4, stride=4), nn.Linear(4 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (1, 8, 8), list(x.shape)
        return self.last(self.first(x).relu().flatten(1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_samples_of_a_file_reach_a_convolution_in_their_own_shape(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    task = zoo_corpus.tasks[next(iter(zoo_corpus.tasks))]
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.view(-1, 1, 8, 8).numpy(), y=task.labels_S.numpy())
    mine = {"instruction": task.instruction, "data": str(tmp_path / "mine.npz")}
    networks = [{"name": f"{__name__}:Picture", "width": 3}]
    (row,) = generate(config(bundle, zoo_corpus, tmp_path / "out", networks=networks, **mine))
    module = Picture(3)
    module.load_state_dict(load_state_dict(row.path))
    right = (module(task.samples_SF.view(-1, 1, 8, 8)).argmax(1) == task.labels_S).float()
    recall = torch.stack([right[task.labels_S == label].mean() for label in (0, 1)])
    assert row.example_accuracy == pytest.approx(float(recall.mean()))
    with pytest.raises(ValueError, match=r"mlp-5-2 does not run on samples of shape \[64\]"):
        generate(config(bundle, zoo_corpus, tmp_path / "none", networks=[[5, 2]], **mine))


def test_a_corpus_of_generated_networks_keeps_all_of_it(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = config(bundle, zoo_corpus, tmp_path / "out", limit=1, network="mlp-64-6-2", into="corpus")
    with pytest.warns(ChanceWarning):
        rows = generate(settings)
    with pytest.warns(ChanceWarning):
        assert generate(settings) == rows
    assert {"example_accuracy", "chance", "majority", "against_chance"} <= set(rows[0].to_json())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_shows_chance_beside_accuracy(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    settings = [f"generator={bundle}", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'out'}", "best_of=2"]
    shown = shown_by("generate", *settings, "limit=1", "network=mlp-64-6-2")
    for column in ("accuracy", "chance", "50.0"):
        assert column in shown


def test_without_data_nothing_is_judged_or_called_best(capsys: pytest.CaptureFixture[str]) -> None:
    trained = writes(solution(1.0))
    trained.generator.data = DataSpec(num_features=1, max_classes=1)
    filled = trained.fill_with_report(network())
    trained.fill(network())
    assert (filled.on_samples, filled.best_of) == (None, 1)
    assert capsys.readouterr().err == ""
