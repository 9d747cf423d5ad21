"""An attribution as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_multimodal.hooks.attribution_check import AttributionCheck
    from sae_lens_multimodal.hooks.attribution_result import Attribution


def attribution_lines(found: Attribution, check: AttributionCheck | None, top: int) -> list[str]:
    """Lay out the largest effects, what adds up to what, and the check."""
    lines = [
        f"{found.metric.name}: {float(found.values[0]):.4g}",
        f"{found.n_nodes} active features at {int(found.chosen.sum())} tokens of {found.hook_name} ({found.method})",
        "an effect is the change if the feature were ablated; what speaks for the answer has a negative one",
        "",
        "feature       effect  tokens",
    ]
    lines += [f"{one.feature:>7}  {one.effect:>+11.4f}  {one.n_tokens:>6}" for one in found.by_feature()[:top]]
    lines += ["", "feature       effect  position  token"]
    for one in found.top(top) if found.n_nodes else []:
        token = found.tokens[one.node.row][one.node.token]
        lines.append(f"{one.node.feature:>7}  {one.effect:>+11.4f}  {one.node.token:>8}  {token}")
    parts = {"features": float(found.effect.sum()), "error": float(found.error_effect.sum())}
    parts["bias"] = float(found.bias_effect.sum())
    lines += ["", "sums: " + ", ".join(f"{name} {value:+.4f}" for name, value in parts.items())]
    for row in found.completeness or []:
        lines.append(
            f"all features ablated together: {row.true_change:+.4f}, effects say {row.linear_change:+.4f}, "
            f"gap {row.gap:+.4f}"
        )
    if check is not None:
        lines.append(
            f"Spearman of estimated and true effects, top {len(check.nodes)}: {check.spearman:.3f}; of their absolute "
            f"values {check.magnitude_spearman:.3f}, with the right sign {check.sign_agreement:.0%}"
        )
    return lines
