"""Tasks, models, one training loop, races and their reports."""
