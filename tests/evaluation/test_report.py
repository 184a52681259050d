"""The report: complete and self-contained from a realistic run folder, clear where a part is missing or damaged."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raywgen.evaluation.plots import thinned
from raywgen.evaluation.report import ReportError, write_report
from raywgen.evaluation.report_inputs import read_metrics

LAYOUTS = ("mlp-64-14-2", "mlp-64-12-8-2")
# name, group, label, help, accuracy on seen and on unseen tasks
ROWS = (
    ("original", "ladder", "Trained on the task", "From the shared start, with all of its images.", 0.968, 0.966),
    ("reconstructed", "ladder", "Reconstructed", "Trained, then through the tokenizer and back.", 0.964, 0.961),
    ("generated", "ladder", "Generated", "Written from 64 samples; best of 8 on those samples.", 0.957, 0.951),
    ("fine_tuned_1", "ladder", "Fine-tuned 1 epoch", "Generated, then one epoch on 64 samples.", 0.958, 0.953),
    ("fine_tuned_25", "ladder", "Fine-tuned 25 epochs", "Generated, then 25 epochs on 64 samples.", 0.961, 0.957),
    ("nearest_condition", "baseline", "Retrieval by condition", "Stored, nearest instruction.", 0.944, 0.802),
    ("nearest_loss", "baseline", "Retrieval by loss", "The best of all stored networks on them.", 0.951, 0.873),
    ("noise", "baseline", "Stored plus noise", "The best stored network with a little noise.", 0.942, 0.862),
    ("scratch", "baseline", "Trained on 64 samples", "From the shared start, on them alone.", 0.846, 0.842),
    ("gaussian", "baseline", "Gaussian per coordinate", "Drawn from the stored mean and spread.", 0.689, 0.681),
    ("average", "baseline", "Average of all", "The mean of the stored networks.", 0.612, 0.607),
    ("no_samples", "ablation", "Generated without samples", "Given the instruction alone.", 0.889, 0.868),
    ("wrong_samples", "ablation", "Generated, another task's samples", "Given another task's samples.", 0.534, 0.529),
)
PARTS = ("novelty", "codebook", "claims", "figures", "paths", "minutes", "best_of", "num_samples", "num_test_images")


def make_evaluation() -> dict[str, Any]:
    rng = random.Random(0)
    ladder = [
        {
            "split": split,
            "layout": layout,
            "row": name,
            "accuracy": (seen, unseen)[split == "unseen"] - 0.006 * index + rng.uniform(-0.003, 0.003),
            "ci95": rng.uniform(0.003, 0.006) + 0.1 * (1 - seen) ** 1.3,
            "num_networks": 24,
        }
        for name, _, _, _, seen, unseen in ROWS
        for split in ("seen", "unseen")
        for index, layout in enumerate(LAYOUTS)
    ]
    centres = {"generated": (1.02, 0.24), "original": (0.97, 0.29), "noise": (0.12, 0.86)}
    networks = [
        {
            "kind": kind,
            "split": split,
            "layout": rng.choice(LAYOUTS),
            "task": "digits/1-4-7",
            "weight_distance": abs(rng.gauss(distance - 0.2 * (split == "seen"), 0.07)),
            "error_overlap": min(1.0, max(0.0, rng.gauss(overlap, 0.07))),
            "accuracy": 0.95,
        }
        for split in ("seen", "unseen")
        for kind, (distance, overlap) in centres.items()
        for _ in range(48)
    ]
    usage = [[int(400 * rng.lognormvariate(0, 0.35 + 0.2 * level)) for _ in range(256)] for level in range(4)]
    usage[3][:9] = [0] * 9
    return {
        "schema_version": 2,
        "num_test_images": 597,
        "best_of": 8,
        "num_samples": 64,
        "layouts": list(LAYOUTS),
        "rows": [{"name": row[0], "group": row[1], "label": row[2], "help": row[3]} for row in ROWS],
        "ladder": ladder,
        "novelty": {
            "rows": networks,
            "reference_distance": 1.0,
            "verdict": "novel",
            "verdict_text": "On unseen tasks, generated networks lie as far from their nearest stored network as "
            "networks trained on those tasks do, and score above the best of retrieval, average, noise and Gaussian.",
        },
        "codebook": {"levels": 4, "codes": 256, "usage": usage},
        "figures": {"unseen_generated": 0.948, "unseen_nearest": 0.870, "bits_per_value": 4.0, "snr_db": 20.7},
        "claims": [
            {"text": "Generated above nearest stored, on unseen tasks", "holds": True},
            {"text": "Samples matter: generated above wrong samples", "holds": True},
            {"text": "Every code of every level is in use", "holds": False},
        ],
        "minutes": 4.8,
        "paths": {"corpus": "corpus", "generator_bundle": "generator", "generated_networks": "generated"},
    }


def write_metrics(path: Path) -> None:
    rng = random.Random(1)
    path.parent.mkdir(parents=True)
    lines = []
    for step in range(10, 4001, 10):
        row: dict[str, Any] = {"stage": "tokenizer", "step": step, "time": step * 0.02}
        row["loss"] = 0.9 * step**-0.55 * rng.lognormvariate(0, 0.08) + 0.004
        if step % 200 == 0:
            row |= {"val_loss": 0.9 * step**-0.55 + 0.006, "perplexity": 250 - 4e4 / (step + 200), "snr_db": 20.7}
            row |= {"codes_used": min(256, 90 + step // 8)}
        lines.append(json.dumps(row))
    for step in range(20, 6001, 20):
        row = {"stage": "prior", "step": step, "loss": 5.5 * step**-0.09 * rng.lognormvariate(0, 0.01)}
        if step % 300 == 0:
            row["val_loss"] = 5.5 * min(step, 4200) ** -0.09 + 0.05 + max(0, step - 4200) * 6e-5
        lines.append(json.dumps(row))
    path.write_text("\n".join([*lines, '{"stage": "prior", "st']))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "igpg-digits")


def make_run(root: Path) -> Path:
    (root / "evaluation").mkdir(parents=True)
    write_evaluation(root, make_evaluation())
    write_metrics(root / "training" / "metrics.jsonl")
    (root / "config.yaml").write_text("method: igpg\nseed: 0\ntokenizer:\n  num_levels: 4\n  num_codes: 256\n")
    return root


def write_evaluation(root: Path, content: Any) -> Path:
    path = root / "evaluation" / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Page(HTMLParser):
    """Collects text, ids, references and addresses, and checks that elements close in order."""

    void = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.ids, self.normalizers, self.addresses, self.tags = "", [], [], [], []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.normalizers += re.findall(r"url\(#([^)]+)\)", value or "")
            self.addresses += [value or ""] if name in ("src", "href", "xlink:href", "action") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + "\n"


def read_page(root: Path) -> Page:
    path = Path(write_report(root))
    assert path == root / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_asks_the_network_for_nothing(whole_run: Path) -> None:
    page = read_page(whole_run)
    assert all(address.startswith("#") for address in page.addresses)
    assert {"script", "link", "iframe", "img", "image"}.isdisjoint(page.tags)
    html = (whole_run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(html) < 2_000_000


def test_ids_are_unique_and_every_reference_has_its_target(whole_run: Path) -> None:
    page = read_page(whole_run)
    assert len(set(page.ids)) == len(page.ids)
    targets = {*page.normalizers, *(address.removeprefix("#") for address in page.addresses)}
    assert targets
    assert targets <= set(page.ids)


def test_every_accuracy_and_every_part_is_on_the_page(whole_run: Path) -> None:
    text = read_page(whole_run).text
    content = make_evaluation()
    for cell in content["ladder"]:
        assert f"{100 * cell['accuracy']:.1f}" in text
    for name in ("label", "help"):
        assert all(row[name] in text for row in content["rows"])
    assert content["novelty"]["verdict_text"] in text
    assert all(claim["text"] in text for claim in content["claims"])
    assert "Every code of every level is in use: does not hold" in text
    assert "num_levels: 4" in text
    assert "training/metrics.jsonl" in text
    assert "1 unreadable line of the metric logs left out" in text
    assert "Left out" not in text


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
        f"{mean['generated'] - mean['nearest_loss']:.1f} percentage points above the best baseline (retrieval by loss) "
        f"and {mean['original'] - mean['generated']:.1f} percentage points below trained ones" in text
    )
    assert "Tokenizer: validation loss lowest at the end" in text
    assert "Prior: validation loss lowest at step 4,200" in text
    assert "9 of 1,024 codes are never used" in text


def test_a_difference_inside_the_intervals_is_reported_as_none(tmp_path: Path) -> None:
    content = make_evaluation()
    for cell in content["ladder"]:
        cell["accuracy"] = 0.9 + 0.001 * (cell["row"] == "generated")
        cell["ci95"] = 0.01
    write_evaluation(tmp_path, content)
    assert "generated networks reach 90.1, level with the best baseline" in read_page(tmp_path).text


def test_means_over_layouts_carry_the_mean_of_their_intervals(tmp_path: Path) -> None:
    """The layouts share their tasks: adding intervals as if they were independent would promise too much."""
    content = make_evaluation()
    intervals = iter([0.01, 0.03])
    for cell in content["ladder"]:
        if (cell["split"], cell["row"]) == ("unseen", "generated"):
            cell |= {"accuracy": 0.9, "ci95": next(intervals)}
    write_evaluation(tmp_path, content)
    assert re.search(r"Generated, unseen\s+90\.0\s+± 2\.0", read_page(tmp_path).text)


def test_the_best_baseline_is_named_beside_the_best_stored_network(tmp_path: Path) -> None:
    content = make_evaluation()
    for cell in content["ladder"]:
        if cell["row"] == "scratch":
            cell["accuracy"] = 0.99
    write_evaluation(tmp_path, content)
    text = read_page(tmp_path).text
    assert re.search(
        r"Best stored, unseen\s+86\.\d\s+± [\d.]+\s+Retrieval by loss; generated is 8\.\d percentage points above", text
    )
    assert re.search(
        r"Best baseline, unseen\s+99\.0\s+± [\d.]+\s+Trained on 64 samples; generated is 4\.\d percentage points below",
        text,
    )


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


TOKENIZER_ROW = {
    "num_networks": 120, "bits_per_value": 4.03, "values_per_token": 1.98, "snr_db": 21.2, "snr_gap_db": 3.06,
    "codes_used": [1.0, 0.97], "code_perplexity": [201.3, 154.2],
    "original_accuracy": 0.957, "reconstructed_accuracy": 0.953,
}  # fmt: skip
TOKENIZER = {
    "coder": "conv", "quantiser": "residual", "num_levels": 2, "num_codes": 256, "codebook_values": 8192,
    "decoder_values": 22977, "normalizer_values": 1848, "no_accuracy": "",
    "splits": [{**TOKENIZER_ROW, "split": "training"}, {**TOKENIZER_ROW, "split": "held out", "snr_db": 20.4}],
}  # fmt: skip


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
    for note in ("novelty measurements", "metrics.jsonl", "codebook use", "config.yaml"):
        assert re.search(rf"Left out: [^.]*no\s+{note}", text), note
    assert text.count("Left out") == 4


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
        ({"schema_version": 2}, "it lacks 'layouts'"),
        ({"schema_version": 9}, "schema_version is 9, not 2"),
        ({"schema_version": 1}, "schema_version is 1, not 2"),
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


def test_a_missing_evaluation_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"evaluation\.json does not exist.*run `raywgen evaluate` first"):
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
    assert num_unreadable == 3


@pytest.mark.parametrize("num_points", [1, 239, 240, 241, 10_000])
def test_thinned_series_are_short_and_keep_their_mean(num_points: int) -> None:
    series = [(float(step), float(step % 7)) for step in range(num_points)]
    short = thinned(series)
    assert len(short) <= 240
    assert short[0][0] <= short[-1][0] <= num_points
    if num_points % len(short) == 0:
        assert sum(value for _, value in short) / len(short) == pytest.approx(sum(v for _, v in series) / num_points)
