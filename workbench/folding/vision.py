"""A vision transformer whose feed-forward networks have RePaViT's form, and its folded twin; see `batch_norm`.

Both are models of transformers of the type `channel-idle-vit`: attention is ViT's own and keeps its LayerNorm.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.activations import ACT2FN
from transformers.models.vit.modeling_vit import ViTLayer

from ..errors import UserError
from .batch_norm import ChannelIdleFFN, ReparameterisedFFN, idle_count, reparameterise

# made so and not by a class statement: transformers turns its configs into dataclasses that take any argument, which run-time
# checkers of annotations take at their word
ChannelIdleViTConfig: Any = type(
    "ChannelIdleViTConfig",
    (ViTConfig,),
    {
        "__doc__": "A ViTConfig with `theta`, the share of idle channels, and whether they are `folded`.",
        "__module__": __name__,
        "__annotations__": {"theta": float, "folded": bool},
        "model_type": "channel-idle-vit",
        "theta": 0.0,
        "folded": False,
    },
)


class ChannelIdleViTLayer(ViTLayer):
    """ViT's layer with x + attention(norm(x)), then the network, which has its norms and its shortcut in itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.layernorm_after
        width, hidden = config.hidden_size, config.intermediate_size
        act = ACT2FN[config.hidden_act]
        active = hidden - idle_count(config.theta, hidden)
        # reshaped networks of another class than the family's own
        self.mlp: Any = (
            ReparameterisedFFN(width, active, act)
            if config.folded
            else ChannelIdleFFN(width, hidden, config.theta, act)
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        written, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        return self.mlp(self.dropout(written) + hidden_states)


class ChannelIdleViTForImageClassification(ViTForImageClassification):
    """ViT for image classification with channel-idle networks; `theta` 0 is its dense twin."""

    config_class = ChannelIdleViTConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i in range(config.num_hidden_layers):
            self.vit.layers[i] = ChannelIdleViTLayer(config)
        self.post_init()


def fold_vit(model: ChannelIdleViTForImageClassification) -> ChannelIdleViTForImageClassification:
    """The folded twin of a trained model: equal outputs, fewer weights; the model itself is left as it is.

    Raises UserError for a model that is folded already, or has no idle channel.
    """
    if model.config.folded or not idle_count(model.config.theta, model.config.intermediate_size):
        raise UserError("this vision transformer has no idle channels to fold: it is folded already, or its theta is 0")
    config = copy.deepcopy(model.config)
    config.folded = True
    folded = copy.deepcopy(model).eval()
    folded.config = folded.vit.config = config
    for layer in folded.vit.layers:
        layer.mlp = reparameterise(layer.mlp)
    return folded


AutoConfig.register(ChannelIdleViTConfig.model_type, ChannelIdleViTConfig, exist_ok=True)
AutoModelForImageClassification.register(ChannelIdleViTConfig, ChannelIdleViTForImageClassification, exist_ok=True)
