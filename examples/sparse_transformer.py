"""A transformer that knows nothing of sparsecore, made sparse in two lines and trained with a moving topology.

The task: given a sequence of tokens, name the most frequent one. Run: ``python examples/sparse_transformer.py``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparsecore

TOKENS, LENGTH, WIDTH = 16, 24, 64


class Classifier(nn.Module):
    """Somebody's model, in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids)).mean(dim=1))


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random sequences in which one token, the answer, is put into a third of the places."""
    ids = torch.randint(TOKENS, (size, LENGTH), generator=generator)
    answer = torch.randint(TOKENS, (size,), generator=generator)
    ids[:, : LENGTH // 3] = answer[:, None]
    return ids, answer


def main(steps: int = 400, density: float = 0.2) -> float:
    """Train; returns the accuracy on fresh sequences."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Classifier()

    sparsecore.sparsify(model, density, exclude="head")  # line one: before the optimizer is built
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    explorer = sparsecore.DynamicSparsity(model, optimizer, interval=20, total_steps=steps)  # line two

    for step in range(1, steps + 1):
        ids, answer = batch(64, generator)
        loss = nn.functional.cross_entropy(model(ids), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = explorer.step()
        if report is not None and step % 100 == 0:
            print(
                f"step {step}: loss {loss.item():.3f}, {report.nnz:,} sparse weights, "
                f"{report.grown - report.regrown:,} of them moved, {report.ever_active:.0%} of all places tried"
            )

    print(sparsecore.explain(model))
    model.eval()
    with torch.no_grad():
        ids, answer = batch(512, generator)
        accuracy = (model(ids).argmax(dim=1) == answer).double().mean().item()
    print(f"accuracy on fresh sequences: {accuracy:.1%} (chance {1 / TOKENS:.1%})")
    return accuracy


if __name__ == "__main__":
    main()
