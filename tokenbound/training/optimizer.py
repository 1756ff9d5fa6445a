"""Optimizers: AdamW, and Muon with float32 Newton-Schulz iterations.

`torch.optim.Muon` orthogonalises in bfloat16, which processors without bfloat16 units emulate slowly; this one keeps
float32 and orthogonalises all matrices of one shape in a single batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tokenbound.config.run import TrainingConfig

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz coefficients of Jordan et al. 2024 (Muon): fast growth of small singular values."""


def orthogonalise(gradients: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factors of a stack of matrices, float32 [n, rows, columns] -> the same shape.

    Source: the Newton-Schulz iteration of Muon (Jordan et al. 2024, arXiv 2502.16982 section 2).
    """
    a, b, c = _COEFFICIENTS
    x = gradients.mT if gradients.shape[-2] > gradients.shape[-1] else gradients
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if gradients.shape[-2] > gradients.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised, for the inner matrices of a network; of a stack each matrix alone.

    The update's root mean square is matched to AdamW's (0.2 * sqrt(max(rows, columns)), arXiv 2502.16982 equation 4).
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                scale = -group["lr"] * 0.2 * max(shape[-2:]) ** 0.5
                steps = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                updates = orthogonalise(steps.view(-1, *shape[-2:])).view_as(steps)
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=scale)
        return loss

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of one parameter's gradient."""
        assert parameter.grad is not None
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Trainable inner matrices, and everything else (embeddings, tied heads, norms, biases)."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim in (2, 3) and min(p.shape[-2:]) > 1 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trainable if id(p) not in chosen]


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run. Weight decay acts on the inner matrices alone."""
    matrices, rest = split_parameters(model)
    if config.optimizer == "muon" and matrices:
        muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay)
        if not rest:  # of an adapter
            return [muon]
        return [muon, torch.optim.AdamW(rest, lr=config.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    groups = [
        {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": rest, "lr": config.embedding_lr, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
