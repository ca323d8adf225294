"""The columns of the report's table: title, how a value is written, what it means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: field of the row.
        title: heading.
        kind: "text", "prose", "count", "time", "bytes", "number", "ratio", "percent" or "list".
        meaning: the heading's explanation.
        low, high: fields of its 95 % interval, if it has one.
        group: the name under which its absence is explained; "" where a constant or absent column needs no word.
    """

    key: str
    title: str
    kind: str
    meaning: str
    low: str = ""
    high: str = ""
    group: str = ""


COLUMNS = (
    Column("variant", "Variant", "text",
           "Provider, and whatever else tells variants of this run apart; dropless unless a capacity (cap) is named"),
    Column("family", "Problem", "text", "Layer, traffic and direction"),
    Column("tokens", "Tokens", "count", "T, tokens entering the layer"),
    Column("scope", "Scope", "text", "The whole layer, its experts, or one stage"),
    Column("status", "Status", "text", "measured: checked, then timed; verified: checked only; the rest have a reason"),
    Column("latency_ms", "Latency", "time", "Median and its 95 % interval", "latency_ms_low", "latency_ms_high"),
    Column("speedup", "Speed-up", "ratio", "Baseline latency / own latency, paired rounds of one block, 95 % interval",
           "speedup_low", "speedup_high"),
    Column("tokens_per_s", "Tokens/s", "number", "Tokens through one layer per second"),
    Column("tflops", "TFLOP/s", "number", "Useful work W over latency"),
    Column("limit_fraction", "Of limit", "percent", "Time the measured ceilings allow / latency"),
    Column("s_mfu", "S-MFU", "percent", "W / latency / data-sheet peak FLOP/s (MoE-CAP)", group="S-MFU"),
    Column("s_mbu", "S-MBU", "percent", "Active weight bytes / latency / data-sheet bandwidth (MoE-CAP)",
           group="S-MBU"),
    Column("peak_memory_bytes", "Peak memory", "bytes", "Above what the process held before the call",
           group="peak memory"),
    Column("fidelity_error", "Fidelity error", "number", "Against the dropless, unquantised layer in float64"),
    Column("drop_rate", "Dropped", "percent", "Assignments dropped by the capacity rule"),
    Column("load_max_over_mean", "Busiest", "ratio", "Load of the busiest expert over the mean, before dropping"),
    Column("load_cv", "Load CV", "number", "Coefficient of variation of the experts' load, before dropping"),
    Column("unrouted_tokens", "Unrouted", "percent", "Tokens that no expert kept"),
    Column("energy_j_per_token", "Energy", "number", "Joules per token entering one layer, gross", group="energy"),
    Column("usd_per_mtok", "Cost", "number", "US dollars per million tokens entering one layer", group="cost"),
    Column("reason", "Reason", "prose", "Why the row is not measured"),
    Column("flags", "Flags", "list", "What a reader should know about how the number was made"),
)  # fmt: skip

# Shown when a row is opened, beside the columns above.
DETAILS = (
    "checked_on", "provider", "provider_version", "provider_hash", "role", "precision", "capacity_factor",
    "layout", "n_devices", "device", "hidden_size", "expert_ffn_size", "routed_experts", "top_k", "shared_experts",
    "router", "router_mode", "causal", "capacity_rounding", "drop_order", "traffic", "direction", "phase", "seed",
    "replicate", "timer", "timer_reason", "cache", "wall_ms", "first_call_ms", "prepare_ms",
    "gbytes_per_s", "executed_flops", "limit_ms", "rel_error",
    "max_error", "active_experts", "active_over_uniform", "load_entropy", "load_gini", "collapsed_experts",
    "most_experts_per_token", "balance_loss", "energy_source", "energy_reason",
    "energy_j_per_token_low", "energy_j_per_token_high", "energy_net_j_per_token", "energy_idle_w",
    "energy_second_source", "energy_second_j_per_token", "gco2_per_mtok", "rounds", "samples", "suite", "run_id",
    "block_id",
)  # fmt: skip

FLAGS = {
    "few_samples": "fewer samples than the rule asks for",
    "wide_interval": "the 95 % interval stayed wider than the rule asks for",
    "not_settled": "the warm-up ended by its time limit",
    "drifting": "times moved one way while they were taken",
    "outliers": "more than a tenth of the samples lie far out",
    "two_levels": "times jump between two levels",
    "faster_than_ceiling": "faster than the measured ceilings allow",
    "contended": "other work ran on the machine meanwhile",
    "cache_resident": "weights stayed in cache: faster than memory would allow",
    "throttled": "the GPU lowered its clock",
    "memory_below_resolution": "peak memory is too small for the meter to tell from none",
    "energy_window_short": "energy window shorter than the rule asks for",
    "energy_counter_stuck": "the energy counter did not move",
    "energy_noisy": "energy trials disagree",
    "energy_below_idle": "energy below idle power",
    "energy_idle_unknown": "idle power was not counted, so no net energy",
    "energy_counter_reset": "the energy counter was reset",
    "energy_wrap_missed": "the energy counter may have wrapped unseen",
    "energy_sources_disagree": "two sources of energy differ by more than 15 %",
    "energy_shared_gpu": "other processes were on the GPU in an energy window",
    "energy_throttled": "the GPU lowered its clock in an energy window",
    "energy_temperatures_apart": "energy windows began at temperatures more than 10 °C apart",
}
