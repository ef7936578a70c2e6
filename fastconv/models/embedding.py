"""A feature space of chosen width before a classifier's scores."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def with_embedding(model: nn.Module, units: int) -> nn.Module:
    """The same model, its last Linear(n, classes) replaced in place by two: `embedding` to `units`, `scores` to the classes.

    A space of 2 units can be drawn: each image a point, each class a cloud. So the LeNets++ of Wen, Zhang, Li and Qiao
    (2016, "A Discriminative Feature Learning Approach for Deep Face Recognition") show what centre loss makes of MNIST. No
    activation stands between the two, so that clouds may lie all around the origin.

    The last layer is the last one with parameters in the order of `model.modules()`. At its place there is a Sequential,
    whose embedding has 'embedding' at the end of its name in `named_modules()`. Both Linears are initialised anew, as torch
    does, by its global seed, with the dtype, device and bias of the one replaced. A model with a forward of its own gets its
    embedding before `fastconv.convert`, which writes that forward for the layers it finds.

    Raises:
        ValueError: units below 1, or the last layer with parameters is no Linear within the model.
    """
    if units < 1:
        raise ValueError(f"with_embedding: units must be at least 1, got units={units}")
    with_parameters = [path for path, layer in model.named_modules() if any(True for _ in layer.parameters(recurse=False))]
    path = with_parameters[-1] if with_parameters else ""
    last = model.get_submodule(path)
    if type(last) is not nn.Linear or not path:
        where = f"{path}, a {type(last).__name__}" if path else f"the {type(last).__name__} itself"
        raise ValueError(f"with_embedding: a model must end in a Linear inside of it; the last layer of this one is {where}")
    owner, _, name = path.rpartition(".")
    bias, device, dtype = last.bias is not None, last.weight.device, last.weight.dtype
    head = nn.Sequential(
        OrderedDict(
            embedding=nn.Linear(last.in_features, units, bias, device, dtype),
            scores=nn.Linear(units, last.out_features, bias, device, dtype),
        )
    )
    setattr(model.get_submodule(owner), name, head.train(last.training))
    return model
