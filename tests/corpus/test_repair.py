from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import Selection, write_corpus
from raywgen.corpus.verify import repair_corpus
from raywgen.weights import StateDict
from tests.corpus.builders import assert_same_bits, network


def states() -> dict[str, StateDict]:
    return {
        f"{kind}/{i}": network(width, 10 * width + i)
        for kind, width in (("a", 2), ("b", 3), ("c", 4))
        for i in range(3)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repair")
    for name, state in states().items():
        path = root / "nets" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)
    (root / "nets/broken.pt").write_bytes(b"no weights")
    (root / "facts.csv").write_text("path,depth\na/*,1\nb/*,2\n")
    build_corpus(
        BuildConfig(out=str(root / "c"), sources=[str(root / "nets")], facts=str(root / "facts.csv"), distributed=False)
    )
    return root / "c"


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


def shard_of(root: Path, checkpoint_id: str) -> Path:
    return root / Corpus.open(root).select(checkpoint_id=checkpoint_id).column("shard")[0].as_py()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(network(3, 31)["0.weight"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-80])


@pytest.mark.parametrize(
    ("damage", "named", "reason"),
    [
        (Path.unlink, {"b/0", "b/1", "b/2"}, "is missing"),
        (cut, {"b/0", "b/1", "b/2"}, "has another checksum than the manifest says"),
        (flip, {"b/1"}, "has another checksum than the manifest says"),
    ],
)
def test_repair_takes_the_damaged_shard_out_and_nothing_else(
    root: Path, damage: Callable[[Path], None], named: set[str], reason: str
) -> None:
    before = Corpus.open(root)
    path = shard_of(root, "b/1")
    damage(path)
    (found,) = verify_corpus(root)
    assert (root / found.file, set(found.checkpoint_ids), found.reason) == (path, named, reason)
    repaired = repair_corpus(root, [found])
    assert verify_corpus(root) == []
    expected = {name: state for name, state in states().items() if not name.startswith("b/")}
    for name, state in expected.items():
        assert_same_bits(dict(sorted(repaired.state_dict(name).items())), dict(sorted(state.items())))
    assert facts_of(repaired) == {name: row for name, row in facts_of(before).items() if name in expected}
    old, *new = repaired.quarantine.to_pylist()
    assert old["checkpoint_id"] == "broken"
    assert new == [
        {"checkpoint_id": f"b/{i}", "file": found.file, "reason": reason, "kind": "refused"} for i in range(3)
    ]
    assert repaired.manifest["recipe"] == before.manifest["recipe"]
    assert repaired.info()["quarantined"] == 4


def facts_of(corpus: Corpus) -> dict[str, str]:
    return {row["checkpoint_id"]: str(row) for row in corpus.facts.to_pylist()}


def test_two_damaged_shards_are_taken_out_at_once(root: Path) -> None:
    paths = [shard_of(root, "a/0"), shard_of(root, "c/0")]
    for path in paths:
        cut(path)
    damages = verify_corpus(root)
    assert {root / damage.file for damage in damages} == set(paths)
    repaired = repair_corpus(root, damages)
    assert sorted(facts_of(repaired)) == ["b/0", "b/1", "b/2"]
    assert verify_corpus(root) == []


def test_the_damaged_file_stays_where_it_is(root: Path) -> None:
    path = shard_of(root, "b/1")
    flip(path)
    content = path.read_bytes()
    repair_corpus(root, verify_corpus(root))
    assert path.read_bytes() == content


def test_a_repaired_corpus_can_be_repaired_again(root: Path) -> None:
    for name in ("a/0", "b/0"):
        path = shard_of(root, name)
        path.unlink()
        repair_corpus(root, verify_corpus(root))
    lost = Corpus.open(root).quarantine.column("checkpoint_id").to_pylist()
    assert lost == ["broken", "a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]


@pytest.mark.parametrize("name", ["checkpoints.parquet", "tasks.parquet", "quarantine.parquet"])
def test_damaged_facts_are_refused(root: Path, name: str) -> None:
    (root / name).write_bytes(b"damaged")
    damages = verify_corpus(root)
    assert [damage.file for damage in damages] == [name]
    before = (root / "manifest.json").read_bytes()
    with pytest.raises(CorpusError, match=rf"{name} has another checksum.*restore it or build"):
        repair_corpus(root, damages)
    assert (root / "manifest.json").read_bytes() == before


def test_a_corpus_of_nothing_but_damage_is_refused(root: Path) -> None:
    for path in (root / "weights").iterdir():
        path.unlink()
    with pytest.raises(CorpusError, match="every shard is damaged; restore it or build"):
        repair_corpus(root, verify_corpus(root))
    assert len(verify_corpus(root)) == 3


def test_moments_after_a_repair_are_those_of_what_is_left(root: Path, tmp_path: Path) -> None:
    unsplit = Corpus.open(root)
    rows = unsplit.facts
    sides = ["heldout" if name == "b/2" else "train" for name in rows.column("checkpoint_id").to_pylist()]
    column = rows.schema.get_field_index("split")
    part = Selection(corpus=unsplit, facts=rows.set_column(column, "split", [sides]))
    before = write_corpus(str(tmp_path / "split"), [part], {})
    target = Path(before.location)
    for path in [shard_of(target, "b/1"), shard_of(target, "c/1")]:
        path.unlink()
    repaired = repair_corpus(target, verify_corpus(target))
    assert sorted(facts_of(repaired)) == ["a/0", "a/1", "a/2", "b/2"]
    a, b, c = (unsplit.select(checkpoint_id=f"{kind}/0").column("layout_id")[0].as_py() for kind in "abc")
    assert repaired.moments(a) == before.moments(a) != {}
    assert repaired.moments(c) == {}
    for name, (mean, std) in repaired.moments(b).items():
        values = states()["b/2"][name].double()
        assert mean == pytest.approx(float(values.mean()), rel=1e-6)
        assert std == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    assert set(repaired.moments(b)) == {"0.weight", "0.bias"}
