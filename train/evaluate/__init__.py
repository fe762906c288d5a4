"""Scores a checkpoint or a released folder: held-out loss, lm-eval tasks, speed and memory of generation."""
