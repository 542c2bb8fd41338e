"""The page that shows what a model read."""

from skim.report.collector import LayerRead, TextRead, collect
from skim.report.cost import Cost, measure
from skim.report.page import pieces, quality_of, write_page

__all__ = ["Cost", "LayerRead", "TextRead", "collect", "measure", "pieces", "quality_of", "write_page"]
