"""WHICH rules move it? Precision schedules, relaxation and learning rules: each class one choice of a researcher."""
