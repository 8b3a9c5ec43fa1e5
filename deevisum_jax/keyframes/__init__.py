"""Long videos as few frames: which are chosen, and what becomes of the others (ViLaMP)."""
