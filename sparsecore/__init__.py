"""Train and serve neural models whose weights are truly sparse: index sets, not masks.

model = sparsify(model, density=0.25)
optimizer = torch.optim.Adam(model.parameters())
explorer = DynamicSparsity(model, optimizer, interval=100, total_steps=10_000)
...
optimizer.step(); explorer.step()
"""

from sparsecore import optim
from sparsecore.accounting import MacCounter, ResidentBytes, release_results, resident_bytes
from sparsecore.backends import backend
from sparsecore.errors import ConversionError, DensityError, PatternError, SparsecoreError, TopologyError
from sparsecore.explain import explain
from sparsecore.interop import split
from sparsecore.masked import MaskedSparsity, masks_of
from sparsecore.nn import (
    Graph,
    ShardedEmbedding,
    ShardedEmbeddingBag,
    SparseBias,
    SparseConv2d,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    SparseModule,
    densify,
    gather_dot,
    normalized_bipartite,
    propagate_mean,
    score_topk,
    shard_rows,
    sparsify,
    weight_parameter,
)
from sparsecore.pattern import Pattern
from sparsecore.topology.explorer import DynamicSparsity
from sparsecore.topology.init import allocate
from sparsecore.topology.ranks import broadcast_topology
from sparsecore.topology.report import ExplorationReport, LayerReport

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "DensityError",
    "DynamicSparsity",
    "ExplorationReport",
    "Graph",
    "LayerReport",
    "MacCounter",
    "MaskedSparsity",
    "Pattern",
    "PatternError",
    "ResidentBytes",
    "ShardedEmbedding",
    "ShardedEmbeddingBag",
    "SparseBias",
    "SparseConv2d",
    "SparseEmbedding",
    "SparseEmbeddingBag",
    "SparseLinear",
    "SparseModule",
    "SparsecoreError",
    "TopologyError",
    "allocate",
    "backend",
    "broadcast_topology",
    "densify",
    "explain",
    "gather_dot",
    "masks_of",
    "normalized_bipartite",
    "optim",
    "propagate_mean",
    "release_results",
    "resident_bytes",
    "score_topk",
    "shard_rows",
    "sparsify",
    "split",
    "weight_parameter",
]
