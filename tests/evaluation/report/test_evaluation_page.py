"""The report: complete and self-contained from a realistic run folder, clear where a part is missing or damaged."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

from raywgen.evaluation.report import ReportError, write_report
from raywgen.evaluation.report.inputs import read_metrics
from raywgen.evaluation.report.plots import thinned
from tests.evaluation.report.builders import (
    LAYOUTS,
    PARTS,
    TOKENIZER,
    TOKENIZER_ROW,
    make_evaluation,
    make_run,
    read_page,
    write_evaluation,
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "igpg-digits")


def test_the_page_asks_the_network_for_nothing(whole_run: Path) -> None:
    page = read_page(whole_run)
    assert not [address for address in page.addresses if ":" in address or address.startswith("/")]
    assert {"script", "link", "iframe", "img", "image"}.isdisjoint(page.tags)
    html = (whole_run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(html) < 2_000_000


def test_ids_are_unique_and_every_reference_has_its_target(whole_run: Path) -> None:
    page = read_page(whole_run)
    assert len(set(page.ids)) == len(page.ids)
    targets = {*page.normalizers, *(address[1:] for address in page.addresses if address.startswith("#"))}
    assert targets
    assert targets <= set(page.ids)


def test_links_lead_to_files_also_after_a_move(whole_run: Path, tmp_path: Path) -> None:
    page = read_page(whole_run)
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole_run, moved)
    links = [unquote(address) for address in page.addresses if not address.startswith("#")]
    assert {"corpus", "generator", "evaluation/evaluation.json", "training/metrics.jsonl"} <= set(links)
    assert all((moved / link).exists() for link in links)


def test_what_next_is_ready_to_be_pasted(whole_run: Path) -> None:
    """A folder that was moved names the generator in it, and a path with a space is quoted."""
    commands = [line for line in read_page(whole_run).text.splitlines() if line.startswith("raywgen ")]
    words = [shlex.split(command) for command in commands]
    assert [line[1] for line in words] == ["generate", "finetune", "evaluate", "report"]
    for line in words[:3]:
        assert f"generator={whole_run}/generator" in line
        assert "corpus=s3://bucket/runs/corpus" in line
    assert words[3] == ["raywgen", "report", str(whole_run)]


def test_every_accuracy_and_every_part_is_on_the_page(whole_run: Path) -> None:
    text = read_page(whole_run).text
    content = make_evaluation()
    for cell in content["ladder"]:
        assert f"{100 * cell['accuracy']:.1f}" in text
    for name in ("label", "help"):
        assert all(row[name] in text for row in content["rows"])
    assert content["novelty"]["verdict_text"] in text
    assert all(claim["text"] in text for claim in content["claims"])
    assert re.search(r"Does not hold:\s+Every code of every level is in use", text)
    assert "num_levels: 4" in text
    assert "training/metrics.jsonl" in text
    assert "1 unreadable line of the metric logs left out" in text
    assert "Left out, as this folder" not in text


def test_titles_say_the_finding(whole_run: Path) -> None:
    text = read_page(whole_run).text
    unseen = {
        row: [
            cell["accuracy"] for cell in make_evaluation()["ladder"] if (cell["split"], cell["row"]) == ("unseen", row)
        ]
        for row in ("generated", "nearest_loss", "original")
    }
    mean = {row: 100 * sum(values) / len(values) for row, values in unseen.items()}
    assert (
        f"On unseen tasks, generated networks reach {mean['generated']:.1f}, "
        f"{mean['generated'] - mean['nearest_loss']:.1f} percentage points above the best baseline (retrieval by loss, "
        f"{mean['nearest_loss']:.1f}) and {mean['original'] - mean['generated']:.1f} percentage points below trained "
        f"ones ({mean['original']:.1f})" in text
    )
    assert "Tokenizer: validation loss lowest at the end" in text
    assert "Prior: validation loss lowest at step 4,200" in text
    assert "9 of 1,024 codes are never used" in text


def test_the_first_screen_says_one_thing_with_its_figures(whole_run: Path) -> None:
    first = read_page(whole_run).text.partition("Files and settings")[0]
    lines = [line for line in first.splitlines() if line.strip()]
    place = lines.index("Better than every baseline")
    sentence = lines[place + 1]
    found = re.fullmatch(
        r"On unseen tasks, generated networks score ([\d.]+) %, ([\d.]+) percentage points above the best baseline "
        r"\(retrieval by loss, ([\d.]+) %\)\.",
        sentence,
    )
    assert found
    generated, difference, baseline = map(float, found.groups())
    assert round(generated - baseline, 1) == difference
    cards = lines[place + 2 : place + 14]
    assert cards[cards.index("Generated") + 1].strip() == f"{generated:.1f}"
    assert cards[cards.index("Best baseline") + 1].strip() == f"{baseline:.1f}"
    assert first.count("percentage point") == 1
    assert " level with " not in first


def test_novelty_is_shown_split_by_split(tmp_path: Path) -> None:
    """The verdict rests on unseen tasks; seen ones, where a copy is likelier, have a plot and a title of their own."""
    content = make_evaluation()
    content["novelty"]["reference_distance"] = 2.0
    for point in content["novelty"]["rows"]:
        point |= {"weight_distance": 0.5 if point["split"] == "seen" else 1.5, "error_overlap": 0.25}
    write_evaluation(tmp_path, content)
    text = read_page(tmp_path).text
    assert "On unseen tasks, generated networks lie 0.75 times the reference distance" in text
    assert "On seen tasks, generated networks lie 0.25 times the reference distance" in text
    assert "Stored plus noise (48): distance 1.50, overlap 25 %" in text


def test_perplexity_is_that_of_the_counts(tmp_path: Path) -> None:
    content = make_evaluation()
    content["codebook"] = {"levels": 2, "codes": 4, "usage": [[5, 5, 5, 5], [8, 8, 0, 0]]}
    write_evaluation(tmp_path, content)
    text = read_page(tmp_path).text
    assert "2 of 8 codes are never used; perplexity 2 to 4 of 4 per level" in text


def test_the_tokeniser_has_a_row_for_each_split(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {**make_evaluation(), "tokenizer": TOKENIZER})
    text = read_page(tmp_path).text
    assert (
        "At 4.03 bits per value, held out networks keep 20.4 dB, 3.1 below the bound, and lose 0.4 percentage points"
        in text
    )
    assert re.search(r"120 training\s+4\.03\s+1\.98\s+21\.2\s+3\.1\s+97 to 100 %\s+154 to 201\s+95\.7\s+95\.3", text)
    assert "conv coders, 2 residual tokens of 256 codes" in text
    assert "22,977 in the decoder" in text
    assert "No accuracy" not in text


def test_a_tokeniser_without_accuracies_says_why(tmp_path: Path) -> None:
    row = {**TOKENIZER_ROW, "split": "training", "original_accuracy": None, "reconstructed_accuracy": None}
    content = {**TOKENIZER, "splits": [row], "no_accuracy": "net: unknown task 'mine'"}
    write_evaluation(tmp_path, {**make_evaluation(), "tokenizer": content})
    text = read_page(tmp_path).text
    assert re.search(r"training networks keep 21\.2 dB, 3\.1 below the bound\s", text)
    assert re.search(r"154 to 201\s+-\s+-\s", text)
    assert "No accuracy: net: unknown task 'mine'." in text


@pytest.mark.parametrize("absent", [True, False])
def test_optional_parts_are_left_out_with_a_note(tmp_path: Path, absent: bool) -> None:
    content = make_evaluation()
    for part in PARTS:
        if absent:
            del content[part]
        else:
            content[part] = None
    write_evaluation(tmp_path, content)
    text = read_page(tmp_path).text
    assert "Left out, as this folder holds nothing on it: novelty, checks, training, tokeniser." in text


def test_one_split_and_gaps_in_the_table(tmp_path: Path) -> None:
    content = make_evaluation()
    content["ladder"] = [cell for cell in content["ladder"] if cell["split"] == "unseen"][1:]
    write_evaluation(tmp_path, content)
    text = read_page(tmp_path).text
    assert "not run" in text
    assert "Seen tasks" not in text


def test_names_from_files_are_text_and_never_markup(tmp_path: Path) -> None:
    content = make_evaluation()
    hostile = '<script>alert("$x$")</script>'
    content["rows"][0]["label"] = content["novelty"]["verdict_text"] = hostile
    root = make_run(tmp_path / "a&b<c")
    write_evaluation(root, content)
    (root / "config.yaml").write_text(hostile)
    page = read_page(root)
    assert "script" not in page.tags
    assert page.text.count(hostile) >= 4


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("{", "damaged: "),
        ("[]", "damaged: "),
        ("", "damaged: "),
        ("\x00\x01", "damaged: "),
        ({"schema_version": 3}, "it lacks 'layouts'"),
        ({"schema_version": 9}, "schema_version is 9, not 3"),
        ({"schema_version": 2}, "schema_version is 2, not 3"),
        ({**make_evaluation(), "ladder": 3}, "damaged: "),
        ({**make_evaluation(), "ladder": [{"split": "seen"}]}, "it lacks"),
        ({**make_evaluation(), "rows": []}, "row .* is not one of"),
        ({**make_evaluation(), "layouts": [LAYOUTS[0]]}, f"layout '{LAYOUTS[1]}' is not one of {LAYOUTS[0]}"),
        (
            {**make_evaluation(), "ladder": [{**make_evaluation()["ladder"][0], "accuracy": 95.1}]},
            r"accuracy is 95\.1, not a share between 0 and 1",
        ),
        (
            {**make_evaluation(), "ladder": [{**make_evaluation()["ladder"][0], "ci95": float("nan")}]},
            "ci95 is nan, not a number of at least 0",
        ),
        (
            {**make_evaluation(), "novelty": {**make_evaluation()["novelty"], "reference_distance": None}},
            "reference_distance is None, not a number of at least 0",
        ),
        ({**make_evaluation(), "codebook": {"levels": 1, "codes": 4, "usage": [[1, 2]]}}, "each of its 4 codes"),
        ({**make_evaluation(), "tokenizer": {"splits": []}}, "coder"),
    ],
)
def test_a_damaged_evaluation_is_named_with_the_remedy(tmp_path: Path, damage: object, named: str) -> None:
    write_evaluation(tmp_path, damage)
    with pytest.raises(ReportError, match=rf"evaluation\.json .*{named}.*run `raywgen evaluate` again"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_of_nothing_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ReportError, match=r"holds nothing to report .*evaluation\.json.*give the `out` of `raywgen demo`"
    ):
        write_report(tmp_path)


def test_metrics_of_a_resumed_run_keep_the_later_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [(1, 5.0), (2, 4.0), (3, float("nan")), (2, 3.0), (3, 2.0)]
    lines = [
        json.dumps({"stage": "prior", "step": step, "loss": loss, "note": "x", "done": True}) for step, loss in rows
    ]
    path.write_text("\n".join([*lines, "", "3", "[1]", '{"step": 1']))
    (log,), num_unreadable = read_metrics(path, run="training")
    assert (log.run, log.stage) == ("training", "prior")
    assert log.scalars == {"loss": ((1.0, 5.0), (2.0, 3.0), (3.0, 2.0))}
    assert log.last_step == 3
    assert num_unreadable == 3


@pytest.mark.parametrize("num_points", [1, 239, 240, 241, 10_000])
def test_thinned_series_are_short_and_keep_their_mean(num_points: int) -> None:
    series = [(float(step), float(step % 7)) for step in range(num_points)]
    short = thinned(series)
    assert len(short) <= 240
    assert short[0][0] <= short[-1][0] <= num_points
    if num_points % len(short) == 0:
        assert sum(value for _, value in short) / len(short) == pytest.approx(sum(v for _, v in series) / num_points)
