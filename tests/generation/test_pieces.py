"""Large networks, generated and written piece by piece, in one process and over actors, also after a kill."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from raywgen import cli
from raywgen.config import to_yaml
from raywgen.corpus import Corpus
from raywgen.generation import GenerateConfig, StatisticsWarning, UnfinishedError, generate
from raywgen.generation.worker import NoMemoryError
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.storage import Storage
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.weights import WeightsError, load_state_dict
from tests.limits import file_size_limit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::raywgen.generation.UnknownLayoutWarning"),
    pytest.mark.filterwarnings("ignore::raywgen.generation.StatisticsWarning"),
]
CONFIG = IGPGConfig(
    tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16, scales="tensor"),
    prior=PriorConfig(width=16, num_layers=1, num_heads=2, window=16),
)
ODD = {"name": "tests.generation.test_pieces:Odd"}
PARALLEL: dict[str, Any] = {"windows": "parallel", "max_rows": 4}


class Odd(nn.Module):
    """A network with everything that a file may hold: a counter, a tie, a constant, halves, and nothing at all."""

    ids: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 90)
        self.norm = nn.BatchNorm1d(90)
        self.middle = nn.Linear(90, 64, dtype=torch.bfloat16)
        self.outer = nn.Linear(64, 90)
        self.outer.weight = self.inner.weight
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.last = nn.Linear(90, 2)
        self.register_buffer("ids", torch.arange(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.inner(x))
        return self.last(self.outer(nn.functional.linear(hidden, self.middle.weight.float(), self.middle.bias.float())))


@pytest.fixture(scope="module")
def windowed(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A generator of windows, whose networks differ though it is untrained."""
    folder = tmp_path_factory.mktemp("windowed")
    generator = build_generator("igpg", CONFIG, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    codebooks = generator.get_buffer("tokenizer.quantiser.codebooks_LVK")
    codebooks.normal_(generator=torch.Generator().manual_seed(0))
    save_bundle(generator, folder, {})
    return str(folder)


def settings_of(corpus: Corpus, generator: str, out: Path, **changes: Any) -> GenerateConfig:
    given: dict[str, Any] = {
        "networks": [ODD], "limit": 2, "num": 2, "try_on_samples": False, "sampling": PARALLEL,
        "piece_values": 2000, "batch_size": 2,
    }  # fmt: skip
    return GenerateConfig(generator=generator, corpus=corpus.location, out=str(out), **(given | changes))


def assert_same_files(one: Path, other: Path) -> None:
    """The same tensors bit for bit, and the same metadata but for the rounding of log-probabilities."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        with safe_open(one / name, "pt") as file, safe_open(other / name, "pt") as twin:
            assert sorted(file.keys()) == sorted(twin.keys())
            for key in file.keys():  # noqa: SIM118
                tensor, same = file.get_tensor(key), twin.get_tensor(key)
                assert tensor.dtype == same.dtype
                assert tensor.shape == same.shape
                assert tensor.reshape(-1).view(torch.uint8).equal(same.reshape(-1).view(torch.uint8)), key
            mine, others = file.metadata(), twin.metadata()
            assert float(mine.pop("log_prob")) == pytest.approx(float(others.pop("log_prob")), rel=1e-6)
            assert mine == others
    assert names


@pytest.mark.parametrize("windows", ["parallel", "sequential"])
def test_a_network_in_pieces_is_the_whole_one_bit_for_bit(
    zoo_corpus: Corpus, windowed: str, tmp_path: Path, windows: str
) -> None:
    progress: list[tuple[int, int]] = []
    values: list[tuple[int, int]] = []
    settings = settings_of(zoo_corpus, windowed, tmp_path / "pieces", sampling={**PARALLEL, "windows": windows})
    rows = generate(settings, lambda *step: progress.append(step), lambda *step: values.append(step))
    whole = dataclasses.replace(settings, out=str(tmp_path / "whole"), piece_values=1 << 22)
    others = generate(whole)
    assert not progress
    assert values[0][0] == 0
    assert values[-1][0] == values[-1][1] > 4 * 2000
    assert len(values) > 8
    assert_same_files(tmp_path / "pieces", tmp_path / "whole")
    for row, other in zip(rows, others, strict=True):
        assert row.log_prob == pytest.approx(other.log_prob, rel=1e-6)
        assert Path(row.path).name == Path(other.path).name
        state = load_state_dict(row.path)
        Odd().load_state_dict(state, strict=True)
        assert state["ids"].tolist() == list(range(7))
        assert state["inner.weight"].equal(state["outer.weight"])
    assert sorted(path.name for path in (tmp_path / "pieces").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_an_interrupted_network_goes_on_after_its_last_piece(zoo_corpus: Corpus, windowed: str, tmp_path: Path) -> None:
    """Stopped in the second of two networks, then the piece that was written last is damaged."""
    generate(settings_of(zoo_corpus, windowed, tmp_path / "whole", num=1, batch_size=1))
    settings = settings_of(zoo_corpus, windowed, tmp_path / "out", num=1, batch_size=1)
    total: list[int] = []

    def stop(done: int, all_of_them: int) -> None:
        total.append(all_of_them)
        if done > 0.8 * all_of_them:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(settings, None, stop)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1, "nothing unfinished has its final name"
    with pytest.raises(UnfinishedError, match="other settings"):
        generate(dataclasses.replace(settings, piece_values=3000))
    first = next((tmp_path / "out").glob("*.safetensors"))
    time = first.stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        generate(settings, None, lambda *step: seen.append(step) or stop(*step))
    assert seen[0][0] > 0.8 * total[0], "no piece was done again"
    (partial,) = (tmp_path / "out" / "units").glob("*.partial")
    content = bytearray(partial.read_bytes())
    place = next(place for place in range(len(content) - 1, 0, -1) if content[place])
    content[place] ^= 1
    partial.write_bytes(content)
    seen.clear()
    generate(settings, None, lambda *step: seen.append(step))
    assert seen[0][0] < total[0]
    assert first.stat().st_mtime_ns == time
    assert_same_files(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out" / "units").exists()


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["parallel", "sequential"])
def test_a_run_that_was_killed_goes_on(zoo_corpus: Corpus, windowed: str, tmp_path: Path, windows: str) -> None:
    sampling = {**PARALLEL, "windows": windows}
    settings = settings_of(zoo_corpus, windowed, tmp_path / "out", num=1, batch_size=1, sampling=sampling)
    generate(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    program = (
        "import os, signal, sys\n"
        "from raywgen.config import load_config\n"
        "from raywgen.generation import GenerateConfig, generate\n"
        "from raywgen.trust import trusting\n"
        "def stop(done, total):\n"
        "    if done > total / 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with trusting('tests'):\n"
        "    generate(load_config(GenerateConfig, sys.argv[1]), None, stop)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "config.yaml")], check=False)
    assert killed.returncode == -signal.SIGKILL
    seen: list[tuple[int, int]] = []
    generate(settings, None, lambda *step: seen.append(step))
    assert seen[0][0] > seen[0][1] / 3
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_files_of_bounded_size_have_an_index_like_the_hubs(zoo_corpus: Corpus, windowed: str, tmp_path: Path) -> None:
    settings = settings_of(zoo_corpus, windowed, tmp_path / "one", num=1, limit=1)
    (row,) = generate(settings)
    whole = load_state_dict(row.path)
    for piece_values in (2000, 1 << 22):
        out = tmp_path / f"several-{piece_values}"
        several = dataclasses.replace(settings, out=str(out), max_file_bytes=20_000, piece_values=piece_values)
        (row,) = generate(several)
        index = json.loads(Path(row.path).read_text())
        folder = Path(row.path).parent
        names = sorted(set(index["weight_map"].values()))
        assert names == [f"model-{place:05d}-of-{len(names):05d}.safetensors" for place in range(1, len(names) + 1)]
        assert len(names) > 2
        state = {}
        for name in names:
            with safe_open(folder / name, "pt") as file:
                assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= 24_000  # noqa: SIM118
                state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        assert state.keys() == whole.keys()
        assert all(tensor.equal(whole[key]) for key, tensor in state.items())


def test_the_command_counts_values_and_says_why_nothing_was_judged(
    zoo_corpus: Corpus, windowed: str, tmp_path: Path
) -> None:
    network = zoo_corpus.networks[next(iter(zoo_corpus.networks))].name
    settings = {
        "generator": windowed, "corpus": zoo_corpus.location, "out": tmp_path / "out", "network": network, "limit": 1,
        "try_on_samples": "false", "piece_values": 200, "max_file_bytes": 400, "sampling.windows": "parallel",
        "sampling.max_rows": 1,
    }  # fmt: skip
    result = CliRunner().invoke(cli.app, ["generate", *(f"{key}={value}" for key, value in settings.items())])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "Nothing was judged, as try_on_samples=false says" in shown
    assert "log-probability" in shown
    assert "index.json" not in shown
    assert "values/s" in result.stderr
    (index,) = (tmp_path / "out").rglob("model.safetensors.index.json")
    assert index.parent.name.startswith(network)


def test_the_warning_of_generated_statistics_holds_the_command_that_estimates_them(
    zoo_corpus: Corpus, windowed: str, tmp_path: Path
) -> None:
    settings = settings_of(zoo_corpus, windowed, tmp_path / "out", limit=1, num=1)
    with pytest.warns(StatisticsWarning, match="Odd: the statistics of its 1 layers") as warned:
        (row,) = generate(settings)
    said, file = next((str(one.message), one.filename) for one in warned if one.category is StatisticsWarning)
    assert file == __file__
    _, *command = shlex.split(said.partition("`")[2].partition("`")[0])
    assert row.path in command
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    command[command.index("data=IMAGES")] = f"data={tmp_path / 'images.npy'}"
    result = CliRunner().invoke(cli.app, [*command, f"out={row.path}", "mean=[0.5]", "std=[0.3]"])
    assert result.exit_code == 0, (result.output, result.exception)
    state, module = load_state_dict(row.path), Odd()
    module.load_state_dict(state)
    x = torch.from_numpy((pixels.reshape(40, 64) / 255 - 0.5) / 0.3).float()
    with torch.no_grad():
        hidden = module.inner(x)
    torch.testing.assert_close(state["norm.running_mean"], hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["norm.running_var"], hidden.var(dim=0), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"num_unlabelled=8: try_on_samples=false .* by `raywgen statistics FILE"):
        settings_of(zoo_corpus, windowed, tmp_path / "out", num_unlabelled=8)


def test_a_disk_that_fills_is_one_line_and_nothing_is_lost(zoo_corpus: Corpus, windowed: str, tmp_path: Path) -> None:
    """The bound on file sizes stands in for a full disk; it is reached when the second network begins, or in it."""
    settings = settings_of(zoo_corpus, windowed, tmp_path / "out", num=1, batch_size=1)
    generate(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    with (
        file_size_limit(20_000),
        pytest.raises(WeightsError, match=r"cannot write .*File too large; free some disk space.*goes on"),
    ):
        generate(settings)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    generate(settings)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_an_unfinished_file_that_is_removed_is_no_network(zoo_corpus: Corpus, windowed: str, tmp_path: Path) -> None:
    settings = settings_of(zoo_corpus, windowed, tmp_path / "out", num=1, limit=1)

    def remove(done: int, total: int) -> None:
        if 0.4 * total < done < 0.6 * total:
            for path in (tmp_path / "out" / "units").glob("*.partial"):
                path.unlink()

    with pytest.raises(WeightsError, match="changed or removed while it was written; run the same"):
        generate(settings, None, remove)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    generate(settings)
    generate(dataclasses.replace(settings, out=str(tmp_path / "whole")))
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_memory_for_not_even_one_window_is_one_line(
    zoo_corpus: Corpus, windowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywgen.generation.worker.free_memory", lambda device: 1000)
    settings = settings_of(zoo_corpus, windowed, tmp_path / "out")
    generate(settings)  # Smaller networks are not held up by an estimate.
    monkeypatch.setattr("raywgen.generation.worker._LARGE", 1000)
    settings = dataclasses.replace(settings, out=str(tmp_path / "other"))
    with pytest.raises(NoMemoryError, match=r"Odd.*: a single window of 2 networks at once take about .* batch_size"):
        generate(settings)
    tried = dataclasses.replace(settings, try_on_samples=True)
    with pytest.raises(NoMemoryError, match=r"Odd.*: all values of 8 networks.*in pieces by try_on_samples=false"):
        generate(tried)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


@pytest.mark.slow
def test_pieces_make_a_file_in_an_object_store(
    zoo_corpus: Corpus, windowed: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is made on this machine, also by a run that goes on, and copied when it is complete."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = settings_of(zoo_corpus, windowed, tmp_path / "whole", num=1, batch_size=1)
    generate(settings)
    there = dataclasses.replace(settings, out=f"{bucket}/networks")

    def stop(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(there, None, stop)
    assert list(tmp_path.glob("raywgen-*/*.partial"))
    seen: list[tuple[int, int]] = []
    generate(there, None, lambda *step: seen.append(step))
    assert seen[0][0] > 0.8 * seen[0][1]
    assert not list(tmp_path.glob("raywgen-*"))
    Storage.at(there.out).download("", tmp_path / "copy")
    assert_same_files(tmp_path / "copy", tmp_path / "whole")
