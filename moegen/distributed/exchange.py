"""Which rows go where, and how results are added up: the arithmetic of indices and of sums, without communication.

A choice is a token with one of its K experts. Choices travel sorted by rank, then token, then expert; a token's row travels once
to each rank that holds one of its experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .placement import Placement


class Outgoing(NamedTuple):
    """What one rank sends, and where the results will be.

    rows int64 [N]: the token of each row; notes int32 [T*K, 3]: of each choice its row among those to the same rank, the expert as
    its rank numbers it, and the bits of its float32 weight; row_counts, choice_counts: of each rank; position int64 [T, K]:
    the place of each choice among the notes, by ascending expert; row_of int64 [T*K]: the row of each choice, among all;
    weights float32 [T, K], by ascending expert.
    """

    rows: torch.Tensor
    notes: torch.Tensor
    row_counts: list[int]
    choice_counts: list[int]
    position: torch.Tensor
    row_of: torch.Tensor
    weights: torch.Tensor


class Directory:
    """Where the experts are.

    Args:
        placement: of all experts.
        device: where the tokens are.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.ranks = placement.ranks
        homes = [(rank, slot) for rank, held in enumerate(placement.held) for slot in range(len(held))]
        ordered = sorted(zip((e for held in placement.held for e in held), homes, strict=True))
        self.rank_of = torch.tensor([home[0] for _, home in ordered], device=device)
        self.slot_of = torch.tensor([home[1] for _, home in ordered], device=device)

    def outgoing(self, ids: torch.Tensor, weights: torch.Tensor) -> Outgoing:
        """Sorts the choices of some tokens.

        Args:
            ids: int64 [T, K] in [0, E).
            weights: float32 [T, K].
        """
        tokens, top_k = ids.shape
        by_expert = ids.argsort(dim=1, stable=True)
        ids, weights = ids.gather(1, by_expert), weights.gather(1, by_expert)
        owner = self.rank_of[ids].reshape(-1)
        order = owner.argsort(stable=True)
        owner, token = owner[order], order // max(top_k, 1)
        first = torch.ones_like(owner, dtype=torch.bool)
        first[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
        row_of = first.cumsum(0) - 1
        row_counts = torch.bincount(owner[first], minlength=self.ranks)
        before = row_counts.cumsum(0) - row_counts
        slots, bits = self.slot_of[ids].reshape(-1)[order], weights.reshape(-1)[order].view(torch.int32)
        notes = torch.stack([(row_of - before[owner]).int(), slots.int(), bits], dim=1)
        to_each, of_each = torch.stack([row_counts, torch.bincount(owner, minlength=self.ranks)]).tolist()
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        return Outgoing(token[first], notes, to_each, of_each, position.view(tokens, top_k), row_of, weights)


class Incoming(NamedTuple):
    """Choices for this rank's experts, of all ranks: row int64 [C], expert int64 [C], weight float32 [C]."""

    row: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor


def incoming(notes: torch.Tensor, row_counts: list[int], choice_counts: list[int]) -> Incoming:
    """What the notes [C, 3] of all ranks say, with rows counted over all ranks."""
    device = notes.device
    first = torch.tensor([0, *row_counts[:-1]], device=device).cumsum(0)
    before = first.repeat_interleave(torch.tensor(choice_counts, device=device), output_size=len(notes))
    return Incoming(notes[:, 0] + before, notes[:, 1].long(), notes[:, 2].contiguous().view(torch.float32))


def within_capacity(expert: torch.Tensor, capacity: int) -> torch.Tensor:
    """bool [C]: the first `capacity` choices of each expert by position, which is by rank and token."""
    order = expert.argsort(stable=True)
    ordered = expert[order]
    at = torch.arange(len(order), device=order.device)
    kept = torch.empty_like(ordered, dtype=torch.bool)
    kept[order] = at - torch.searchsorted(ordered, ordered) < capacity
    return kept


def by_row(choices: Incoming, kept: torch.Tensor | None, rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The choices of each row, by ascending expert: index int64 [rows, K], -1 for none, and weights float32 [rows, K]."""
    at = torch.arange(len(choices.row), device=choices.row.device)
    nth = at - torch.searchsorted(choices.row, choices.row)
    index = at.new_full((rows, top_k), -1)
    weights = choices.weight.new_zeros((rows, top_k))
    index[choices.row, nth] = at if kept is None else torch.where(kept, at, -1)
    weights[choices.row, nth] = choices.weight
    return index, weights


def add_up(sums: torch.Tensor, results: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None, complete: bool) -> None:
    """sums[t] += weights[t, k] * results[index[t, k]], one k after the other, each a fused multiply-add where torch has one.

    Args:
        sums: float32 [T, H].
        results: [N, H] of any float type.
        index: int64 [T, K], -1 for what is not there.
        weights: float32 [T, K]; None for ones.
        complete: whether everything is there.
    """
    one = sums.new_ones(1, 1)
    for k in range(index.shape[1]):
        factors = one if weights is None else weights[:, k : k + 1]
        if complete:
            sums.addcmul_(factors, results[index[:, k]].float())
            continue
        there = (index[:, k] >= 0).nonzero().squeeze(1)
        factors = factors if weights is None else factors[there]
        sums[there] = sums[there].addcmul_(factors, results[index[there, k]].float())
