"""The pages on training, fine-tuning and generated networks: what their first screen says, and what comes as data."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raywgen.evaluation.report import ReportError, write_report
from tests.evaluation.report.builders import make_finetune, make_networks, make_run, make_training, read_page

MAKERS = {"run": make_run, "training": make_training, "finetune": make_finetune, "networks": make_networks}
FILES = {"training": "tokenizer.json", "finetune": "finetune.json", "networks": "networks.json"}


def test_a_trained_run_says_what_went_to_the_end_and_what_rose(tmp_path: Path) -> None:
    text = read_page(make_training(tmp_path / "run")).text
    assert "its stages tokenizer and prior went to the end. The validation loss of prior rose again" in text
    assert re.search(r"validation loss after 6,001 steps", text)
    assert "held out networks keep 20.4 dB" in text
    assert f"raywgen evaluate generator={tmp_path}/run corpus=runs/zoo/corpus out={tmp_path}/run/evaluation" in text


def test_a_run_under_way_says_how_far_it_is_and_how_it_goes_on(tmp_path: Path) -> None:
    text = read_page(make_training(tmp_path / "run", done=False)).text
    assert "The run was at stage prior, step 6,001 of 9,000 when this page was written" in text
    assert f"raywgen train {tmp_path}/run/config.yaml" in text
    assert "raywgen evaluate" not in text


def test_fine_tuning_says_how_starts_stand_before_and_after(tmp_path: Path) -> None:
    text = read_page(make_finetune(tmp_path / "tuned")).text
    assert "Ahead before training: generated" in text
    assert "Before training, generated 93.1 %, nearest 85.1 % and random.pt 50.2 %; after 25 epochs, generated" in text
    assert re.search(r"random\.pt\s+never\s+to 95\.1 % within 25", text)


@pytest.mark.parametrize(
    ("starts", "label"),
    [
        (("generated",), "From generated alone"),
        (("nearest", "generated", "generated"), "Ahead before training: b and c"),
        (("nearest", "nearest"), "All begin alike"),
    ],
)
def test_fine_tuning_names_all_that_are_ahead(tmp_path: Path, starts: tuple[str, ...], label: str) -> None:
    root = make_finetune(tmp_path / "tuned")
    rows = {row["start"]: row for row in json.loads((root / "finetune.json").read_text())}
    named = starts if len(starts) == 1 else [f"mine/{letter}" for letter in "abc"[: len(starts)]]
    content = [rows[start] | {"start": name} for start, name in zip(starts, named, strict=True)]
    (root / "finetune.json").write_text(json.dumps(content))
    assert label in read_page(root).text


@pytest.mark.parametrize("form", ["file", "files", "adapter", "gone"])
def test_a_network_is_to_be_scored_where_it_is_a_single_file(tmp_path: Path, form: str) -> None:
    root = make_networks(tmp_path / "out")
    rows = json.loads((root / "networks.json").read_text())
    file, folder = root / Path(rows[0]["path"]).name, root / "net"
    if form != "file":
        file.unlink()
    if form in ("files", "adapter"):
        folder.mkdir()
        path = folder / "model.safetensors.index.json" if form == "files" else folder
        (root / "networks.json").write_text(json.dumps([rows[0] | {"path": str(path)}, *rows[1:]]))
    text = read_page(root).text
    assert "raywgen evaluate generator=runs/igpg" in text
    line = f"raywgen score {file} --corpus runs/zoo/corpus --task digits/0"
    assert (line in text) == ("raywgen score" in text) == (form == "file")


def test_generated_networks_link_to_their_files_after_a_move(tmp_path: Path) -> None:
    first = make_networks(tmp_path / "first")
    shutil.move(first, tmp_path / "second")
    page = read_page(tmp_path / "second")
    links = [address for address in page.addresses if address.endswith(".safetensors")]
    assert len(links) == 12
    assert all((tmp_path / "second" / link).is_file() for link in links)
    assert "2 of 12 networks no better than chance or a linear classifier" in page.text
    assert re.search(r"Linear classifier\s+88\.0\s+%", page.text)
    assert "12 networks score 91.1 % on test samples, where guessing would score 50.0 %." in page.text
    assert page.text.count("The generator was never trained on this architecture.") == 2


def test_networks_that_were_not_run_are_said_to_be(tmp_path: Path) -> None:
    root = make_networks(tmp_path / "out")
    rows = json.loads((root / "networks.json").read_text())
    kept = [{key: row[key] for key in ("task", "draw", "instruction", "network", "known", "log_prob")} for row in rows]
    (root / "networks.json").write_text(json.dumps(kept))
    text = read_page(root).text
    assert "12 networks written; none was run, so nothing is known of what they do." in text
    assert "-310.2" in text


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("damage", ["{", "[]", '[{"network": 3}]', '{"splits": 1}'])
def test_damaged_files_are_named_with_the_remedy(tmp_path: Path, kind: str, damage: str) -> None:
    root = MAKERS[kind](tmp_path / "folder")
    (root / FILES[kind]).write_text(damage)
    with pytest.raises(ReportError, match=rf"{re.escape(FILES[kind])} is damaged: .*; run `raywgen \w+` again"):
        write_report(root)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_page_is_offline_and_in_order_for_those_who_hear_it(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    root = make(tmp_path / "a&b<c")
    page = read_page(root)
    assert {"script", "link", "iframe", "img"}.isdisjoint(page.tags)
    assert not [address for address in page.addresses if ":" in address or address.startswith("/")]
    assert [page.tags.count(tag) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.tags.count("caption") == page.tags.count("table")
    html = (root / "report.html").read_text()
    assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", html))
    assert all('aria-label="' in svg or 'aria-hidden="true"' in svg for svg in re.findall(r"<svg\b[^>]*>", html))
    assert len(set(page.ids)) == len(page.ids)
    assert f"raywgen report '{root}'" in page.text


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(colours: str) -> None:
    """WCAG 2 asks for a contrast of 4.5 for text; text stands on paper, on raised boxes and on the tint of a row."""
    style = (Path(__file__).parents[3] / "raywgen/evaluation/report/templates/style.html").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colour = dict(re.findall(r"--(\w+): (#\w{6})", light if colours == "light" else dark))
    for text in ("ink", "muted", "accent", "warn"):
        for behind in ("paper", "raised", "tint"):
            assert contrast(colour[text], colour[behind]) >= 4.5, (text, behind)


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
