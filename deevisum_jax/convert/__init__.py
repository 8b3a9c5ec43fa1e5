"""Weights of other projects, mapped tensor by tensor and reported."""
