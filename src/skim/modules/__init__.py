"""nn.Modules of DSA."""

from skim.modules.indexer import IndexTensors, LightningIndexer

__all__ = ["IndexTensors", "LightningIndexer"]
