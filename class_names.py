"""Class names: those of a network, those of the data, and how one is matched to the other."""

import re

from timm.data import ImageNetInfo

from models import ModelError


def of_network(network):
    """The class names of an exported network, by class id; None where its folder does not name them all."""
    names = network.model.pretrained_cfg.get("label_names")
    if not isinstance(names, (dict, list, tuple)):
        return None
    if isinstance(names, dict):  # timm also takes {id: name}
        names = [names.get(str(i)) for i in range(len(names))]
    if not names or len(names) != network.model.num_classes:
        return None
    return list(names) if all(isinstance(name, str) for name in names) else None


def match(known, wanted):
    """For each name in `wanted` its class id in a network with the class names `known`, a list by class id.

    ImageNet's 1,000 classes are the same by WNID, by description and by number (ImageNet-V2). Raises
    ModelError, which lists the differences, where the network lacks a class.
    """
    known, wanted = _as_wnids(known), _as_wnids(wanted)
    if known == wanted:
        return list(range(len(known)))
    ids = {name: i for i, name in enumerate(known)}
    missing = [name for name in wanted if name not in ids]
    if not missing and len(ids) == len(known):
        return [ids[name] for name in wanted]

    found = f"the network has {len(known)} classes, the data {len(wanted)}"
    if len(ids) < len(known):
        raise ModelError(f"{found}, and they cannot be matched by name: the network has a name twice")
    extra = sorted(set(known) - set(wanted))
    raise ModelError(f"{found}; only in the data: {_listed(missing)}; only in the network: {_listed(extra)}")


def check_same(known, wanted, owner):
    """ModelError unless `wanted`, the data's class names, are those that `owner` knows, in the same order."""
    try:
        ids = match(known, wanted)
    except ModelError as error:
        raise ModelError(f"{owner} and the data have different classes: {error}") from error
    for i, other in enumerate(ids):
        if i != other:
            raise ModelError(
                f"{owner} and the data have their classes in different orders: {wanted[i]!r} is number {i} "
                f"in the data, {other} in {owner}"
            )


def _as_wnids(names):
    """ImageNet's 1,000 classes in their order as WNIDs, however they are written; other names unchanged."""
    if len(names) != 1000:
        return list(names)
    imagenet = ImageNetInfo()
    pairs = zip(names, imagenet.label_descriptions(), strict=True)
    described = sum(_first_term(name) == _first_term(expected) for name, expected in pairs)
    numbered = list(names) == [str(i) for i in range(1000)]
    return list(imagenet.label_names()) if numbered or described > 900 else list(names)


def _first_term(description):
    """ "crane" of "crane (bird)" and of "crane, bird": other people's lists add other synonyms."""
    return re.split(r",| \(", description)[0]


def _listed(names):
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(map(repr, names[:10])) or "none") + more
