"""Every loss that balances or steadies routing: one row each, and where its code lives. No torch.

Symbols as in `moebench.routing.losses`: f share of the wanted assignments, c of first choices, P mean probability.
The functions are unweighted; `weight` is what was published.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossInfo:
    """One loss.

    Attributes:
        formula: unweighted.
        source: the paper it comes from.
        function: "module:function" in `moebench.routing`.
        scope: what its sums run over as published: "micro-batch", "group" (of tokens, local), "sequence", "weights".
        minimum: its value where routing is best, and where that is.
        weight: as published; None where none is known for sure.
        note: whose weight it is, and what else to know.
    """

    formula: str
    source: str
    function: str
    scope: str
    minimum: str
    weight: float | None = None
    note: str = ""


_UNIFORM = "1 for uniform routing"
_DEEPSEEK_V2 = "DeepSeek-V2, arXiv 2405.04434"

LOSSES: dict[str, LossInfo] = {
    "importance": LossInfo(
        "CV^2 over experts of sum_t g_te", "Shazeer 2017, arXiv 1701.06538", "losses:importance", "micro-batch",
        "0 where all experts have the same sum", 0.1, "language models of the paper; V-MoE: 0.005",
    ),
    "load": LossInfo(
        "CV^2 over experts of sum_t Pr(e is among the K if its noise is drawn again)",
        "Shazeer 2017, arXiv 1701.06538", "losses:load", "micro-batch", "0 where all experts have the same sum", 0.1,
        "needs the noise; V-MoE: 0.005, and its threshold is of all experts (of_others=False)",
    ),
    "gshard": LossInfo(
        "(1/E) sum_e c_e P_e", "GShard, arXiv 2006.16668", "losses:gshard", "group", "1 / E^2 for uniform routing",
        0.01, "weight of the released code, which multiplies the loss by E^2",
    ),
    "switch": LossInfo(
        "E sum_e f_e P_e", "Switch, arXiv 2101.03961", "losses:switch", "micro-batch", _UNIFORM, 0.01,
        "K picks count 1/K each; code that counts each as 1 has K times this value",
    ),
    "expert_level": LossInfo(
        "E sum_e f_e P_e", _DEEPSEEK_V2, "losses:switch", "sequence", _UNIFORM, 0.003, "Switch's, in another spelling",
    ),
    "device_level": LossInfo(
        "sum_d mean_(e on d)(E f_e) sum_(e on d)(P_e)", _DEEPSEEK_V2, "losses:device_level", "sequence", _UNIFORM, 0.05,
    ),
    "communication": LossInfo(
        "sum_d (devices / M) (share of tokens sent to d) sum_(e on d)(P_e)", _DEEPSEEK_V2, "losses:communication",
        "sequence", "1 for uniform routing to M devices a token; less where tokens go to fewer", 0.02,
    ),
    "sequence_level": LossInfo(
        "E sum_e f_e P_e in each sequence, P of scores divided by their sum", "DeepSeek-V3, arXiv 2412.19437",
        "losses:sequence_level", "sequence", _UNIFORM, 0.0001,
    ),
    "router_z": LossInfo(
        "mean_t (logsumexp_e z_te)^2", "ST-MoE, arXiv 2202.08906", "losses:router_z", "micro-batch",
        "0 where every token's exp(z) sum to 1", 0.001, "also OLMoE; OpenMoE: 0.0001",
    ),
    "local_entropy": LossInfo(
        "mean_t H(p_t), by modality", "LIMoE, arXiv 2206.02770", "losses:local_entropy", "micro-batch",
        "0 where every token is sure of one expert",
    ),
    "global_entropy": LossInfo(
        "max(0, log S - H(mean_t p_t)), by modality", "LIMoE, arXiv 2206.02770", "losses:global_entropy",
        "micro-batch", "0 where at least S experts share the tokens; without S -log E for a uniform mean",
    ),
    "orthogonality": LossInfo(
        "mean over pairs of experts of the squared cosine of their weights", "after OMoE, arXiv 2310.09762",
        "losses:orthogonality", "weights", "0 where all are orthogonal",
        note="a penalty with OMoE's aim; OMoE itself is an optimiser that projects updates",
    ),
    "cmr_gate": LossInfo(
        "|mean_t g_t - budget|", "NLLB, arXiv 2207.04672", "losses:cmr_gate", "micro-batch",
        "0 where the mean gate is the budget", 0.1, "budget 0.8",
    ),
}  # fmt: skip
