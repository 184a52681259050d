"""A run on real workers whose corpus lies on an S3 server: nothing of it is copied, and every loss is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from pyarrow import fs

from raywgen.corpus import Corpus
from raywgen.generators.igpg import IGPGConfig
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.run_folder import is_done
from raywgen.training.session import ray_session
from raywgen.training.workers_log import Start, read_workers
from tests.builders import igpg_config, settings_of

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
    there, here = tmp_path / "there", tmp_path / "here"
    launch([config(remote, there)], stop_at=0.5)
    launch([config(remote, there)])
    assert not (tmp_path / "cache").exists(), "a shard was copied"
    assert f"reads {remote} through Ray Data (source=ray)" in capfd.readouterr().err
    launch([config(zoo_corpus.location, here)])
    assert losses(there) == losses(here)


def test_workers_of_a_range_take_every_cpu_and_their_readers_start(remote: str, tmp_path: Path) -> None:
    """Readers that waited for a CPU beside the workers would wait for ever."""
    most = int(ray.cluster_resources()["CPU"])
    run = config(remote, tmp_path / "run", num_workers=[1, most])
    stages = settings_of(run, IGPGConfig)
    stages.tokenizer.num_steps, stages.prior.num_steps, stages.task_loss.num_steps = 3, 0, 0
    launch([run])
    assert [event.workers for event in read_workers(tmp_path / "run") if isinstance(event, Start)] == [most]
    assert is_done(tmp_path / "run")
