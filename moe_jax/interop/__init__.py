"""Checkpoints of other programs: Hugging Face directories in and out (docs/checkpoints.md)."""
