"""TVSum: 50 videos of ten categories, each scored by 20 people."""
