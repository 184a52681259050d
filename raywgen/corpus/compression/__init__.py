"""Corpora at a few bits per value: the codec of one network, and folders of compressed corpora."""

from raywgen.corpus.compression.archive import compress, decompress
from raywgen.corpus.compression.codec import BudgetError, CodedNetwork, NetworkCodec
from raywgen.corpus.compression.config import CodecConfig

__all__ = ["BudgetError", "CodecConfig", "CodedNetwork", "NetworkCodec", "compress", "decompress"]
