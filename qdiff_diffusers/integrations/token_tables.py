"""Adding tokens to a text encoder with a packed token table, by ``resize_token_embeddings`` or diffusers'
``load_textual_inversion``.

Both write into the table. Writing into a decoded copy would be lost silently, so the table becomes dense first.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.utils import logging
from torch import nn

from ..errors import QDiffError
from ..layers import PackedLayer
from ..layers.offloading import without_group_offloading

logger = logging.get_logger(__name__)


def resize_token_embeddings(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedModel.resize_token_embeddings``, for which packed token tables are made dense first."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    if given.get("new_num_tokens") is None and given.get("pad_to_multiple_of") is None:  # only looks at the table
        return original(self, *args, **kwargs)
    tables = packed_tables(self)
    if not tables:
        return original(self, *args, **kwargs)
    with without_group_offloading(self):
        make_dense(self, tables)
        return original(self, *args, **kwargs)


def packed_tables(model: Any) -> list[str]:
    """Names of the packed layers among a text encoder's input and output embeddings."""
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if isinstance(part, nn.Module)]
    packed = {id(module) for part in ends for module in part.modules() if isinstance(module, PackedLayer)}
    return [name for name, module in model.named_modules() if id(module) in packed]


def make_dense(model: Any, tables: list[str]) -> None:
    """Make packed token tables dense, with all layers that share their weight, so that the text encoder can be saved so.

    Raises:
        QDiffError: ``model`` is only a part of the quantized model, or a table has an adapter; nothing was changed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not hasattr(quantizer, "make_dense"):
        raise QDiffError(
            f"the token table of this {type(model).__name__} is packed, and only the whole model that was quantized can change "
            "that: call resize_token_embeddings of that one, or dequantize() it"
        )
    if wrapped := [name for name in tables if name.endswith(".base_layer")]:
        raise QDiffError(f"the packed token table {wrapped[0]} has an adapter: unload it before tokens are added")
    logger.warning(f"tokens are added to {type(model).__name__}: its packed token table {tables[0]} becomes dense")
    quantizer.make_dense(model, tables)
