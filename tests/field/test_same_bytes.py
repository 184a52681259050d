"""The same networks are the same bytes, whichever process writes them and whatever its hash seed and zone.

Sources have the same paths and times in both: a corpus knows its sources by them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WRITE = """
import os
import torch
from safetensors.torch import save_file
from pathlib import Path
from raywgen.corpus import BuildConfig, Corpus, build_corpus
from raywgen.corpus.derive import dedupe, split
from raywgen.corpus.export import export
from raywgen.generators.bundle import load_bundle, save_bundle
from tests.builders import igpg
from tests.field.test_damage import make_encoder

torch.set_num_threads(1)
Path("nets/run").mkdir(parents=True)
for step in range(6):
    generator = torch.Generator().manual_seed(step)
    widths = {"b": 2, "a": 4, "c": 1 + step // 3}
    state = {name: torch.randn(3, width, generator=generator) for name, width in widths.items()}
    save_file(state, f"nets/run/checkpoint-{step * 100}.safetensors")
    os.utime(f"nets/run/checkpoint-{step * 100}.safetensors", (10**9, 10**9))
Path("facts.csv").write_text("path,licence,rating,label\\n" + "".join(f"*-{s}00*,MIT,{s},x{s}\\n" for s in range(6)))
corpus = build_corpus(BuildConfig(out="corpus", sources=["nets"], facts="facts.csv", distributed=False))
split("cut", corpus, by="checkpoint_id", heldout=0.5)
dedupe("thin", Corpus.open("cut"))
export(Corpus.open("cut"), "out")
make_encoder(Path("bundle/encoder"), 0)
save_bundle(igpg(), "bundle", {"seed": 3, "corpus": "corpus"})
"""


def test_two_processes_write_the_same_files(tmp_path: Path) -> None:
    trees: list[dict[str, bytes]] = []
    for index, zone in enumerate(("UTC", "Asia/Tokyo")):
        folder = tmp_path / "work"
        folder.mkdir()
        environment = {"PYTHONHASHSEED": str(index), "TZ": zone, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", WRITE], check=True, cwd=folder, env=os.environ | environment)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        trees.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
        folder.rename(tmp_path / str(index))
    first, second = trees
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert {"corpus/manifest.json", "cut/manifest.json", "thin/manifest.json", "bundle/generator.json"} <= set(first)
