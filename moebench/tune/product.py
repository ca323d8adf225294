"""The products that are tuned, with tensors: how a tile of each is launched, and what the right answer is.

The answers are samples of rows, spread over all experts, in float64 and shared with no kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from moebench.point import DRAWS
from moebench.routing.patterns import choose_experts
from moebench.traffic import parse_traffic
from moebench.tune.case import DTYPES, Case

CHECKED_ROWS = 4096  # of an answer


class Product(ABC):
    """One case's tensors: what does not change, and operands and routing in rotating draws.

    Attributes:
        plans: the routing of each draw.
    """

    config_class: Any

    def __init__(self, case: Case, device: str, seed: int) -> None:
        from moebench_kernels import routing_plan

        self.case, self.device = case, device
        self.dtype: torch.dtype = getattr(torch, DTYPES[case.dtype])
        self._generator = torch.Generator(device).manual_seed(seed)
        on_host, uniform = torch.Generator().manual_seed(seed), parse_traffic("uniform")
        ids = [choose_experts(uniform, case.tokens, case.top_k, case.experts, on_host) for _ in range(DRAWS)]
        self.plans = [routing_plan(each.to(device), case.experts) for each in ids]

    def launch(self, config: Any, draw: int) -> Tensor:
        """The answer to a draw in this tile, as rows."""
        return self._launch(config, draw).flatten(0, -2)

    def answer(self, draw: int) -> tuple[Tensor, Tensor]:
        """Numbers of some rows of the answer, and these rows in float64 on the host."""
        n_rows = self._n_rows()
        numbers = torch.linspace(0, n_rows - 1, min(n_rows, CHECKED_ROWS), dtype=torch.float64).long().to(self.device)
        return numbers, self._answer(numbers, draw).cpu()

    def poison(self) -> None:
        """Fill memory of the answer's size with NaN and let go of it: what a tile leaves unwritten is no answer."""
        torch.full((self._n_rows(), self.case.n), float("nan"), dtype=self.dtype, device=self.device)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    @abstractmethod
    def _n_rows(self) -> int: ...

    @abstractmethod
    def _launch(self, config: Any, draw: int) -> Tensor: ...

    @abstractmethod
    def _answer(self, numbers: Tensor, draw: int) -> Tensor: ...


class Grouped(Product):
    """Rows times their expert's matrix, with the epilogue of the up-projection where the case has one."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        from moebench_kernels.tiles import GemmConfig

        super().__init__(case, device, seed)
        self.config_class = GemmConfig
        columns = case.maps * case.n
        shape = (case.experts, case.k, columns) if case.transpose else (case.experts, columns, case.k)
        self.weights = self._random(*shape) * case.k**-0.5
        self.rows = [self._random(case.tokens if case.gather else case.rows, case.k) for _ in self.plans]

    def _n_rows(self) -> int:
        return self.case.rows

    def _launch(self, config: Any, draw: int) -> Tensor:
        from moebench_kernels.grouped_gemm import launch_grouped_gemm

        case = self.case
        out: Tensor = launch_grouped_gemm(
            self.rows[draw], self.weights, self.plans[draw],
            gather=case.gather, transpose=case.transpose, activation=case.activation, config=config,
        )[0]  # fmt: skip
        return out

    def _answer(self, numbers: Tensor, draw: int) -> Tensor:
        from moebench_kernels.activation import activate_torch

        plan, case = self.plans[draw], self.case
        source = plan.row2token[numbers] if case.gather else numbers
        rows, expert = self.rows[draw][source.long()], plan.row2expert[numbers]
        z = rows.new_empty(len(numbers), case.maps * case.n, dtype=torch.float64)
        for e in expert.unique().tolist():
            matrix = self.weights[e].double()
            z[expert == e] = rows[expert == e].double() @ (matrix if case.transpose else matrix.T)
        answer: Tensor = activate_torch(z, case.activation) if case.activation else z
        return answer


class WeightGradient(Product):
    """The gradient of every expert's matrix, [E, k, n]: its rows of one operand times those of the other."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        from moebench_kernels.ragged_tiles import RaggedConfig

        super().__init__(case, device, seed)
        self.config_class = RaggedConfig
        self._gather = case.kind.endswith("_left"), case.kind.endswith("_right")
        heights = [case.tokens if gather else case.rows for gather in self._gather]
        self.operands = [(self._random(heights[0], case.k), self._random(heights[1], case.n)) for _ in self.plans]

    def _n_rows(self) -> int:
        return self.case.experts * self.case.k

    def _launch(self, config: Any, draw: int) -> Tensor:
        from moebench_kernels.ragged_gemm import launch_ragged_tiles

        plan = self.plans[draw]
        out: Tensor = launch_ragged_tiles(
            *self.operands[draw], plan.offsets, plan.row2assignment, plan.top_k, *self._gather, config
        )
        return out

    def _answer(self, numbers: Tensor, draw: int) -> Tensor:
        plan, case = self.plans[draw], self.case
        expert, column = numbers // case.k, numbers % case.k
        answer = torch.zeros(len(numbers), case.n, dtype=torch.float64, device=self.device)
        for e in expert.unique().tolist():
            mine, token = plan.row2expert == e, plan.row2token[plan.row2expert == e].long()
            left, right = (
                operand[token if gather else mine].double()
                for operand, gather in zip(self.operands[draw], self._gather, strict=True)
            )
            answer[expert == e] = left[:, column[expert == e]].T @ right
        return answer


def product_of(case: Case, device: str, seed: int) -> Product:
    """The case's product, with tensors."""
    return (WeightGradient if case.weight_gradient else Grouped)(case, device, seed)
