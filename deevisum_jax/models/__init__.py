"""PaliGemma 2 with exit heads: pure model code, no training and no input or output."""
