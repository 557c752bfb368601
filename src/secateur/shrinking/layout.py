"""How a smaller model is stored: sizes that stock classes build, or a modelling file of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any, NamedTuple

import transformers

from secateur.runs.errors import SecateurError
from secateur.shrinking import module_sizes
from secateur.shrinking.options import Form
from secateur.shrinking.source import Source
from secateur.shrinking.stock import smallest_stock
from secateur.shrinking.units import SubBlock, Width

_MODELLING_FILE = "modeling_shrunk.py"


@dataclass(frozen=True)
class Layout:
    """How a shrunk model is stored.

    Attributes:
        config: its config.json.
        widths: of the sub-blocks in the files; what is beyond the kept units is zeros.
        code: files of Python that it needs, by name.
        renamed: tensors outside the blocks that need another name than in the source.
    """

    config: dict[str, Any]
    widths: list[Width]
    code: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def plan_layout(
    source: Source,
    sub_blocks: Sequence[SubBlock],
    kept: Sequence[Width],
    form: Form,
    grid: int | None = None,
) -> Layout:
    """Decide how to store a model whose sub-blocks are cut to ``kept``.

    Padded feed-forwards have a multiple of ``grid`` channels, by default of the first of
    ``channel_grids``.

    Raises:
        SecateurError: the form cannot hold such a model.
    """
    if form == "uneven":
        code = {_MODELLING_FILE: _modelling_source(source, sub_blocks)}
        # Stock classes know older names of their tensors, a class of our own does not.
        head = source.tensors.head
        renamed = {file: name for name in head.names for file in head.files_of(name)}
        return Layout(_uneven_config(source, sub_blocks, kept), list(kept), code, renamed)
    step = grid if form == "padded" else 1
    config, sizes = smallest_stock(source, sub_blocks, kept, step)
    stored = [sizes[sub_block.kind] for sub_block in sub_blocks]
    if form == "uniform" and stored != list(kept):
        raise SecateurError(
            f"No stock {source.config['model_type']} has the widths that were chosen; use --padded."
        )
    return Layout(config, stored)


# Widths that differ: a configuration for each block, and a class that builds them.

_DOCSTRING = Template('''"""$base with blocks of different widths.

Blocks are built as usual, then their linears get the sizes that the configuration has for each
block under per_layer_config; weights, cache and generation are those of the class. Load with
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), or with AutoModel without the
head, as runtimes do that bring a head of their own.
"""''')

_CLASS = Template('''

# Linears inside a block: which side of them shrinks, and how much of it one query head and one
# key-value group have of their own.
ATTENTION = [
$attention]
# The same, and how much of it one channel has.
FEED_FORWARD = [
$feed_forward]


def resize_blocks(blocks: Any, config: Any) -> None:
    """Give the linears of each block the sizes in ``config.per_layer_config``."""
    if not hasattr(config, "is_heterogeneous"):
        raise ImportError("Blocks of different widths need transformers 5.19 or newer; upgrade it.")
    if not config.is_heterogeneous:
        return
    for block, sizes in zip(blocks, config.per_layer_config, strict=True):
        for name, side, size in FEED_FORWARD:
            resize(block.get_submodule(name), **{side: size * sizes.$width})
$resize_attention

class Shrunk$config($config):
    """$config of its own class, so that other models of the family are left alone."""

''')

_MODEL = Template('''
class Shrunk$name($name):
    """$name whose blocks have sizes of their own."""

    config_class = Shrunk$config

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        resize_blocks(self.get_submodule("$blocks"), config)
''')

_RESIZE_ATTENTION = Template("""        for name, side, head, group in ATTENTION:
            size = head * sizes.$heads + group * sizes.$groups
            resize(block.get_submodule(name), **{side: size})
        fit_attention(
            block.get_submodule("$module"),
            block.get_submodule("$output"),
            heads=sizes.$heads,
            groups=sizes.$groups,
        )
""")


class _Classes(NamedTuple):
    """Names of the classes that the modelling file builds upon, and where each has the blocks."""

    config: str
    base: str
    base_blocks: str
    model: str
    model_blocks: str


def _classes(source: Source) -> _Classes:
    model, base = source.blocks.model, source.blocks.model.base_model
    for each in (model, base):
        name = type(each).__name__
        if getattr(transformers, name, None) is not type(each):
            raise SecateurError(
                f"{name} is not part of transformers, so blocks of different widths cannot be "
                "built upon it; use --uniform or --padded."
            )
    where = source.blocks.prefix
    inside = where.removeprefix(f"{model.base_model_prefix}.")
    config, *names = (type(each).__name__ for each in (model.config, base, model))
    return _Classes(config, names[0], inside, names[1], where)


def _uneven_config(
    source: Source, sub_blocks: Sequence[SubBlock], widths: Sequence[Width]
) -> dict[str, Any]:
    sizes: dict[str, dict[str, int]] = {}
    names = source.names
    for sub_block, width in zip(sub_blocks, widths, strict=True):
        own = sizes.setdefault(str(sub_block.block), {})
        if sub_block.kind == "ffn":
            own[names.width] = width.units
        else:
            own[names.groups] = width.units
            own[names.heads] = width.units * width.queries
    module = _MODELLING_FILE.removesuffix(".py")
    classes = _classes(source)
    return {
        **source.config,
        "architectures": [f"Shrunk{classes.model}"],
        "auto_map": {
            "AutoConfig": f"{module}.Shrunk{classes.config}",
            # Of a model without its head vLLM makes one with its own.
            "AutoModel": f"{module}.Shrunk{classes.base}",
            "AutoModelForCausalLM": f"{module}.Shrunk{classes.model}",
        },
        # Stock code around the blocks reads the dense model's sizes, which it handles well.
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": sizes,
    }


def _modelling_source(source: Source, sub_blocks: Sequence[SubBlock]) -> str:
    """The Python file that builds blocks of different widths; it says once what a unit is."""
    for kind in ("attention", "ffn"):
        alike = [each for each in sub_blocks if each.kind == kind]
        if len({_table(each) for each in alike}) > 1:
            raise SecateurError(
                f"The {kind} of this model has units of different shapes in different blocks, for "
                "which there is no way to store the result; choose another model."
            )
    classes = _classes(source)
    first = {each.kind: each for each in sub_blocks if each.block == 0}
    values = {
        **source.names._asdict(),
        "base": classes.model,
        "config": classes.config,
        "feed_forward": _table(first["ffn"]),
        "attention": "",
        "resize_attention": "",
    }
    if attention := first.get("attention"):
        values["attention"] = _table(attention)
        values["resize_attention"] = _RESIZE_ATTENTION.substitute(
            values, module=attention.attention, output=attention.output
        )
    body = inspect.getsource(module_sizes).split('"""', 2)[2]
    stock = "from transformers.pytorch_utils import"
    names = ", ".join(sorted({classes.config, classes.model, classes.base}))
    ours = f"from transformers import {names}\n{stock}"
    model = _MODEL.substitute(values, name=classes.model, blocks=classes.model_blocks)
    base = _MODEL.substitute(values, name=classes.base, blocks=classes.base_blocks)
    head = _DOCSTRING.substitute(values) + body.replace(stock, ours, 1)
    return f"{head}{_CLASS.substitute(values)}{base}\n{model}"


def _table(sub_block: SubBlock) -> str:
    rows = []
    for axis in sub_block.axes:
        linear, _, leaf = axis.parameter.rpartition(".")
        if leaf == "weight":
            side = "columns" if linear == sub_block.output else "rows"
            sizes = [axis.positions_UP.shape[1]]
            if sub_block.kind == "attention":
                heads = sub_block.heads_per_unit * axis.head_positions
                sizes = [axis.head_positions, sizes[0] - heads]
            rows.append(f'    ("{linear}", "{side}", {", ".join(map(str, sizes))}),\n')
    return "".join(rows)
