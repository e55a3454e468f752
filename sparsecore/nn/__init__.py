"""Modules with sparse weights, and the conversion of models to and from them."""

from sparsecore.nn.base import SparseModule, weight_parameter
from sparsecore.nn.bias import SparseBias
from sparsecore.nn.conv import SparseConv2d
from sparsecore.nn.convert import densify, sparsify
from sparsecore.nn.dot import gather_dot
from sparsecore.nn.embedding import SparseEmbedding, SparseEmbeddingBag
from sparsecore.nn.graph import Graph, normalized_bipartite, propagate_mean
from sparsecore.nn.linear import SparseLinear
from sparsecore.nn.sharded import ShardedEmbedding, ShardedEmbeddingBag, shard_rows
from sparsecore.nn.topk import score_topk

__all__ = [
    "Graph",
    "ShardedEmbedding",
    "ShardedEmbeddingBag",
    "SparseBias",
    "SparseConv2d",
    "SparseEmbedding",
    "SparseEmbeddingBag",
    "SparseLinear",
    "SparseModule",
    "densify",
    "gather_dot",
    "normalized_bipartite",
    "propagate_mean",
    "score_topk",
    "shard_rows",
    "sparsify",
    "weight_parameter",
]
