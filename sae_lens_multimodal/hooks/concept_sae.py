"""An SAE-Lens architecture for concept dictionaries: a token is encoded by the non-negative lasso on the concepts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from torch import Tensor

logger = logging.getLogger(__name__)

ARCHITECTURE = "concept_dictionary"
_CHUNK_TOKENS = 4096
_CHUNK_SYSTEMS = 1 << 22
"""Numbers in the linear systems that are solved at once."""

Encoder: TypeAlias = Literal["lasso", "nearest"]
"""`lasso`: argmin of ½‖x - vU‖² + l1 Σv over v ≥ 0. `nearest`: of the nearest concept its share of x, of others 0."""


@torch.no_grad()
def nonnegative_codes(
    scores: Float[Tensor, "n k"],
    gram: Float[Tensor, "k k"],
    *,
    l1: float = 0.0,
    n_sweeps: int = 200,
    start: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, "n k"]:
    """Minimise ½‖x - vU‖² + l1 Σv over v ≥ 0 for every row by coordinate descent, given xUᵀ and UUᵀ only.

    Sweeps over the concepts, each concept for all rows at once; they end early only where no code of any row moves any
    more, so that a row's code does not depend on the rows beside it.

    Args:
        scores: xUᵀ.
        gram: UUᵀ.
        l1: weight of the codes' sum.
        n_sweeps: how often at most every concept's code is set to its optimum, the others held.
        start: codes to begin with; none: zeros.

    Example:
        >>> nonnegative_codes(torch.tensor([[3.0, -1.0]]), torch.eye(2), l1=0.5).tolist()
        [[2.5, 0.0]]
    """
    sizes = gram.diagonal().tolist()
    codes = torch.zeros_like(scores.T) if start is None else start.T.to(scores).clone()
    codes = codes.contiguous()
    slopes = (scores.T - l1 - gram @ codes).contiguous()
    columns = list(gram.unbind(1))
    still = 8 * torch.finfo(codes.dtype).eps
    for _ in range(n_sweeps):
        before = codes.clone()
        for concept, size in enumerate(sizes):
            if size <= 0:
                continue
            now = codes[concept]
            step = torch.add(now, slopes[concept], alpha=1 / size).clamp_min_(0).sub_(now)
            now.add_(step)
            slopes.addr_(columns[concept], step, alpha=-1)
        if not codes.numel() or bool((codes - before).abs().amax() <= still * codes.amax()):
            break
    return codes.T.contiguous()


@torch.no_grad()
def optimal_codes(
    scores: Float[Tensor, "n k"],
    gram: Float[Tensor, "k k"],
    *,
    l1: float = 0.0,
    n_sweeps: int = 200,
    start: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, "n k"]:
    """Solve the same to the end: rows that coordinate descent leaves short of the optimum are finished exactly.

    It creeps where concepts nearly or wholly depend on one another, as they must where there are more of them than
    dimensions. There the best code need not be the only one; one of the best is given.

    Example:
        >>> codes = optimal_codes(torch.tensor([[2.0, 2.0]]), torch.ones(2, 2), l1=0.5)
        >>> float(codes.sum())
        1.5
    """
    codes = nonnegative_codes(scores, gram, l1=l1, n_sweeps=n_sweeps, start=start)
    slack = 4096 * torch.finfo(codes.dtype).eps ** 0.75
    left = _shortfall(codes, scores, gram, l1) > slack
    if not bool(left.any()):
        return codes
    rows = left.nonzero()[:, 0]
    for part in rows.split(max(1, _CHUNK_SYSTEMS // gram.numel())):
        finished = _active_set(scores[part] - l1, gram, codes[part])
        before, after = (_shortfall(one, scores[part], gram, l1) for one in (codes[part], finished))
        codes[part] = torch.where((after < before)[:, None], finished, codes[part])
    worst = float(_shortfall(codes, scores, gram, l1).max())
    if worst > slack:
        logger.warning(
            "the activations of %d of %d tokens are not quite optimal (by %.1e of the largest gradient); %d concepts "
            "depend on one another too much",
            int((_shortfall(codes, scores, gram, l1) > slack).sum()),
            len(codes),
            worst,
            len(gram),
        )
    return codes


def _shortfall(codes: Tensor, scores: Tensor, gram: Tensor, l1: float) -> Tensor:
    """How far each row is from the conditions of the optimum: no slope where a code is, none below 0 elsewhere."""
    slopes = codes @ gram - scores + l1
    wrong = torch.where(codes > 0, slopes.abs(), (-slopes).clamp_min(0)).amax(1)
    return wrong / scores.abs().amax(1).clamp_min(max(l1, torch.finfo(codes.dtype).tiny))


def _active_set(linear: Tensor, gram: Tensor, codes: Tensor) -> Tensor:
    """Minimise ½ v G v - linear · v over v ≥ 0 for every row, from codes nearby (Lawson and Hanson 1974, in batches).

    In every round each row either goes to the optimum of the concepts in use, as far as none of them falls below 0,
    or, where it is there, takes up the concept that would gain most.
    """
    # A little of the identity makes every system solvable; it moves the optimum by less than is asked for.
    ridge = torch.finfo(gram.dtype).eps ** 0.65 * float(gram.diagonal().max())
    steady = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scale = linear.abs().amax(1).clamp_min(torch.finfo(gram.dtype).tiny)
    used = codes > 0
    codes, running = codes.clone(), torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    for _ in range(6 * len(gram)):
        mask = used.to(gram.dtype)
        system = mask[:, :, None] * steady * mask[:, None, :] + torch.diag_embed(1 - mask)
        wanted = torch.linalg.solve(system, (linear * mask)[:, :, None])[:, :, 0] * mask
        falls = used & (wanted < 0)
        share = torch.where(falls, codes / (codes - wanted).clamp_min(torch.finfo(gram.dtype).tiny), torch.inf)
        step, blocking = share.min(dim=1)
        stays = running[:, None]
        moved = codes + step.clamp_max(1)[:, None] * (wanted - codes)
        codes = torch.where(stays, moved.clamp_min(0) * mask, codes)
        blocked = running & (step <= 1)
        out = torch.nn.functional.one_hot(blocking, len(gram)).bool() & blocked[:, None]
        codes, used = codes.masked_fill(out, 0), used & ~out
        gains = (linear - codes @ steady).masked_fill(used, -torch.inf)
        gain, best = gains.max(dim=1)
        takes = running & ~blocked & (gain > 1e-10 * scale)
        used = used | (torch.nn.functional.one_hot(best, len(gram)).bool() & takes[:, None])
        running = running & (blocked | takes)
        if not bool(running.any()):
            break
    return codes


def precise_dtype(device: torch.device) -> torch.dtype:
    """The precision in which codes are worked out: concepts of one word are much alike, so float32's rounding shows."""
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def nearest_codes(scores: Float[Tensor, "n k"], gram: Float[Tensor, "k k"]) -> Float[Tensor, "n k"]:
    """Give every row the coefficient of its nearest concept, ⟨x, u⟩/‖u‖² and at least 0; its other codes are 0.

    Example:
        >>> nearest_codes(torch.tensor([[3.0, 1.0]]), torch.eye(2)).tolist()
        [[3.0, 0.0]]
    """
    sizes = gram.diagonal()
    nearest = (scores - sizes / 2).argmax(dim=-1, keepdim=True)
    share = (scores / sizes.clamp_min(torch.finfo(scores.dtype).tiny)).clamp_min(0)
    return torch.zeros_like(scores).scatter(-1, nearest, share.gather(-1, nearest))


def with_gradient(
    codes: Float[Tensor, "n k"], scores: Float[Tensor, "n k"], gram: Float[Tensor, "k k"]
) -> Float[Tensor, "n k"]:
    """Give optimal codes the gradient that they have as a function of the scores.

    Among the concepts in use, G v = s - l1 at the optimum, so v moves by G⁻¹ ds; concepts out of use stay out.
    """
    used = (codes > 0).to(gram.dtype)
    system = used[:, :, None] * gram * used[:, None, :] + torch.diag_embed(1 - used)
    # Concepts that nearly coincide would make the system singular.
    system = system + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    moved = (scores - scores.detach()) * used
    return codes + torch.linalg.solve(system.detach(), moved[:, :, None])[:, :, 0] * used


@dataclass
class ConceptDictionarySAEConfig(SAEConfig):
    """Configuration of a concept dictionary as an SAE."""

    encoder: Encoder = "lasso"
    """How tokens are encoded."""
    l1: float = 0.0
    """Weight of the codes' sum, in the unit of the activations."""
    n_sweeps: int = 200
    """Sweeps of the lasso's coordinate descent, at most; what they leave undone an active-set method finishes."""

    @classmethod
    def architecture(cls) -> str:
        """Give the name by which SAE-Lens loads it."""
        return ARCHITECTURE


class ConceptDictionarySAE(SAE[ConceptDictionarySAEConfig]):
    """A concept dictionary: `W_dec` are the concepts, and there is no encoder besides them."""

    # As in SAE-Lens's own tied SAE (matching pursuit), which cannot have the base class's parameter either.
    @property
    def W_enc(self) -> Tensor:
        """The concepts, transposed."""
        return self.W_dec.T

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - whatever a module holds
        if name != "W_enc":
            super().__setattr__(name, value)

    def encode(self, x: Tensor) -> Tensor:
        """Encode activations; gradients flow to them, as the optimum moves with them."""
        sae_in = self.process_sae_in(x)
        concepts = self.W_dec.to(precise_dtype(self.W_dec.device))
        gram = concepts @ concepts.T
        # A few at a time: in this precision a batch of activations would be the largest thing in memory.
        parts = sae_in.reshape(-1, sae_in.shape[-1]).split(_CHUNK_TOKENS)
        scores = torch.cat([part.to(concepts.dtype) @ concepts.T for part in parts])
        scores = self.hook_sae_acts_pre(scores.reshape(*sae_in.shape[:-1], len(concepts)))
        flat = scores.reshape(-1, scores.shape[-1])
        if self.cfg.encoder == "nearest":
            codes = nearest_codes(flat, gram)
        else:
            codes = optimal_codes(flat, gram, l1=self.cfg.l1, n_sweeps=self.cfg.n_sweeps)
            if torch.is_grad_enabled() and flat.requires_grad:
                codes = with_gradient(codes, flat, gram)
        encoded: Tensor = self.hook_sae_acts_post(codes.reshape(scores.shape).to(sae_in.dtype))
        return encoded

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Add up the concepts."""
        rebuilt = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        out: Tensor = self.reshape_fn_out(self.run_time_activation_norm_fn_out(rebuilt), self.d_head)
        return out

    def fold_W_dec_norm(self) -> None:
        """Refuse: the weight of the codes' sum means something only for the concepts as they are."""
        raise NotImplementedError("The concepts' norms cannot be folded: encoder and decoder are one.")

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Refuse, for the same reason."""
        raise NotImplementedError("A scaling factor cannot be folded: encoder and decoder are one.")

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refuse, for the same reason."""
        raise NotImplementedError("Whitening cannot be folded: encoder and decoder are one.")


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, ConceptDictionarySAE, ConceptDictionarySAEConfig)
