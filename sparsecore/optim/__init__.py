"""torch's element-wise optimizers, aware of sparse weights: one pass over values, gradient and state on the CPU.

Defaults, update rules, state names, state dicts and arguments (without amsgrad, maximize, capturable, differentiable,
foreach and fused) are those of ``torch.optim``: either kind loads what the other saved, and dense parameters are as
welcome as values of sparse weights. On other devices and types torch's own implementation runs. What is more:

* **Lazy updates.** A ``torch.sparse_coo`` gradient (of ``SparseEmbedding(sparse=True)``, ``nn.Embedding(sparse=True)``)
  updates the elements that it names and their state, and reads nothing else: a step costs what the batch touched. As
  in ``torch.optim.SparseAdam``, moments and weight decay of an element move only in steps that touch it; the rule for
  those is Adam's own (``SparseAdam`` adds eps before the bias correction, Adam after it).
* **Updates in the backward pass** (``in_backward=True``). The gradient of a ``SparseEmbedding(sparse=True)`` is used as
  soon as it is known and never becomes a tensor: ``values.grad`` stays None, ``step()`` has nothing to do for these
  tables, and a training step is shorter. It is the lazy update of each lookup (or ``gather_dot``) by itself: a table
  that is looked up twice in a step is updated twice, and there is nothing to accumulate, to clip, to unscale after a
  loss that was scaled, or to average over processes, and a checkpointed segment that is computed again would look up
  rows that a later one has updated already: use ``step()`` for those. ``torch.autograd.grad`` and
  ``backward(inputs=..)`` update no table that they do not name.
* **Counting steps per weight** (``Adam`` and ``AdamW``, ``per_weight_step=True``). A weight that has just been grown
  begins with empty moments; corrected by the global step they are taken at face value, and its first step is
  ``(1 - beta1) / sqrt(1 - beta2)``, 3.2 times what Adam's first step should be. With a count of its own it starts anew.
* **Averages of weights** over steps (`AveragedModel`), whose index sets follow those of the model.
"""

from sparsecore.optim.adagrad import Adagrad
from sparsecore.optim.adam import Adam, AdamW
from sparsecore.optim.averaging import AveragedModel
from sparsecore.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "AveragedModel"]
