"""Folders as commands leave them, from which pages are made, and a parser for these."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from raywgen.evaluation.report import write_report
from raywgen.tasks.standing import BETTER, LIKE, WEAK
from raywgen.training.stages_file import StageRecord, write_stages

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
STAGES = ("tokenizer", "prior")
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
        "schema_version": 3,
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
        row = {
            "stage": "prior",
            "step": step,
            "time": 80 + step * 0.02,
            "loss": 5.5 * step**-0.09 * rng.lognormvariate(0, 0.01),
        }
        if step % 300 == 0:
            row["val_loss"] = 5.5 * min(step, 4200) ** -0.09 + 0.05 + max(0, step - 4200) * 6e-5
        lines.append(json.dumps(row))
    path.write_text("\n".join([*lines, '{"stage": "prior", "st']))


def make_run(root: Path) -> Path:
    (root / "evaluation").mkdir(parents=True)
    write_evaluation(root, make_evaluation())
    (root / "evaluation" / "config.yaml").write_text("generator: runs/a b/generator\ncorpus: s3://bucket/runs/corpus\n")
    write_metrics(root / "training" / "metrics.jsonl")
    (root / "config.yaml").write_text("method: igpg\nseed: 0\ntokenizer:\n  num_levels: 4\n  num_codes: 256\n")
    for name in ("corpus", "generator", "generated"):
        (root / name).mkdir()
    return root


def make_training(root: Path, *, done: bool = True) -> Path:
    root.mkdir(parents=True)
    stages = [StageRecord(name=name, num_steps=9000, batch_size=8, optimizer={}, is_optional=False) for name in STAGES]
    write_stages(stages, root)
    write_metrics(root / "training" / "metrics.jsonl")
    (root / "training" / "metrics.jsonl").rename(root / "metrics.jsonl")
    (root / "config.yaml").write_text("method: igpg\ncorpus: runs/zoo/corpus\n")
    (root / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if done:
        (root / "generator").mkdir()
        (root / "generator" / "generator.json").write_text("{}")
    return root


def make_finetune(root: Path) -> Path:
    root.mkdir(parents=True)
    starts = {"generated": (0.9312, 0.9604), "nearest": (0.851, 0.9544), "mine/random.pt": (0.502, 0.951)}
    rows = []
    for network in LAYOUTS:
        for start, (first, last) in starts.items():
            curve = [last - (last - first) * 0.7**epoch for epoch in range(26)]
            row: dict[str, Any] = {"network": network, "start": start, "learning_rate": 0.003, "accuracy": curve}
            row |= {"wanted_accuracy": 0.951, "epochs": None if "/" in start else 2.0, "share_reached": 0.5}
            rows.append(row | {"validation_accuracy": {}, "tasks": {"digits/1-4": curve, "digits/2-3": curve}})
    (root / "finetune.json").write_text(json.dumps(rows))
    (root / "config.yaml").write_text("tasks: unseen\ngenerator: runs/igpg\ncorpus: runs/zoo/corpus\n")
    return root


def make_networks(root: Path) -> Path:
    root.mkdir(parents=True)
    rows = []
    for number in range(12):
        name = f"{LAYOUTS[number % 2]}_digits_{number}.safetensors"
        (root / name).write_bytes(b"")
        row = {"task": f"digits/{number}", "draw": 0, "instruction": f"Is the digit {number}?", "known": number > 1}
        row |= {"network": LAYOUTS[number % 2], "log_prob": -310.2, "example_loss": 0.31, "example_accuracy": 0.93}
        row |= {
            "chance": 0.5,
            "majority": 0.6,
            "linear": 0.88,
            "test_accuracy": 0.9 + 0.002 * number,
            "path": f"/gone/{name}",
        }
        rows.append(row | {"against_chance": {3: LIKE, 5: WEAK}.get(number, BETTER)})
    (root / "networks.json").write_text(json.dumps(rows))
    (root / "config.yaml").write_text("generator: runs/igpg\ncorpus: runs/zoo/corpus\n")
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
