"""BPR-MF and UltraGCN against their losses written out with dense matrices; pairs' scores without their rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import nn

import sparsecore
from harness.suite.measure import peak_bytes
from recsys.errors import DataError
from recsys.models import factors
from recsys.models.base import Triples
from recsys.models.bprmf import BPRMF
from recsys.models.factors import pair_scores
from recsys.models.layers import Density
from recsys.models.losses import squared_norm
from recsys.models.ultragcn import UltraGCN, item_neighbors

pytestmark = pytest.mark.feature("models")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(users, items, density=0.2, seed=0):
    return csr_array((np.random.default_rng(seed).random((users, items)) < density).astype(np.float32))


def dense_tables(model):
    """Both tables as plain tensors, and what takes the gradient of a plain tensor at the weights that are stored."""
    tables = [table.weight.detach() for table in (model.users, model.items)]
    return [t.to_dense() if t.layout != torch.strided else t.clone() for t in tables]


def assert_gradients(model, plain):
    for table, right in zip((model.users, model.items), plain, strict=True):
        if isinstance(table, sparsecore.SparseEmbedding):
            ids = torch.arange(right.shape[0])
            right = sparsecore.ops.scatter_grad(*table.index, ids, right, table.values.shape[0])
            torch.testing.assert_close(table.values.grad, right, rtol=1e-6, atol=1e-9)
        else:
            torch.testing.assert_close(table.weight.grad, right, rtol=1e-6, atol=1e-9)


# ---- scores of pairs


@pytest.mark.parametrize("block", [None, 1, 50, 1 << 22])
@pytest.mark.parametrize("each", [1, 2, 9, 30])
def test_pair_scores_of_dense_tables_equal_the_rows_dot_products(block, each, monkeypatch):
    if block is not None:  # as on a GPU
        monkeypatch.setattr(factors, "_BLOCK", block)
        monkeypatch.setattr(factors, "_on_cpu", lambda tensor: False)
    users, items = nn.Embedding(7, 5).double(), nn.Embedding(11, 5).double()
    user_ids = torch.randint(7, (6,), generator=generator())
    item_ids = torch.randint(11, (6, each), generator=generator(1))
    out = torch.randn(6, each, dtype=torch.float64, generator=generator(2))
    results = []
    for form in (
        lambda: pair_scores(users, user_ids, items, item_ids),
        lambda: (users(user_ids).unsqueeze(1) * items(item_ids)).sum(2),
    ):
        scores = form()
        results.append((scores.detach(), *torch.autograd.grad(scores, (users.weight, items.weight), out)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_dense_pair_scores_are_counted():
    users, items = nn.Embedding(7, 5), nn.Embedding(11, 5)
    counter = sparsecore.MacCounter()
    with counter.phase("forward"):
        scores = pair_scores(users, torch.arange(6), items, torch.zeros(6, 4, dtype=torch.int64))
    with counter.phase("backward"):
        scores.sum().backward()
    assert counter.macs == {"forward": 6 * 4 * 5, "backward": 2 * 6 * 4 * 5}


def test_pair_scores_gradcheck():
    ids = torch.tensor([[0, 3, 3], [2, 0, 1]])
    rows = torch.randn(2, 4, dtype=torch.float64, generator=generator(), requires_grad=True)
    table = torch.randn(5, 4, dtype=torch.float64, generator=generator(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, t: factors._PairScores.apply(r, t, ids), (rows, table))


def test_pair_scores_of_nobody():
    users, items = nn.Embedding(3, 4), nn.Embedding(5, 4)
    scores = pair_scores(
        users, torch.empty(0, dtype=torch.int64), items, torch.empty(0, 7, dtype=torch.int64)
    )
    scores.sum().backward()
    assert scores.shape == (0, 7)
    assert not items.weight.grad.any()


# ---- BPR-MF


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_bprmf_equals_its_loss_written_out(density):
    model = BPRMF((6, 9), 8, regularization=0.1, density=density, generator=generator()).double()
    u, v = (t.requires_grad_() for t in dense_tables(model))
    batch = Triples(torch.tensor([0, 5, 5]), torch.tensor([1, 0, 8]), torch.tensor([3, 3, 1]))
    rows = u[batch.users], v[batch.positives], v[batch.negatives]
    plain = F.softplus((rows[0] * (rows[2] - rows[1])).sum(1)).mean()
    plain = plain + 0.1 / 2 * sum(r.square().sum() for r in rows) / 3
    loss = model.loss(batch, 0)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    loss.backward()
    plain.backward()
    assert_gradients(model, (u.grad, v.grad))


# ---- UltraGCN


def plain_ultragcn(
    u, v, train, batch, *, negative_weight, item_weight, regularization, w, neighbors, offset=0.0
):
    """The loss by its formula, one interaction at a time."""
    r = train.toarray().astype(np.float64)
    d_u, d_i = r.sum(1), r.sum(0)
    together = r.T @ r
    d = together.sum(1)
    total = regularization / 2 * (u.square().sum() + v.square().sum())
    for user, item, drawn in zip(
        batch.users.tolist(), batch.positives.tolist(), batch.negatives.tolist(), strict=True
    ):
        scores = v @ u[user] + offset
        beta = np.sqrt(d_u[user] + 1) / d_u[user] / np.sqrt(d_i + 1)
        total = total + (w[0] + w[1] * beta[item]) * F.softplus(-scores[item])
        for j in drawn:
            share = negative_weight / len(drawn) * (w[2] + w[3] * beta[j])
            total = total + share * F.softplus(scores[j])
        omega = together[item] * np.sqrt(d[item] + 1) / d[item] / np.sqrt(d + 1)
        for k in np.argsort(-omega, kind="stable")[:neighbors]:
            total = total + item_weight * omega[k] * F.softplus(-scores[k])
    return total


def plain_prior(train, negative_weight, w):
    """The one score of all pairs with the smallest loss, from the weights of all pairs, one by one."""
    r = train.toarray().astype(np.float64)
    d_u, d_i = r.sum(1), r.sum(0)
    positive = negative = 0.0
    for user, item in zip(*r.nonzero(), strict=True):
        beta = np.sqrt(d_u[user] + 1) / d_u[user] / np.sqrt(d_i + 1)
        positive += w[0] + w[1] * beta[item]
        negative += negative_weight * np.mean(w[2] + w[3] * beta)
    return np.log(positive / negative)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("neighbors", [0, 3])
@pytest.mark.parametrize("offset", ["none", "prior"])
def test_ultragcn_equals_its_loss_written_out(density, neighbors, offset):
    train = random_matrix(12, 10, 0.5)
    settings = {"negative_weight": 30.0, "item_weight": 0.7, "regularization": 0.02}
    model = UltraGCN(
        train, 6, 4, **settings, w1=0.1, w2=0.9, w3=0.2, w4=0.8, neighbors=neighbors, init_std=0.5, offset=offset,
        density=density, generator=generator(),
    ).double()  # fmt: skip
    u, v = (t.requires_grad_() for t in dense_tables(model))
    batch = Triples(
        torch.tensor([0, 3, 3]), torch.tensor([1, 0, 8]), torch.randint(10, (3, 4), generator=generator(1))
    )
    w = (0.1, 0.9, 0.2, 0.8)
    c = plain_prior(train, 30.0, w) if offset == "prior" else 0.0
    assert model.offset == pytest.approx(c, rel=1e-12)
    plain = plain_ultragcn(u, v, train, batch, **settings, w=w, neighbors=neighbors, offset=c)
    loss = model.loss(batch, 0)
    # Degrees and omega were stored in float32 before the model became float64.
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    loss.backward()
    plain.backward()
    for table, right in zip((model.users, model.items), (u.grad, v.grad), strict=True):
        grad = sparsecore.weight_parameter(table).grad
        if isinstance(table, sparsecore.SparseEmbedding):
            ids = torch.arange(right.shape[0])
            right = sparsecore.ops.scatter_grad(*table.index, ids, right, table.values.shape[0])
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_ultragcn_without_an_offset_is_to_the_bit_what_it_is_in_the_paper(density):
    model = UltraGCN(random_matrix(12, 10, 0.5), 6, 2, init_std=0.5, density=density, generator=generator())
    batch = Triples(torch.tensor([0, 3]), torch.tensor([1, 8]), torch.tensor([[2, 5], [1, 9]]))
    w1, w2, w3, w4 = model.weights
    similar, omega = (of_items[batch.positives] for of_items in model.similar_items())
    items = torch.cat((batch.positives.unsqueeze(1), batch.negatives, similar), dim=1)
    scores = pair_scores(model.users, batch.users, model.items, items)
    beta = model.user_beta[batch.users].unsqueeze(1) * model.item_beta[items[:, :3]]
    chosen = (w1 + w2 * beta[:, :1]) * F.softplus(-scores[:, :1])
    drawn = (w3 + w4 * beta[:, 1:]) * F.softplus(scores[:, 1:3])
    alike = omega * F.softplus(-scores[:, 3:])
    norms = sum(squared_norm(sparsecore.weight_parameter(t)) for t in (model.users, model.items))
    total = chosen.sum() + model.negative_weight * drawn.mean(dim=1).sum() + model.item_weight * alike.sum()
    assert model.offset == 0
    assert torch.equal(model.loss(batch, 0), total + model.regularization / 2 * norms)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_ultragcn_ranks_and_serves_without_its_offset(density):
    train = random_matrix(12, 10, 0.5)
    plain, offset = (
        UltraGCN(train, 6, init_std=0.5, offset=kind, density=density, generator=generator())
        for kind in ("none", "prior")
    )
    assert offset.offset < -1
    assert plain.state_dict().keys() == offset.state_dict().keys()
    users = np.arange(12)
    assert torch.equal(plain.score(users, train), offset.score(users, train))


@pytest.mark.parametrize("settings", [{"negative_weight": 0.0}, {"w1": 0.0, "w2": 0.0}])
def test_ultragcn_has_no_offset_where_one_side_has_no_weight(settings):
    assert UltraGCN(random_matrix(12, 10, 0.5), 6, **settings, offset="prior").offset == 0


def test_ultragcn_has_no_offset_without_interactions():
    assert UltraGCN(csr_array((3, 4), dtype=np.float32), 6, offset="prior").offset == 0


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_ultragcn_never_holds_the_rows_of_its_negatives(density):
    batch, negatives, dim = 128, 1600, 64
    model = UltraGCN(random_matrix(200, 300), dim, negatives, density=density, generator=generator())
    ids = torch.randint(200, (batch,), generator=generator())
    chosen = torch.randint(300, (batch, negatives), generator=generator())

    def step():
        model.zero_grad()
        model.loss(Triples(ids, ids, chosen), 0).backward()

    step()
    # Blocks of them, and what is as large as the scores.
    assert peak_bytes(step) < 4 * batch * negatives * dim / 4


@pytest.mark.parametrize("products", [1, 30, 1 << 24])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_item_neighbors_are_those_of_the_dense_matrix(products, count, monkeypatch):
    monkeypatch.setattr("recsys.models.neighbors._PRODUCTS", products)
    train = random_matrix(20, 10, 0.15, seed=3)
    train = csr_array(np.pad(train.toarray(), ((0, 1), (0, 1))))  # a user and an item that nobody has chosen
    similar, omega = item_neighbors(train, count)
    together = train.toarray().T.astype(np.float64) @ train.toarray()
    d = together.sum(1)
    weight = together * np.sqrt(d + 1)[:, None] / np.maximum(d, 1)[:, None] / np.sqrt(d + 1)
    for item in range(11):
        order = np.argsort(-weight[item], kind="stable")
        order = order[weight[item, order] > 0][:count]
        n = len(order)
        assert similar[item, :n].tolist() == order.tolist()
        assert omega[item, :n] == pytest.approx(weight[item, order], rel=1e-12)
        assert (similar[item, n:] == item).all()
        assert not omega[item, n:].any()


def test_item_neighbors_of_nothing():
    similar, omega = item_neighbors(csr_array((3, 4), dtype=np.float32), 2)
    assert similar.tolist() == [[i, i] for i in range(4)]
    assert not omega.any()


def test_ultragcn_batches_hold_every_interaction_once(tiny):
    model = UltraGCN(tiny.train, 4, negatives=5)
    batches = list(model.batches(tiny, 100, generator(3)))
    assert len(batches) == model.steps_per_epoch(tiny, 100)
    users, positives = (torch.cat([getattr(b, name) for b in batches]) for name in ("users", "positives"))
    assert (csr_array((np.ones(len(users)), (users, positives)), tiny.train.shape) != tiny.train).nnz == 0
    drawn = torch.cat([b.negatives for b in batches])
    assert drawn.shape == (tiny.n_interactions, 5)
    assert set(drawn.unique().tolist()) == set(range(tiny.train.shape[1]))
    again = list(model.batches(tiny, 100, generator(3)))
    assert all(torch.equal(a.negatives, b.negatives) for a, b in zip(batches, again, strict=True))
    other = next(model.batches(tiny, 100, generator(4)))
    assert not torch.equal(other.users, batches[0].users)


# ---- both


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("kind", [lambda t, **o: BPRMF(t.shape, 4, **o), lambda t, **o: UltraGCN(t, 4, **o)])
def test_scores_are_dot_products_of_known_users(kind, density):
    train = random_matrix(8, 10)
    model = kind(train, density=density, generator=generator())
    u, v = dense_tables(model)
    scores = model.score(np.array([2, 0]), train[[2, 0]])
    torch.testing.assert_close(scores, u[[2, 0]] @ v.T, rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match=r"8 users .* multvae, sasrec, ease"):
        model.score(np.array([0, -1]), train[[0, 1]])


@pytest.mark.parametrize("include", [("users",), ("items",)])
def test_one_table_sparse_and_one_dense_score_as_plain_tensors(include):
    model = BPRMF((7, 11), 6, density=Density(0.5, include), generator=generator()).double()
    users, items = (table.requires_grad_() for table in dense_tables(model))
    user_ids = torch.randint(7, (6,), generator=generator(1))
    item_ids = torch.randint(11, (6, 3), generator=generator(2))
    scores = pair_scores(model.users, user_ids, model.items, item_ids)
    expected = (users[user_ids].unsqueeze(1) * items[item_ids]).sum(2)
    torch.testing.assert_close(scores, expected)
    scores.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(model, (users.grad, items.grad))
    everybody = model.score(np.arange(7), csr_array((7, 11)))
    torch.testing.assert_close(everybody, (users @ items.T).detach())


def test_products_are_dot_products_and_counted() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    chosen = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(factors.products(rows, chosen), torch.einsum("bd,bmd->bm", rows, chosen))
    assert torch.autograd.gradcheck(factors.products, (rows, chosen))
    counter = sparsecore.MacCounter()
    with counter.phase("forward"):
        out = factors.products(rows, chosen)
    with counter.phase("backward"):
        out.sum().backward()
    assert counter.macs == {"forward": 5 * 3 * 7, "backward": 2 * 5 * 3 * 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_products(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 7, dtype=dtype, generator=generator(), requires_grad=True)
    chosen = torch.randn(5, 3, 7, dtype=dtype, generator=generator(1), requires_grad=True)
    operators = torch.ops.recsys
    torch.library.opcheck(operators.dense_products.default, (rows, chosen))
    given = (torch.ones(5, 3, dtype=dtype), rows.detach(), chosen.detach())
    torch.library.opcheck(operators.dense_products_grad.default, given)


@pytest.mark.parametrize("each", [4, 30], ids=["sampled products", "more than the table has"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["on a CPU", "as on a GPU"])
def test_opcheck_of_pair_scores(each: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_on_cpu", lambda tensor: on_cpu)
    rows = torch.randn(6, 5, generator=generator())
    table = torch.randn(11, 5, generator=generator(1))
    ids = torch.randint(11, (6, each), generator=generator(2))
    torch.library.opcheck(torch.ops.recsys.dense_pair_scores.default, (rows, table, ids))
