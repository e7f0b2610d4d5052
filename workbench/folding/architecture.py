"""Folded models as architectures that transformers knows: one more model type for each family, made when it is needed.

The folded form of `gpt2` is the model type `folded-gpt2`: a subclass of the family's own classes whose networks are replaced
when it is made, as `config.folding` says. So `from_pretrained`, `save_pretrained`, `generate`, device maps and dtypes work as
ever; and transformers alone, which has not been told of the type, refuses the folder, where under the family's own name it
would fill the networks with random numbers. `workbench.load` tells it; `register_folder` does for anybody else. No code
lies in the folder, and none of it is run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..small_files import read_json
from .ffn import FFN
from .modules import FoldedFFN, shrink
from .plan import FoldPlan, put

if TYPE_CHECKING:
    from ..models import Model

PREFIX = "folded-"
AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForImageClassification")
README = """---
library_name: transformers
---
# {name}, folded

The feed-forward networks of `{base}` with {share:.0%} of their channels folded into one {width} x {width} map each
(method: {method}). {ratio:.1%} of the networks' weights are left.

```python
import workbench
model = workbench.load("{folder}")           # answers, layers and profiles as of any model
```

or, as an ordinary model of transformers, which has to be told of the type first:

```python
from transformers import AutoModelForCausalLM
from workbench.folding.architecture import register_folder
register_folder("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```

No code lies in this folder and `trust_remote_code` is not needed. `config.json` says under `folding` which networks hold how
many channels.
"""


def fold_module(module: Any, plan: FoldPlan) -> Any:
    """A copy of a transformers model, folded: a model of the type `folded-...` that saves and loads as any other."""
    config_class, model_class = folded_classes(module.config.model_type, type(module).__name__)
    folded = copy.deepcopy(module)
    for path, one in plan.modules(module).items():
        put(folded, path, one)
    layers = [
        {"ffn": ffn.as_dict(), "active": ffn.hidden - len(idle)}
        for ffn, idle in zip(plan.ffns, plan.idle, strict=True) if len(idle)
    ]  # fmt: skip
    # its parts share one config, which becomes one of the new type; then so does the model
    folded.config.__class__ = config_class
    folded.config.folding = {"base": module.config.model_type, "class": type(module).__name__, "layers": layers,
                             "method": plan.method, "theta": list(plan.theta)}  # fmt: skip
    folded.config.architectures = [model_class.__name__]
    folded.__class__ = model_class
    return folded


@cache
def folded_classes(base_type: str, class_name: str) -> tuple[Any, Any]:
    """The config and the model class of a family's folded form, registered with the Auto classes of transformers.

    Raises UserError for a family or a class that transformers does not have.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base: Any = getattr(transformers, class_name, None)
    if (
        base_type not in CONFIG_MAPPING
        or not isinstance(base, type)
        or not issubclass(base, transformers.PreTrainedModel)
    ):
        raise UserError(f"transformers {transformers.__version__} has no {class_name} of type {base_type!r}, of which this "
                        "model is the folded form; only its own models can be folded and saved")  # fmt: skip
    base_config = CONFIG_MAPPING[base_type]
    kind = PREFIX + base_type
    config_class = type(f"Folded{base_config.__name__}", (base_config,),
                        {"model_type": kind, "folding": None, "__module__": __name__})  # fmt: skip

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _fold_networks(self, config.folding)

    model_class = type(f"Folded{class_name}", (base,),
                       {"__init__": init, "config_class": config_class, "__module__": __name__})  # fmt: skip
    AutoConfig.register(kind, config_class, exist_ok=True)
    for name in AUTO:
        auto: Any = getattr(transformers, name)
        known = auto._model_mapping.get(base_config, ())
        if base in (known if isinstance(known, tuple | list) else (known,)):
            auto.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def _fold_networks(model: Any, folding: Any) -> None:
    """Gives a model that was just made the shapes of its folded form; UserError where the config does not fit it."""
    try:
        for layer in folding["layers"]:
            ffn, active = FFN.from_dict(layer["ffn"]), int(layer["active"])
            if not 0 < active <= ffn.hidden:
                raise ValueError(f"{active} of {ffn.hidden} channels")
            put(model, ffn.path, FoldedFFN(shrink(ffn.module(model), ffn, active), ffn.width))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"the config of this folded model does not fit its family ({err}); fold it again") from err


def register_folder(folder: str | Path) -> bool:
    """Tells transformers of the type of a folded model's folder; False, and nothing done, where it holds another model.

    Raises UserError for a family that transformers does not have.
    """
    try:
        config = read_json(Path(folder) / "config.json")
    except (OSError, ValueError):
        return False  # whoever opens it next says what is wrong
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or not kind.startswith(PREFIX):
        return False
    folding = config.get("folding")
    if not isinstance(folding, Mapping) or not {"base", "class", "layers"} <= set(folding):
        raise UserError(f"{folder}: config.json is of a folded model and does not say what was folded; fold it again")
    folded_classes(str(folding["base"]), str(folding["class"]))
    return True


def save_folded(
    model: Model, folder: str | Path, *, overwrite: bool = False, name: str = "", ratio: float = 1.0
) -> None:
    """Writes a folded model as a Hugging Face folder: config, safetensors, tokenizer, README.

    Raises UserError for a folder that exists already, and for a model that is not folded.
    """
    from ..atomic import staged_folder

    folding = getattr(model.module.config, "folding", None)
    if not folding:
        raise UserError(f"{model.name} is not folded; fold it first (workbench.fold_model)")
    shares = folding["theta"]
    card = README.format(name=name or model.name, base=name or model.name, share=sum(shares) / len(shares), ratio=ratio,
                         width=model.width, method=folding["method"], folder=Path(folder).name)  # fmt: skip
    with staged_folder(folder, marker="config.json", overwrite=overwrite) as staged:
        model.module.save_pretrained(staged)
        model.tokenizer.save_pretrained(staged)
        (staged / "README.md").write_text(card, encoding="utf-8")
