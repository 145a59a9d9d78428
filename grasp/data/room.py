"""Keys and values of a decoder's cache that grow where they are.

What is joined anew at each token is copied as a whole each time.
"""

from torch import Tensor
from transformers.cache_utils import DynamicLayer


def give_room(cache: object, length: int) -> None:
    """Let a cache hold up to `length` tokens without a copy; layers of other kinds stay.

    Room for all is taken at once, which an allocator gives back as a whole.
    """
    layers = getattr(cache, "layers", [])
    alike: dict[tuple, list[tuple[int, Tensor]]] = {}
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            for T in (layer.keys, layer.values):
                alike.setdefault((T.shape, T.dtype, T.device), []).append((i, T))
    rooms: dict[int, list[Tensor]] = {}
    for (shape, _, _), states in alike.items():
        whole = states[0][1].new_empty(len(states), *shape[:-2], length, shape[-1])
        for (i, _), room in zip(states, whole, strict=True):
            rooms.setdefault(i, []).append(room)
    for i, room in rooms.items():
        layers[i] = Room(layers[i], room)


class Room(DynamicLayer):
    """A layer's keys and values.

    Args:
        grown: what is there.
        room: for keys and for values, `[rows, heads, tokens, width]`.
    """

    def __init__(self, grown: DynamicLayer, room: list[Tensor]):
        super().__init__()
        self.room = room
        self.dtype, self.device, self.is_initialized = grown.dtype, grown.device, True
        self.keys = self.values = grown.keys[..., :0, :]
        self.update(grown.keys, grown.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values
