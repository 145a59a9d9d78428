"""Keys and values of a decoder's cache that grow where they are.

What is joined anew at each token is copied as a whole each time.
"""

from torch import Tensor
from transformers.cache_utils import DynamicLayer


def give_room(cache: object, length: int) -> None:
    """Let a cache hold up to `length` tokens without a copy; layers of other kinds stay."""
    layers = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = Room(layer, length)


class Room(DynamicLayer):
    """A layer's keys and values.

    Args:
        grown: what is there.
        length: tokens that there is to be room for.
    """

    def __init__(self, grown: DynamicLayer, length: int):
        super().__init__()
        states = self.keys, self.values = grown.keys, grown.values
        self.dtype, self.device, self.is_initialized = grown.dtype, grown.device, True
        self.room = [T.new_empty(*T.shape[:-2], length, T.shape[-1]) for T in states]
        self.keys = self.keys[..., :0, :]
        self.update(*states)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values
