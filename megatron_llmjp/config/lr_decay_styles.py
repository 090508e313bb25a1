"""Learning-rate decay styles: ``lr_decay_style`` of a run and of single folds.

To add a style, register a :class:`DecayStyle` here, with a function of its decay factor. Styles
without such a function are computed by megatron-core's ``OptimizerParamScheduler``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DecayStyle:
    """Shape of the learning rate between the warm-up and the end of the decay."""

    name: str
    description: str
    """Entry of the table in docs/training.md."""
    factor: Callable[[float], float] | None = None
    """Maps the fraction of the decay, from 0 to 1, to a factor from 1 (``lr``) to 0 (``min_lr``);
    None for a style of megatron-core."""
    decays: bool = True
    """Whether ``min_lr`` and the length of the decay have an effect."""
    has_final_decay: bool = False
    """Whether only the last ``lr_wsd_decay_iters`` iterations decay."""


DECAY_STYLES: dict[str, DecayStyle] = {}
"""All decay styles by name."""


def register_decay_style(style: DecayStyle) -> DecayStyle:
    """Add a decay style to the registry and return it; before the configuration is imported."""
    DECAY_STYLES[style.name] = style
    return style


register_decay_style(DecayStyle("constant", "`lr`", decays=False))
register_decay_style(DecayStyle("linear", "linear from `lr` to `min_lr`"))
register_decay_style(DecayStyle("cosine", "half a cosine from `lr` to `min_lr`"))
register_decay_style(
    DecayStyle("inverse-square-root", "`lr` x sqrt(warm-up / n), not below `min_lr`")
)
register_decay_style(
    DecayStyle(
        "WSD",
        "`lr`, then a final decay to `min_lr`; `lr_wsd_decay_style`: linear, cosine, exponential "
        "or minus_sqrt",
        has_final_decay=True,
    )
)
