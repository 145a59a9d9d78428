"""What keeps a fine-tune off its bases while anyone's loop trains it."""

from grasp.guard.frozen import init_lora_null
from grasp.guard.guard import Guard

__all__ = ["Guard", "init_lora_null"]
