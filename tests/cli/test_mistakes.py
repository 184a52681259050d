"""Ordinary mistakes on the command line: one line that names the remedy, before Ray is started."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import raywgen
from raywgen.benchmarks.demo import DemoConfig, run_demo
from raywgen.cli import app, main
from raywgen.cli.job import _follow
from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.progress import Reporter
from raywgen.ray_address import ClusterError
from raywgen.stops import Stopped
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.session import ray_session
from tests.builders import igpg_config


def refusal(*arguments: str) -> str:
    """What a command says that is refused, without Ray."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError | KeyError | OSError | RuntimeError), done.exception
    assert not ray.is_initialized(), "it was noticed only after Ray had started"
    return str(done.exception.args[0] if done.exception.args else done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train mcdy", "did you mean 'mcdi'?"),
        ("train MCDI", "did you mean 'mcdi'?"),
        ("train method=igpq", "did you mean 'igpg'?"),
        ("train configs/igpg/digit.yaml", "did you mean configs/igpg/digits.yaml?"),
        ("train configs/igpg", "is a folder; give a YAML file"),
        ("train precision=fp61", "did you mean 'fp32'?"),
        ("train out=", "out is empty; name a folder, such as out=runs/igpg"),
        ("train corpus=", "corpus is empty"),
        ("train corpus=/no/where", "/no/where holds no manifest.json"),
        ("train seed=1 seed=2", "seed is given twice, as '1' and as '2'"),
        ("train device=cuda num_workers=0", "device=cuda: torch"),
        ("train num_workers=48", "num_workers=48 is more than the networks of a batch, generator.prior.batch_size=32"),
        ("train accumulate=9 num_workers=4", "accumulate=9 is more than the 8 networks that a worker takes"),
        ("zoo train digit", "did you mean 'digits'?"),
        ("zoo train digits out=", "out is empty"),
        ("tune igpq", "did you mean 'igpg'?"),
        ("tune igpg search=optun", "did you mean 'optuna'?"),
        ("tune igpg scheduler=ahsa", "did you mean 'asha'?"),
        ("tune igpg out=", "out is empty"),
        ("generate where=rya", "did you mean 'ray'?"),
        ("generate out=", "out is empty"),
        ("evaluate out=", "out is empty"),
        ("finetune start=nearst", "did you mean 'nearest'?"),
    ],
)
def test_a_mistake_names_its_remedy(arguments: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert said in refusal(*arguments.split())


def test_a_misspelt_setting_is_named_before_a_missing_corpus() -> None:
    for command in ("train igpg corpus=none sed=1", "evaluate corpus=none sed=1", "finetune corpus=none sed=1"):
        done = CliRunner().invoke(app, command.split())
        assert "unknown key 'sed'" in str(done.exception), command
    done = CliRunner().invoke(app, ["train", "igpg", "corpus=none", "generator.prior.width=64"])
    assert "holds no manifest.json" in str(done.exception)


def test_a_reference_to_a_setting_or_a_variable_is_followed_and_taken_for_no_path(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Path(zoo_corpus.location)
    monkeypatch.setenv("ZOO", str(corpus.parent))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path.cwd())  # Nothing is written here.
    (tmp_path / "tune.yaml").write_text(f"generator: {corpus.parent}\ncorpus: ${{generator}}/{corpus.name}\n")
    common = ("start=random", "tasks=unsen")
    for given in (str(tmp_path / "tune.yaml"), f"corpus=${{oc.env:ZOO}}/{corpus.name}"):
        assert "did you mean 'unseen'?" in refusal("finetune", given, *common, "out=${oc.env:OUT}")
        # The corpus is looked at only where `out` could be.
        assert "did you mean 'unseen'?" in refusal("finetune", given, *common, f"out={tmp_path / 'out'}")


def test_a_missing_gpu_is_noticed_before_ray_starts(zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    message = refusal("train", f"corpus={zoo_corpus.location}", "device=cuda", "num_workers=2")
    assert "asks for 2 GPUs, and this machine has none: give device=cpu" in message


def test_more_workers_than_this_machine_has_room_for_are_noticed_before_ray_starts(
    zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    message = refusal("train", f"corpus={zoo_corpus.location}", "num_workers=7")
    assert "num_workers=7 asks for 7 x 1 CPU and one more CPU to read the corpus" in message
    assert "the cluster has 5 CPU on 1 node: give num_workers=4, or add nodes" in message


def test_a_run_goes_into_no_corpus_and_no_file(zoo_corpus: Corpus, tmp_path: Path) -> None:
    where = f"corpus={zoo_corpus.location}"
    assert "holds a corpus; name another folder" in refusal("train", where, f"out={zoo_corpus.location}")
    (tmp_path / "file").touch()
    assert "is a file; name a folder" in refusal("train", where, f"out={tmp_path / 'file'}")


def test_misspelt_tasks_and_networks_of_a_corpus_name_the_nearest(zoo_corpus: Corpus) -> None:
    where, task = f"corpus={zoo_corpus.location}", next(iter(zoo_corpus.tasks))
    assert "did you mean 'unseen'? Give " in refusal("finetune", where, "start=random", "tasks=unsen")
    assert "did you mean 'mlp-64-6-2'?" in refusal("finetune", where, "start=random", "network=mlp-64-62")
    score = refusal("score", "nothing.safetensors", "--corpus", zoo_corpus.location, "--task", f"{task}x")
    assert f"did you mean '{task}'?" in score


def test_an_empty_generator_is_called_empty(zoo_corpus: Corpus, tmp_path: Path) -> None:
    message = refusal("generate", f"corpus={zoo_corpus.location}", "generator=", f"out={tmp_path / 'out'}")
    assert "the generator is empty; give the run folder" in message


def test_yaml_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nseed: 2\n")
    message = refusal("train", str(tmp_path / "run.yaml"))
    assert "found duplicate key seed" in message
    assert "\n" not in message


def test_rays_own_failure_to_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", os.devnull)  # No folder: Ray cannot write its session there.
    with pytest.raises(ClusterError, match="Ray could not be started on this machine") as refused, ray_session():
        pass
    assert "\n" not in str(refused.value)
    assert not ray.is_initialized()


def test_an_assertion_of_ours_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("raywgen.cli.app", fail)
    with pytest.raises(AssertionError, match="ours"):
        main()


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 8 TiB"), RuntimeError("[enforce fail] . can't allocate memory: 8 bytes")]
)
def test_memory_that_is_used_up_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("raywgen.cli.app", fail)
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: this machine has no memory left ({error}); end other programs")
    assert said.count("\n") == 1


def test_what_generate_names_is_looked_up_before_ray_starts(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raywgen.train(
        "hypernetwork",
        corpus=zoo_corpus.location,
        out=tmp_path / "run",
        num_workers=0,
        generator={"width": 8, "task_loss": {"num_steps": 1}},
        quiet=True,
    )
    common = [f"generator={tmp_path / 'run'}", f"corpus={zoo_corpus.location}", "where=ray", f"out={tmp_path / 'out'}"]
    for given, said in (
        ("tasks=unsen", "did you mean 'unseen'?"),
        ("network=mlp-64-62", "did you mean 'mlp-64-6-2'?"),
        ("device=cuda", "device=cuda: torch"),
        ("sampling.topk=3", "has no sampling settings"),
    ):
        assert said in refusal("generate", *common, given)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert "MiB, and its disk has 1.0 MiB left" in refusal("generate", *common, "tasks=unseen", "num=400")


def test_sources_and_networks_are_looked_for_before_ray_starts(tmp_path: Path) -> None:
    assert "nothing" in refusal("corpus", "build", str(tmp_path / "corpus"), "--from", str(tmp_path / "nothing"))
    assert "did you mean" in refusal("zoo", "train", "digits", "networks=[cifar-resnett]", f"out={tmp_path / 'zoo'}")


def test_a_disk_without_room_is_noticed_before_ray_or_training_starts(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def have(mib: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=mib << 20))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    have(1)
    out, corpus = f"out={tmp_path / 'out'}", zoo_corpus.location
    said = "and its disk has 1.0 MiB left; free some disk space, or name a folder on another disk"
    assert said in refusal("zoo", "train", "digits", "execution=stacked", "networks=[[64,99,2]]", out)
    for num_workers in (0, 2):
        assert said in refusal("train", "hypernetwork", f"corpus={corpus}", f"num_workers={num_workers}", out)

    # Each of 3 networks is of 2 MiB, beside which lie states of optimisers that a corpus does not hold.
    (tmp_path / "files").mkdir()
    weights = {f"{index}.weight": torch.zeros(512, 512) for index in range(2)}
    for index in range(3):
        torch.save({"state_dict": weights, "optimizer": {"state": weights}}, tmp_path / f"files/{index}.pt")
    save_file(weights, tmp_path / "files/3.safetensors")
    (tmp_path / "files/4.pt").write_bytes(bytes(1 << 20))
    have(7)
    said = "is to hold at least 8.0 MiB if no checkpoint is refused, and its disk has 7.0 MiB left"
    assert said in refusal("corpus", "build", str(tmp_path / "corpus"), "--from", str(tmp_path / "files"))
    have(9)
    assert build_corpus(BuildConfig(sources=[str(tmp_path / "files")], out=str(tmp_path / "corpus"), distributed=False))


def test_a_disk_without_room_for_tokens_is_noticed_before_ray_starts(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = igpg_config()
    quantiser = QuantiserConfig(num_levels=256, num_codes=8)
    config.tokenizer = replace(config.tokenizer, quantiser=quantiser)
    generator = build_generator("igpg", config, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    save_bundle(generator, tmp_path / "igpg", {})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    given = [f"tokenizer={tmp_path / 'igpg'}", f"out={tmp_path / 'tokens'}"]
    said = refusal("corpus", "encode", zoo_corpus.location, *given)
    num_chunks = sum(
        len(zoo_corpus.select(layout_id=key)) * -(-network.layout.num_values // 8)
        for key, network in zoo_corpus.networks.items()
    )
    assert f"at least {num_chunks * 256 / 2**20:,.1f} MiB, and its disk has 1.0 MiB left" in said


def test_a_disk_without_room_for_a_search_is_noticed_before_ray_starts(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 << 20))
    common = ["tune", "train=hypernetwork", "num_trials=400", f"out={tmp_path / 'out'}", "fixed.train.num_workers=0"]
    rate = "space.train.generator.task_loss.optimizer.learning_rate={loguniform: [1.0e-4, 1.0e-2]}"
    said = refusal(*common, f"corpus={zoo_corpus.location}", rate)
    assert "MiB for 400 trials, and its disk has 2.0 MiB left" in said
    assert "MiB, and its disk has 2.0 MiB left" in refusal(*common, "zoo=digits", rate)


def test_a_tokeniser_is_looked_for_before_ray_starts(zoo_corpus: Corpus, tmp_path: Path) -> None:
    arguments = [zoo_corpus.location, f"tokenizer={tmp_path}", f"out={tmp_path / 'tokens'}"]
    assert "holds no trained tokeniser" in refusal("corpus", "encode", *arguments)


def test_an_export_of_no_run_and_a_negative_distance_are_refused(zoo_corpus: Corpus, tmp_path: Path) -> None:
    assert "holds no run (config.yaml is missing)" in refusal("export", str(tmp_path))
    assert "near=-1.0: must be at least 0" in refusal(
        "corpus", "dedupe", zoo_corpus.location, str(tmp_path / "out"), "--near", "-1"
    )


def test_a_folder_below_a_file_is_refused(zoo_corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal("train", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'file' / 'run'}")
    assert "file, which is a file; name a folder" in message


def test_a_folder_that_may_not_be_written_is_refused(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # Nothing is refused to root.
    message = refusal("train", f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}")
    assert f"{tmp_path} does not allow it; name another folder" in message


def test_ctrl_c_says_what_goes_on_and_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr("raywgen.cluster.submit.follow", stop)
    with pytest.raises(Stopped) as stopped:
        _follow(None, "job-1")
    assert "stopped by Ctrl-C: job-1 goes on; `raywgen job logs job-1 --follow` shows it" in str(stopped.value)
    monkeypatch.setattr("raywgen.benchmarks.demo._run", stop)
    with pytest.raises(Stopped) as stopped:
        run_demo(DemoConfig(out=str(tmp_path / "demo")), Reporter())
    assert "demo keeps all steps that are done; the same command goes on with the others" in str(stopped.value)
