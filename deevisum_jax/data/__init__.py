"""Video decoding, text and the Grain pipelines: everything before the model."""
