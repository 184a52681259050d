"""A small real zoo as a corpus, made once per session without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from hypothesis import settings

from raywgen.corpus import Corpus
from raywgen.trust import trusting
from raywgen.weights.cache import FOLDER
from raywgen.weights.chunks import position_features_on
from raywgen.zoo import ZooConfig, train_zoo

# Nothing is timed, as machines are busy, and the same examples come every time.
settings.register_profile("raywgen", deadline=None, derandomize=True)
settings.load_profile("raywgen")

TINY_ZOO = ZooConfig(
    networks=[[64, 6, 2], [64, 5, 4, 2]],
    num_seen_tasks=12,
    num_validation_tasks=3,
    num_unseen_tasks=4,
    seeds_per_task=2,
    num_steps=120,
    checkpoint_steps=[100, 120],
    num_condition_samples=32,
)


# Of the slow files those that take minutes, longest first.
LONG = (
    "tuning/test_tune.py",
    "training/test_elastic.py",
    "tuning/test_killed.py",
    "benchmarks/test_chaos.py",
    "training/test_ray_source_run.py",
    "benchmarks/test_train_memory.py",
    "training/test_launcher.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lets long files begin first, so that none of several processes is left alone with one at the end."""
    if config.option.markexpr != "slow":
        return
    root = Path(__file__).parent
    names = [item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else "" for item in items]
    places = [LONG.index(name) if name in LONG else len(LONG) for name in names]
    items[:] = [items[index] for index in sorted(range(len(items)), key=places.__getitem__)]


@pytest.fixture(autouse=True, scope="session")
def _own_word() -> Iterator[None]:
    """Modules of these tests stand for the user's own packages, named by the user."""
    with trusting("tests"):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small lose more by a second thread than they win, the more where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64() -> Iterator[None]:
    """All that is made without a dtype is float64, also what is otherwise kept from one call to the next."""
    position_features_on.cache_clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    position_features_on.cache_clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a real S3 server."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
        FOLDER: str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    urlopen(Request(f"{s3_server}/moto-api/reset", method="POST")).close()


@pytest.fixture(scope="session")
def zoo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """19 tasks, two architectures, two data orders; read only."""
    root = str(tmp_path_factory.mktemp("zoo") / "corpus")
    return make_zoo(TINY_ZOO, root)


def make_zoo(config: ZooConfig, root: str | Path) -> Corpus:
    """What `train_zoo` does, in this process."""
    return train_zoo(config, str(root), distributed=False)
