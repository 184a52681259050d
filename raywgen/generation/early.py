"""Looks at a request before Ray is started, or a corpus or generator read: what could not work is said at once."""

from __future__ import annotations

from dataclasses import replace

from raywgen.corpus.storage import CorpusStorage
from raywgen.generation.config import GenerateConfig
from raywgen.generation.executor import is_started_here
from raywgen.generators.bundle_copies import bundle_folder
from raywgen.nn.devices import resolved_device
from raywgen.out_folder import checked_out


def checked_request(config: GenerateConfig) -> GenerateConfig:
    """Returns the settings with the plain path of `out`, and refuses what could not be generated.

    Raises:
        OutError: Nothing can or should be written to `out`.
        CorpusError: There is no corpus, and the settings need one.
        BundleError: There is no generator.
        DeviceError: This machine is to generate on a GPU, and has none.
    """
    config = replace(config, out=checked_out(config.out, GenerateConfig.out))
    if config.where == "here" or is_started_here():
        resolved_device(config.device)
    if needs_corpus(config):
        CorpusStorage.at(config.corpus).check_manifest()
    bundle_folder(config.generator)
    return config


def needs_corpus(config: GenerateConfig) -> bool:
    """Whether tasks or architectures are those of a corpus: a task and an architecture of the user's own need none."""
    return not (config.instruction and config.networks)
