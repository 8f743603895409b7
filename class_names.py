"""Class names: those of a network, those of the data, their ids, and how one is matched to the other."""

import itertools
import re

from timm.data import ImageNetInfo

from folders import DataError

SHOWN = 10  # names in an error message


def of_network(network):
    """The class names of an exported network, by class id; None where its folder does not name them all."""
    names = network.model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):  # timm also takes {id: name}
        names = [names.get(str(i)) for i in range(len(names))]
    if not isinstance(names, (list, tuple)) or len(names) != network.model.num_classes:
        return None
    return list(names) if all(isinstance(name, str) for name in names) else None


def class_ids(names, classes):
    """The class id of each of a source's label names.

    Numbers mean themselves ("0" to K - 1, or some of ImageNet's, as in ImageNet-V2): sorted as text, "10"
    would come before "2". WNIDs get their places among ImageNet's 1,000, so that a folder with a part of the
    classes fits. Other names are numbered in their order. Raises DataError for another number of classes than
    `classes`, and for ImageNet's in another order.
    """
    numbers = [int(name) for name in names if re.fullmatch(r"[0-9]{1,9}", name)]
    distinct = len({number for number in numbers if number < classes}) == len(names)
    if distinct and classes in (1000, len(names)):
        return numbers
    if classes == 1000 and (ids := _in_imagenet(names)):
        return ids
    if len(names) != classes:
        raise DataError(f"{len(names)} classes found, the recipe's data.classes is {classes}")
    return list(range(classes))


def _in_imagenet(names):
    """The class ids of names that are WNIDs, or ImageNet's 1,000 descriptions; None for other names."""
    imagenet = ImageNetInfo()
    ids = {wnid: i for i, wnid in enumerate(imagenet.label_names())}
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        if unknown := [name for name in names if name not in ids]:
            raise DataError(f"not among ImageNet's 1,000 classes: {_listed(unknown)}")
        return [ids[name] for name in names]

    terms = [_first_term(name) for name in names]
    expected = [_first_term(description) for description in imagenet.label_descriptions()]
    if len(terms) != 1000 or len(set(terms) & set(expected)) <= 900:
        return None
    for i, (term, wanted) in enumerate(zip(terms, expected, strict=True)):
        if term != wanted and term in expected:  # a teacher's answers would all be wrong
            raise DataError(f"class {i} is {term!r}, ImageNet's is {wanted!r}: not the order of the WNIDs")
    return list(range(1000))


def _first_term(description):
    """ "crane" of "crane (bird)" and of "crane, bird": other people's lists add other synonyms."""
    return re.split(r",| \(", description)[0]


def match(known, wanted):
    """For each name in `wanted` its class id in a network with the class names `known`, a list by class id.

    ImageNet's 1,000 classes are the same by WNID, by description and by number (ImageNet-V2). Raises
    DataError, which lists the differences, where the network lacks a class.
    """
    known, wanted = _as_wnids(known), _as_wnids(wanted)
    ids = {name: i for i, name in enumerate(known)}
    if len(ids) == len(known) and ids.keys() >= set(wanted):
        return [ids[name] for name in wanted]
    check_same(known, wanted, "the network")
    return list(range(len(known)))  # equal, with a name twice


def check_same(names, others, owner, other_owner="the data"):
    """DataError, which lists the differences, unless two lists of names are the same classes in one order."""
    names, others = _as_wnids(names), _as_wnids(others)
    only = {owner: set(names) - set(others), other_owner: set(others) - set(names)}
    found = [f"only in {whose}: {_listed(sorted(extra))}" for whose, extra in only.items() if extra]
    for i, (name, other) in enumerate(itertools.zip_longest(names, others)):
        if name != other and not found:
            found = [f"class {i} is {name!r} in {owner}, {other!r} in {other_owner}"]
    if found:
        raise DataError(f"{owner} and {other_owner} have other classes: {'; '.join(found)}")


def _as_wnids(names):
    """ImageNet's 1,000 classes as WNIDs, however they are written; other names unchanged."""
    if len(names) != 1000:
        return list(names)
    wnids = ImageNetInfo().label_names()
    ids = range(1000) if list(names) == [str(i) for i in range(1000)] else _in_imagenet(names)
    return [wnids[i] for i in ids] if ids else list(names)


def _listed(names):
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
