"""What transformers and PEFT print of themselves, where a stage of ours speaks for them."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from unittest import mock

from torch import nn

GGUF = "transformers.modeling_gguf_pytorch_utils"  # which takes its bar from tqdm itself


@contextmanager
def bars_aside() -> Iterator[None]:
    """No bar of transformers' while a model loads; those of downloads stay."""
    from tqdm.auto import tqdm
    from transformers.utils import logging

    class Unseen(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": True})

    with ExitStack() as after:
        if hasattr(logging, "set_tqdm_hook"):  # not in every 5.x
            hook = logging.set_tqdm_hook(lambda _, args, options: Unseen(*args, **options))
            after.callback(logging.set_tqdm_hook, hook)
        with suppress(ImportError):
            module = importlib.import_module(GGUF)
            if hasattr(module, "tqdm"):
                after.enter_context(mock.patch.object(module, "tqdm", Unseen))
        yield


@contextmanager
def old_names_allowed() -> Iterator[None]:
    """PEFT asks models for a property by a name that transformers warns of, once each time."""
    with warnings.catch_warnings():
        asked = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", asked, FutureWarning)
        yield


@contextmanager
def saved_unasked(model: nn.Module) -> Iterator[None]:
    """The vocabulary is the base's: else PEFT asks the hub whether it is, at each checkpoint."""
    if not hasattr(model, "peft_config"):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained
