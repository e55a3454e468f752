"""Interactions in, training matrix and evaluation users out: `load(name)` is the one door."""

from recsys.data.dataset import Dataset, EvalSet, Oracle
from recsys.data.loaders import available, load
from recsys.data.split import SplitOptions
from recsys.data.synthetic import synthetic

__all__ = ["Dataset", "EvalSet", "Oracle", "SplitOptions", "available", "load", "synthetic"]
