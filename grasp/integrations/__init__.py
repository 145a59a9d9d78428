"""Doors from other fine-tuning tools; each file imports its own tool, and nothing imports them."""
