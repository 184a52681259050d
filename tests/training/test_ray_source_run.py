"""A run on real workers whose corpus lies on an S3 server: nothing of it is copied, and every loss is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from pyarrow import fs

from raywgen.corpus import Corpus
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.run_folder import is_done
from raywgen.training.session import ray_session
from raywgen.training.workers_log import Start, read_workers
from tests.builders import igpg_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def remote(bucket: str, zoo_corpus: Corpus) -> Iterator[str]:
    """A copy of the corpus in a bucket, on a cluster that was started after the server."""
    there = Storage.at(f"{bucket}/zoo")
    fs.copy_files(zoo_corpus.location, there.root, destination_filesystem=there.filesystem)
    with ray_session():
        yield f"{bucket}/zoo"


def config(corpus: str, out: Path, **settings: object) -> TrainConfig:
    generator = igpg_config()
    generator.tokenizer.window, generator.prior.window, generator.prior.tokens = 3, 4, "auto"
    generator.tokenizer.num_steps = generator.prior.num_steps = 6
    fixed = {"num_workers": 2, "validate_every": 3, "log_every": 1, "checkpoint_every": 2, "zero_stage": 1}
    return TrainConfig(corpus=corpus, out=str(out), generator=generator, **(fixed | settings))  # pyright: ignore[reportArgumentType]


def losses(out: Path) -> list[tuple[str, int, float]]:
    return [(row["stage"], row["step"], row["loss"]) for row in read_metrics(str(out))]


def test_both_sources_train_alike_and_nothing_is_copied(
    remote: str, zoo_corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Workers take every CPU, so readers that waited for one beside them would wait for ever."""
    there, here = tmp_path / "there", tmp_path / "here"
    most = int(ray.cluster_resources()["CPU"])
    launch([config(remote, there, num_workers=[1, most])], stop_at=0.5)
    launch([config(remote, there, num_workers=[1, most])])
    assert {event.workers for event in read_workers(there) if isinstance(event, Start)} == {most}
    assert is_done(there)
    assert not (tmp_path / "cache").exists(), "a shard was copied"
    assert f"reads {remote} through Ray Data (source=ray)" in capfd.readouterr().err
    launch([config(zoo_corpus.location, here, num_workers=most)])
    assert losses(there) == losses(here)
