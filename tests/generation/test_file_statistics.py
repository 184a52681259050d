"""Statistics of networks in files, estimated anew: right values, all else bit for bit, one line for mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import nn

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.corpus.storage import CorpusStorage
from raywgen.generation import StatisticsConfig, estimate_file_statistics
from raywgen.generation.network_files import INDEX_OF_FILES, NetworkFile, NetworkFiles
from raywgen.nn.batch_norm import StatisticsError, reestimate_statistics
from raywgen.tasks import TaskError, build_network
from raywgen.tasks.images import normalise
from raywgen.tasks.user_data import ConditionError
from raywgen.weights import Layout, WeightsError, load_state_dict, save_state_dict

RECIPE = {"name": "cifar-resnet", "depth": 20, "widths": [4, 8, 8], "in_channels": 1}
MEAN, STD = [0.3], [0.4]


class Shared(nn.Module):
    """A layer of batch normalisation under two names, another that never runs, and flat inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = self.norm
        self.aside = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.first(x))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images of digits, 8x8, as an array."""
    pixels = np.rint(np.asarray(load_digits(return_X_y=True)[0])[:192].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=pixels)
    return path


def network(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = build_network(RECIPE).state_dict()
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def settings(weights: Path, data: Path, **changes: Any) -> StatisticsConfig:
    given = {"network": RECIPE, "num": 128, "batch_size": 32, "mean": MEAN, "std": STD, "device": "cpu"}
    return StatisticsConfig(weights=str(weights), data=str(data), **given | changes)


def expected(state: dict[str, torch.Tensor], digits: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """By hand: the same draw, whole in memory."""
    given = {"num": 128, "batch_size": 32} | changes
    chosen = np.random.default_rng(0).permutation(192)[: given["num"]]
    pixels = torch.from_numpy(np.load(digits)["x"][chosen]).unsqueeze(1)
    module = build_network(RECIPE)
    module.load_state_dict(state)
    return reestimate_statistics(module, normalise(pixels, mean=MEAN, std=STD).split(given["batch_size"]))


def test_the_statistics_are_new_and_everything_else_stays_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    source, state, calls = tmp_path / "net.safetensors", network(), []
    save_state_dict(state, source, {"made": "by hand", "log_prob": "-3"})
    before = source.read_bytes()
    found = estimate_file_statistics(settings(source, digits), None, lambda done, total: calls.append((done, total)))
    assert found.path == str(tmp_path / "net-statistics.safetensors")
    assert source.read_bytes() == before
    assert (found.num_layers, found.num_images, found.image_shape, found.notes) == (19, 128, (1, 8, 8), [])
    assert calls == [(32, 128), (64, 128), (96, 128), (128, 128)]
    written, new = load_state_dict(found.path), expected(state, digits)
    assert list(written) == list(state)
    for name, tensor in written.items():
        assert torch.equal(tensor, new.get(name, state[name])), name
    with safe_open(found.path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "by hand", "log_prob": "-3"}
    # A fresh network says mean 0 and variance 1.
    moved = torch.cat([v.abs() / new[k.replace("mean", "var")].sqrt() for k, v in new.items() if "mean" in k])
    assert found.mean_shift == pytest.approx(float(moved.double().median()), rel=1e-5)


def test_the_networks_own_path_replaces_it_and_other_files_are_refused(digits: Path, tmp_path: Path) -> None:
    source, state = tmp_path / "net.safetensors", network()
    save_state_dict(state, source, {})
    source.chmod(0o640)
    estimate_file_statistics(settings(source, digits, out=f"{tmp_path}/./net.safetensors"))
    assert torch.equal(load_state_dict(source)["bn1.running_mean"], expected(state, digits)["bn1.running_mean"])
    assert source.stat().st_mode & 0o777 == 0o640
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(WeightsError, match=r"other.safetensors exists already; name another place"):
        estimate_file_statistics(settings(source, digits, out=str(tmp_path / "other.safetensors")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors", "other.safetensors"]


@pytest.mark.parametrize("in_place", [False, True])
def test_several_files_keep_their_cut(digits: Path, tmp_path: Path, in_place: bool) -> None:
    state = network()
    layout = Layout.from_state_dict(state)
    files = NetworkFiles(CorpusStorage.at(str(tmp_path)), "unfinished", "a", 9_000)
    file = NetworkFile(name="net", key="0", layout=layout, metadata={"network": "mine"})
    files.write(file, 0, layout.flatten(state))
    index, _ = files.finish(file, {}, {"network": "mine"})
    folder = tmp_path / "net"
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert index == f"net/{INDEX_OF_FILES}"
    assert len(old) > 3
    weights = folder / INDEX_OF_FILES if in_place else folder
    found = estimate_file_statistics(settings(weights, digits, out=str(folder) if in_place else ""))
    assert found.path == str(folder if in_place else tmp_path / "net-statistics")
    new = {path.name: path.read_bytes() for path in Path(found.path).iterdir()}
    assert {name: len(content) for name, content in new.items()} == {
        name: len(content) for name, content in old.items()
    }
    assert new[INDEX_OF_FILES] == old[INDEX_OF_FILES]
    written = {
        k: v
        for name in new
        if name.endswith("safetensors")
        for k, v in load_state_dict(Path(found.path) / name).items()
    }
    for name, tensor in (state | expected(state, digits)).items():
        assert torch.equal(written[name], tensor), name


def test_halves_wrappers_and_torch_files(digits: Path, tmp_path: Path) -> None:
    state = network(torch.bfloat16)
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "net.pt"
    )
    found = estimate_file_statistics(settings(tmp_path / "net.pt", digits))
    written = load_state_dict(found.path)
    assert found.path.endswith("net-statistics.safetensors")
    for name, tensor in (state | expected(state, digits)).items():
        assert torch.equal(written[f"module.{name}"], tensor.to(state[name].dtype)), name


def test_a_layer_under_two_names_one_that_never_runs_and_flat_inputs(digits: Path, tmp_path: Path) -> None:
    module = Shared()
    module.get_buffer("norm.running_var")[:2] = -1.0
    with torch.no_grad():
        module.first.weight[0] = 0.0
    save_state_dict(module.state_dict(), tmp_path / "net.safetensors", {})
    recipe = {"name": "tests.generation.test_file_statistics:Shared"}
    found = estimate_file_statistics(settings(tmp_path / "net.safetensors", digits, network=recipe))
    written = load_state_dict(found.path)
    assert torch.equal(written["norm.running_mean"], written["again.running_mean"])
    assert float(written["norm.running_mean"].abs().max()) > 0
    assert torch.equal(written["aside.running_var"], torch.ones(3))
    assert found.unused_layers == ("aside",)
    assert (found.num_constant, found.num_unusable) == (1, 2)
    assert found.notes == [
        "1 channels were constant on all images, and have a variance of 0",
        "2 channels had statistics that were not finite, or a variance below 0",
        "1 layers did not run and keep their statistics: aside",
    ]


def test_the_name_in_the_metadata_says_the_architecture(digits: Path, tmp_path: Path) -> None:
    module = build_network({"name": "conv4"})
    save_state_dict(module.state_dict(), tmp_path / "net.safetensors", {"network": "conv4"})
    np.save(tmp_path / "large.npy", np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8))
    found = estimate_file_statistics(settings(tmp_path / "net.safetensors", tmp_path / "large.npy", network=""))
    assert (found.network, found.num_layers, found.num_images) == ("conv4", 4, 8)
    with pytest.raises(ConditionError, match=r"does not run on .*; size= and channels= convert"):
        estimate_file_statistics(
            settings(tmp_path / "net.safetensors", digits, network="", out=str(tmp_path / "b.safetensors"))
        )
    save_state_dict(module.state_dict(), tmp_path / "net.safetensors", {})
    with pytest.raises(ConditionError, match=r"network is empty, .* name it, for instance network=resnet101"):
        estimate_file_statistics(
            settings(tmp_path / "net.safetensors", digits, network="", out=str(tmp_path / "b.safetensors"))
        )


def _without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def _with(state: dict[str, torch.Tensor], name: str, value: float, row: int | None = 0) -> dict[str, torch.Tensor]:
    changed = {key: tensor.clone() for key, tensor in state.items()}
    changed[name][slice(None) if row is None else row] = value
    return changed


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s: _without(s, "bn1.weight"), WeightsError, "does not fit network=.*: it lacks 'bn1.weight'; name the"),
        (lambda s: s | {"fc.bias": torch.ones(1)}, WeightsError, "the network has no 'fc.bias'; name the architecture"),
        (lambda s: s | {"linear.bias": torch.ones(3)}, WeightsError, r"shape \[3\], the network's \[10\]"),
        (lambda s: s | {"bn1.weight": torch.ones(4, dtype=torch.int8)}, WeightsError, "a packed form"),
        (
            lambda s: _with(s, "layer2.0.conv1.weight", torch.nan),
            StatisticsError,
            "before layer 'layer2.0.bn1' are NaN",
        ),
        (lambda s: _with(s, "conv1.weight", 0.0, None), StatisticsError, "before layer 'bn1' are constant on these"),
        (
            lambda s: _with({k: v.half() for k, v in s.items()}, "conv1.weight", 1e3),
            WeightsError,
            "beyond the range of",
        ),
    ],
)
def test_a_network_that_does_not_do_is_one_line_and_nothing_is_written(
    change: Any, error: type[Exception], said: str, digits: Path, tmp_path: Path
) -> None:
    save_state_dict(change(network()), tmp_path / "net.safetensors", {})
    with pytest.raises(error, match=said) as refused:
        estimate_file_statistics(settings(tmp_path / "net.safetensors", digits))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_other_mistakes_are_one_line_and_nothing_is_written(digits: Path, tmp_path: Path) -> None:
    source = tmp_path / "net.safetensors"
    save_state_dict(network(), source, {})
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:9_000])
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "colour.npy", np.zeros((4, 3, 8, 8), dtype=np.uint8))
    np.save(tmp_path / "one.npy", np.zeros((1, 1, 8, 8), dtype=np.uint8))
    save_state_dict(nn.Linear(64, 2).state_dict(), tmp_path / "head.safetensors", {})
    before = sorted(path.name for path in tmp_path.iterdir())
    mistakes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"weights": tmp_path / "none.safetensors"}, WeightsError, "does not exist; give .safetensors"),
        ({"weights": tmp_path / "cut.safetensors"}, WeightsError, "truncated"),
        ({"weights": tmp_path / "folder"}, WeightsError, "is a folder with 0 indices"),
        ({"data": tmp_path / "colour.npy"}, ConditionError, "have 3 channels, mean= and std= 1 values"),
        (
            {"data": tmp_path / "colour.npy", "mean": [], "std": []},
            ConditionError,
            r"not run on samples of shape \[3, 8",
        ),
        ({"data": tmp_path / "one.npy"}, ConditionError, "statistics need at least 2"),
        ({"data": tmp_path / "none.npy"}, TaskError, "none.npy"),
        ({"mean": [0.5, 0.5], "std": [0.5, 0.5]}, ConditionError, "have 1 channels, mean= and std= 2 values"),
        ({"network": {"name": "cifar-resnett"}}, TaskError, "did you mean 'cifar-resnet'"),
        ({"out": str(tmp_path / "net.pt")}, WeightsError, "written as .safetensors; give such a name"),
        ({"out": "s3://bucket/net.safetensors"}, ValueError, "is a URI"),
        (
            {"weights": tmp_path / "head.safetensors", "network": {"name": "mlp", "widths": [64, 2]}},
            StatisticsError,
            "no batch",
        ),
    ]
    for changes, error, said in mistakes:
        given = {"weights": source, "data": digits} | changes
        with pytest.raises(error, match=said) as refused:
            estimate_file_statistics(settings(**given))
        assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    for changes, said in (({"num": 1}, "at least 2"), ({"mean": [0.1]}, "give as many"), ({"channels": 2}, "1 or 3")):
        with pytest.raises(ValueError, match=said):
            settings(source, digits, **{"std": [] if "mean" in changes else STD} | changes)
    with pytest.raises(ValueError, match="data is empty"):
        StatisticsConfig(weights=str(source))


def test_a_part_that_is_missing_is_named(digits: Path, tmp_path: Path) -> None:
    (tmp_path / INDEX_OF_FILES).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(WeightsError, match=r"model-1.safetensors is missing, .* names it; fetch it again"):
        estimate_file_statistics(settings(tmp_path, digits))
    (tmp_path / INDEX_OF_FILES).write_text("{}")
    with pytest.raises(WeightsError, match="is no index of a sharded checkpoint"):
        estimate_file_statistics(settings(tmp_path, digits))


def test_a_corpus_says_how_a_network_is_built(zoo_corpus: Corpus, digits: Path, tmp_path: Path) -> None:
    name = next(iter(zoo_corpus.networks.values())).name
    given = {"corpus": zoo_corpus.location, "network": name}
    with pytest.raises(StatisticsError, match=f"network={name} has no batch normalisation with running statistics"):
        estimate_file_statistics(settings(tmp_path / "net.safetensors", digits, **given))
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        estimate_file_statistics(settings(tmp_path / "net.safetensors", digits, **given | {"network": f"{name}x"}))
