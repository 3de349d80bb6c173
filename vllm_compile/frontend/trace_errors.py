"""What torch.export says of a model that it cannot trace, in one line with the module."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vllm_compile.errors import UnsupportedError


@contextmanager
def naming_the_module(model: nn.Module) -> Iterator[None]:
    """Within it, whatever torch raises becomes an UnsupportedError that says where; torch itself prints nothing."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback of its own
    before, logger.disabled = logger.disabled, True
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:  # torch.export raises many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = f"{type(model).__name__} cannot be traced by torch.export{_place(error, model)}"
        raise UnsupportedError(f"{what}: {reason[0]}") from error
    finally:
        logger.disabled = before


def _place(error: BaseException, model: nn.Module) -> str:
    """`, in ` the innermost module of the model that was running, if one was."""
    names = {id(module): name for name, module in model.named_modules() if name}
    place, frames = "", error.__traceback__
    while frames is not None:
        place = names.get(id(frames.tb_frame.f_locals.get("self")), place)
        frames = frames.tb_next
    return f", in {place}" if place else ""
