from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from raywgen import cli
from raywgen.corpus import Corpus, CorpusError, UnknownFactError
from raywgen.tasks import build_network
from raywgen.weights import StateDict
from tests.corpus.builders import assert_same_bits, network

COMMANDS = ["build", "describe", "info", "verify", "export", "filter", "merge", "split", "dedupe", "align"]

MLP = {"name": "mlp", "widths": [3, 9, 2]}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["corpus", *map(str, arguments)], catch_exceptions=True)


def done(*arguments: str | Path) -> str:
    """What a command prints to standard output; it must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def states() -> dict[str, StateDict]:
    """Two layouts, two runs each, and a double."""
    nets = {f"run{run}/step{step}": network(2 + run % 2, 10 * run + step) for run in range(4) for step in range(2)}
    return nets | {"run9/double": network(2, 0)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, state in states().items():
        path = root / "nets" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)
    rows = [f"run{run}/*,run-{run},{run},net{run % 2}" for run in range(4)]
    (root / "facts.csv").write_text("\n".join(["path,trajectory_id,depth,architecture", *rows]))
    return root


@pytest.fixture
def corpus(files: Path, tmp_path: Path) -> Path:
    done("build", tmp_path / "corpus", "--from", files / "nets", "--facts", files / "facts.csv", "--here")
    return tmp_path / "corpus"


def ids(root: Path) -> list[str]:
    return sorted(Corpus.open(root).facts.column("checkpoint_id").to_pylist())


def assert_holds(root: Path, expected: dict[str, StateDict]) -> None:
    corpus = Corpus.open(root)
    assert ids(root) == sorted(expected)
    for name, state in expected.items():
        assert_same_bits(dict(sorted(corpus.state_dict(name).items())), dict(sorted(state.items())))


def break_shard(root: Path, checkpoint_id: str) -> str:
    path = Corpus.open(root).select(checkpoint_id=checkpoint_id).column("shard")[0].as_py()
    (root / path).write_bytes((root / path).read_bytes()[:-80])
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert f"corpus {command}" in done(command, "--help")


def test_help_lists_the_commands() -> None:
    text = done("--help")
    assert [command for command in COMMANDS if command not in text] == []


def test_build_ingests_all_sources_and_tells_what_it_set_aside(files: Path, tmp_path: Path) -> None:
    bad = tmp_path / "b[ad]" / "[bold]broken.pt"
    bad.parent.mkdir()
    bad.write_bytes(b"no weights")
    text = done("build", tmp_path / "c", "--from", f"{files}/nets/run[01]/*", "--from", bad, "--here")
    assert "checkpoints │ 4" in text
    assert f"set aside {bad}:" in text
    assert_holds(tmp_path / "c", {name: state for name, state in states().items() if name[:4] in ("run0", "run1")})


def test_build_again_changes_nothing_and_other_sources_are_refused(corpus: Path, files: Path) -> None:
    before = (corpus / "manifest.json").read_bytes()
    again = ["build", corpus, "--facts", files / "facts.csv", "--here"]
    done(*again, "--from", files / "nets")
    assert (corpus / "manifest.json").read_bytes() == before
    other = call(*again, "--from", files / "nets/run1")
    assert isinstance(other.exception, CorpusError)
    assert "already holds a corpus of other sources" in str(other.exception)
    assert (corpus / "manifest.json").read_bytes() == before


def test_strict_build_ends_at_what_cannot_be_read(files: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    sources = ["--from", files / "nets", "--from", tmp_path / "broken.pt"]
    result = call("build", tmp_path / "c", *sources, "--strict", "--here")
    assert isinstance(result.exception, CorpusError)
    assert "1 checkpoints were refused, first" in str(result.exception)
    assert "broken.pt" in str(result.exception)
    assert not (tmp_path / "c/manifest.json").exists()


def test_info_counts_for_people_and_for_scripts(corpus: Path) -> None:
    text = done("info", corpus)
    assert "checkpoints │ 9" in text
    found = json.loads(call("info", corpus, "--json").stdout)
    assert found == Corpus.open(corpus).info()
    assert (found["checkpoints"], found["trajectories"], found["quarantined"]) == (9, 5, 0)
    assert found["values"] == sum(state["0.weight"].numel() + state["0.bias"].numel() for state in states().values())
    assert found["dtypes"] == {"float32": 9}


def test_verify_of_a_whole_corpus_says_so(corpus: Path) -> None:
    assert "all whole" in done("verify", corpus)


def test_verify_names_damage_and_exits_with_1(corpus: Path) -> None:
    path = break_shard(corpus, "run1/step0")
    result = call("verify", corpus)
    assert result.exit_code == 1
    assert path in result.stdout
    held = [line.removeprefix("  holds ") for line in result.stdout.splitlines() if line.startswith("  holds ")]
    assert sorted(held) == ["run1/step0", "run1/step1", "run3/step0", "run3/step1"]
    assert call("verify", corpus).exit_code == 1, "without --repair nothing is mended"


def test_verify_prints_names_as_they_are(tmp_path: Path) -> None:
    name = "deep/" * 30 + "net[red]x[/nothing]"
    path = tmp_path / "nets" / f"{name}.safetensors"
    path.parent.mkdir(parents=True)
    save_file(network(2, 0), path)
    done("build", tmp_path / "c", "--from", tmp_path / "nets", "--here")
    break_shard(tmp_path / "c", name)
    result = call("verify", tmp_path / "c")
    assert result.exit_code == 1
    assert f"  holds {name}" in result.stdout.splitlines()


def test_repair_takes_damage_out_and_verify_is_clean(corpus: Path) -> None:
    break_shard(corpus, "run1/step0")
    assert "repaired: 5 checkpoints are left, 4 in quarantine" in done("verify", corpus, "--repair")
    assert "all whole" in done("verify", corpus)
    assert_holds(corpus, {name: state for name, state in states().items() if name[3] in "029"})


def test_export_writes_what_the_query_selects(corpus: Path, tmp_path: Path) -> None:
    assert "2 files in" in done("export", corpus, tmp_path / "out", "depth>=2", "architecture=net0")
    written = {
        str(path.relative_to(tmp_path / "out")): load_file(path) for path in (tmp_path / "out").rglob("*.safetensors")
    }
    assert sorted(written) == ["run2/step0.safetensors", "run2/step1.safetensors"]
    for name, state in written.items():
        expected = states()[name.removesuffix(".safetensors")]
        assert_same_bits(dict(sorted(state.items())), dict(sorted(expected.items())))


def test_filter_copies_what_the_query_selects(corpus: Path, tmp_path: Path) -> None:
    assert "checkpoints │ 4" in done("filter", corpus, tmp_path / "c", "depth=1,2")
    assert_holds(tmp_path / "c", {name: state for name, state in states().items() if name[3] in "12"})


def test_merge_joins_corpora(corpus: Path, tmp_path: Path) -> None:
    done("filter", corpus, tmp_path / "one", "depth=1")
    done("filter", corpus, tmp_path / "two", "depth=1,2")
    assert "checkpoints │ 6" in done("merge", tmp_path / "c", tmp_path / "one", tmp_path / "two")
    one = {name: state for name, state in states().items() if name[3] == "1"}
    two = {f"1/{name}": state for name, state in states().items() if name[3] in "12"}
    assert_holds(tmp_path / "c", one | two)


def test_split_holds_out_whole_groups(corpus: Path, tmp_path: Path) -> None:
    text = done("split", corpus, tmp_path / "c", "--by", "trajectory_id", "--heldout", "0.4", "--seed", "2")
    assert "heldout: " in text
    assert_holds(tmp_path / "c", states())
    derived = Corpus.open(tmp_path / "c")
    held, trained = (set(derived.select(split=s).column("trajectory_id").to_pylist()) for s in ("heldout", "train"))
    assert (len(held), len(trained), held & trained) == (2, 3, set())


def test_dedupe_tells_how_many_were_doubles(corpus: Path, tmp_path: Path) -> None:
    assert "1 of 9 checkpoints were doubles" in done("dedupe", corpus, tmp_path / "c")
    assert_holds(tmp_path / "c", {name: state for name, state in states().items() if name != "run9/double"})
    assert "doubles" in done("dedupe", corpus, tmp_path / "near", "--near", "100")
    assert len(ids(tmp_path / "near")) == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["info", "{tmp}/none"], CorpusError, "holds no manifest.json"),
        (["verify", "{tmp}/none"], CorpusError, "holds no manifest.json"),
        (["build", "{tmp}/c", "--here", "--from", "{tmp}/none"], CorpusError, "none does not exist"),
        (["export", "{corpus}", "{tmp}/out", "depth=99"], CorpusError, "holds no checkpoint with depth=99"),
        (["filter", "{corpus}", "{tmp}/c", "depht=1"], UnknownFactError, "did you mean 'depth'?"),
        (["filter", "{corpus}", "{tmp}/c", "depth"], CorpusError, "'depth' is no query"),
        (["filter", "{corpus}", "{corpus}"], CorpusError, "already holds a corpus"),
        (["split", "{corpus}", "{tmp}/c", "--heldout", "2"], CorpusError, "leaves one side empty"),
        (["split", "{corpus}", "{tmp}/c", "--by", "run"], UnknownFactError, "unknown fact 'run'"),
        (["merge", "{tmp}/c", "{corpus}", "{tmp}/none"], CorpusError, "holds no manifest.json"),
    ],
)
def test_a_users_mistake_is_one_line(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    kind: type[Exception],
    message: str,
) -> None:
    given = [argument.format(tmp=tmp_path, corpus=corpus) for argument in arguments]
    result = call(*given)
    assert isinstance(result.exception, kind)
    assert message in str(result.exception)
    monkeypatch.setattr(sys, "argv", ["raywgen", "corpus", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_align_brings_networks_closer_and_says_how_much(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        (tmp_path / "nets").mkdir(exist_ok=True)
        save_file(build_network(MLP).state_dict(), tmp_path / "nets" / f"net{seed}.safetensors")
    done("build", tmp_path / "c", "--from", tmp_path / "nets", "--here")
    options = ["--network", "{name: mlp, widths: [3, 9, 2]}", "--input-shape", "3", "--reference", "net1"]
    text = done("align", tmp_path / "c", tmp_path / "a", *options)
    found = re.search(r"aligned to net1: 2 trajectories, mean distance (\S+) -> (\S+) of its norm", text)
    assert found is not None, text
    assert float(found[2]) < float(found[1])
    assert ids(tmp_path / "a") == ["net0", "net1", "net2"]
    assert_same_bits(Corpus.open(tmp_path / "a").state_dict("net1"), Corpus.open(tmp_path / "c").state_dict("net1"))


def test_align_refuses_what_it_cannot_build(corpus: Path, tmp_path: Path) -> None:
    result = call("align", corpus, tmp_path / "a", "--network", "mpl", "--input-shape", "3")
    assert "several architectures" in str(result.exception)
    done("filter", corpus, tmp_path / "one", "architecture=net0")
    result = call("align", tmp_path / "one", tmp_path / "a", "--network", "mpl", "--input-shape", "3")
    assert "unknown network 'mpl'; did you mean 'mlp'?" in str(result.exception)
    result = call("align", tmp_path / "one", tmp_path / "a", "--network", "mlp", "--input-shape", "3,x")
    assert "input_shape" in str(result.exception)
    assert not (tmp_path / "a").exists()
