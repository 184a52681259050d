"""Loads a trained generator, and the encoder that it was trained with, from a run folder or a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raywgen.generation.fill import TrainedGenerator
from raywgen.generators.bundle import ENCODER, bundle_facts, load_bundle
from raywgen.generators.bundle_copies import bundle_folder, local_bundle
from raywgen.nn.devices import Device, resolved_device
from raywgen.tasks.encoders import load_encoder
from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.sentence_form import SentenceForm
from raywgen.trust import reading, trusting


def load(path: str | Path, *, device: Device = "auto", trust: Sequence[str] = ()) -> TrainedGenerator:
    """Loads a generator from a run folder or a bundle.

    Args:
        path: The folder: a local path, a URI such as `s3://bucket/run`, or `hf://owner/name` on the Hugging Face hub.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one. `generator.device` of the result says which.
        trust: Packages from which its encoders may be imported, and addresses from which they may be fetched, such as
            `("mynets", "hf:openai/clip-vit-base-patch32")`. Nothing else that it names is imported or fetched.

    Raises:
        BundleError: There is no bundle, or it is damaged.
        EncoderError: The generator works on features of an encoder that is not there.
        DeviceError: There is no GPU, and one is asked for.
        UntrustedError: The bundle names an encoder that is not to be trusted.
    """
    chosen = resolved_device(device)
    folder = bundle_folder(path)
    with trusting(*trust):
        generator = load_bundle(folder)
        form = bundle_facts(folder).get("inputs")
        inputs = InputForm(**{**form, "mean": tuple(form["mean"]), "std": tuple(form["std"])}) if form else None
        stored = local_bundle(folder) / ENCODER
        encoder = None
        if inputs is not None and inputs.encoder:
            with reading(folder, str(stored.parent)):
                encoder = load_encoder(str(stored) if stored.is_dir() else inputs.encoder)
        texts = bundle_facts(folder).get("sentences")
    sentences = SentenceForm(**texts) if texts else None
    return TrainedGenerator(generator.to(chosen), inputs, encoder, sentences, folder)
