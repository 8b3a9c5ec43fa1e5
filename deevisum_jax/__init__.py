"""Video summarization on TPUs with a distilled, early-exit PaliGemma 2."""

__version__ = "0.1.0"
