"""Record and Manifest: what was measured, and where and how. No torch.

A Record is a Point, a status and numbers. What was not measured is null, and a
record that is not `measured` carries no performance number: the type refuses it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from moebench.point import SCHEMA_VERSION

Status = Literal[
    "measured",  # checked, then timed
    "verified",  # checked, not timed; `checked_on` says on which shape
    "inaccurate",
    "failed",
    "out_of_memory",
    "timeout",
    "crashed",
    "unavailable",  # library or hardware missing
    "not_applicable",
    "skipped",  # budget, interruption
]
STATUSES: tuple[str, ...] = get_args(Status)
GOOD = ("measured", "verified")
# A point with one of these makes the run exit with 1; the rest are answers, not faults.
FAULTS = ("inaccurate", "failed", "out_of_memory", "timeout", "crashed")

# How the machine was while an arm was measured (moebench.measure.device); null where the system does not tell.
STATE_COLUMNS = (
    "sm_mhz", "memory_mhz", "temperature_c", "power_w", "cpu_mhz", "load1", "steal_share", "other_cores",
)  # fmt: skip

PERFORMANCE = (
    "timer", "timer_reason", "cache", "latency_ms", "latency_ms_low", "latency_ms_high", "wall_ms", "first_call_ms",
    "prepare_ms", "samples_ms", "wall_samples_ms", "sample_round", "outlier_samples",
    "tokens_per_s", "tflops", "gbytes_per_s", "s_mfu", "s_mbu", "limit_ms", "limit_fraction", "peak_memory_bytes",
    "energy_source", "energy_reason", "energy_j_per_token", "energy_j_per_token_low", "energy_j_per_token_high",
    "energy_net_j_per_token", "energy_idle_w", "energy_second_source", "energy_second_j_per_token",
    "usd_per_mtok", "gco2_per_mtok", *STATE_COLUMNS,
)  # fmt: skip


# Statistics of the routing (moebench.routing.statistics), means over the timed draws; known wherever an arm was built.
ROUTING_COLUMNS = (
    "drop_rate", "load_max_over_mean", "active_experts", "load_cv", "load_entropy", "load_gini", "collapsed_experts",
    "active_over_uniform", "unrouted_tokens", "most_experts_per_token", "balance_loss",
)  # fmt: skip


Positive = Annotated[float, Field(gt=0)]
Duration = Annotated[float, Field(ge=0)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what a column can hold


class Record(BaseModel):
    """One row of results.parquet; the fields are its columns, in order.

    "Per token" is a token that enters one layer. Fractions (s_mfu, s_mbu,
    limit_fraction, drop_rate) are 0..1; load_max_over_mean >= 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    run_id: str
    block_id: str
    point_id: str
    suite: str
    model: str
    provider: str
    provider_version: str | None = None
    provider_hash: str | None = None
    role: Literal["arm", "yardstick"] = "arm"
    scope: str
    direction: str
    layout: str = "single"
    n_devices: Whole = 1
    device: str
    precision: str
    tokens: Whole
    hidden_size: Whole
    expert_ffn_size: Whole
    routed_experts: Whole
    top_k: Whole
    shared_experts: Whole = 0
    capacity_factor: float | None = None  # null: dropless
    capacity_rounding: str = "ceil"
    drop_order: str = "position"
    router: str
    router_mode: str = "inference"
    causal: bool | None = None  # whether later tokens can change no token's experts; null: a yardstick
    traffic: str
    phase: str = ""
    seed: Whole = 0
    status: Status
    reason: str | None = None
    checked_on: str | None = None
    threads: Whole | None = None  # torch's threads while it was measured
    modes: str | None = None  # dtype modes (TF32, reduced-precision reductions) while it was measured
    timer: str | None = None
    timer_reason: str | None = None  # why no better timer was possible; null: this is the best
    cache: Literal["cold", "hot"] | None = None  # whether what rotates is twice the last-level cache
    latency_ms: Positive | None = None  # median
    latency_ms_low: Duration | None = None  # 95 % interval of the median
    latency_ms_high: Duration | None = None
    wall_ms: Duration | None = None
    first_call_ms: Duration | None = None  # with its compilation and first touches; never part of the samples
    prepare_ms: Duration | None = None
    samples_ms: list[Duration] | None = None
    wall_samples_ms: list[Duration] | None = None  # null where the host's clock is the only one
    sample_round: list[Whole] | None = None
    outlier_samples: list[Whole] | None = None  # positions in samples_ms beyond Tukey's fences; none is removed
    replicate: Whole = 0
    tokens_per_s: Positive | None = None
    tflops: float | None = None
    executed_flops: float | None = None
    gbytes_per_s: float | None = None
    s_mfu: float | None = None
    s_mbu: float | None = None
    limit_ms: float | None = None
    limit_fraction: float | None = None
    peak_memory_bytes: Whole | None = None
    energy_source: str | None = None
    energy_reason: str | None = None  # why there is no number
    energy_j_per_token: float | None = None  # median of the trials
    energy_j_per_token_low: float | None = None  # lowest and highest trial
    energy_j_per_token_high: float | None = None
    energy_net_j_per_token: float | None = None  # less idle power times the window
    energy_idle_w: float | None = None
    energy_second_source: str | None = None
    energy_second_j_per_token: float | None = None
    usd_per_mtok: float | None = None
    gco2_per_mtok: float | None = None
    sm_mhz: float | None = None  # lowest reading, as memory_mhz and cpu_mhz
    memory_mhz: float | None = None
    temperature_c: float | None = None  # highest reading, as power_w
    power_w: float | None = None
    cpu_mhz: float | None = None
    load1: float | None = None
    steal_share: float | None = None  # of all core time, taken by the hypervisor
    other_cores: float | None = None  # kept busy by other processes
    rel_error: float | None = None
    max_error: float | None = None
    fidelity_error: float | None = None
    drop_rate: float | None = None
    load_max_over_mean: float | None = None
    active_experts: float | None = None
    load_cv: float | None = None
    load_entropy: float | None = None  # over log E: 1 is even
    load_gini: float | None = None
    collapsed_experts: float | None = None  # share of E below a tenth of the mean load
    active_over_uniform: float | None = None  # active experts over what uniform routing would be expected to reach
    unrouted_tokens: float | None = None  # share of T that no expert kept
    most_experts_per_token: float | None = None
    balance_loss: float | None = None  # Switch's, alpha 1: 1 is even
    flags: list[str] = []

    @model_validator(mode="after")
    def _no_number_without_a_measurement(self) -> Record:
        if self.status == "measured":
            missing = [name for name in ("timer", "latency_ms", "samples_ms") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"a measured record needs {', '.join(missing)}")
            return self
        carried = [name for name in PERFORMANCE if getattr(self, name) is not None]
        if carried:
            raise ValueError(f"status {self.status!r} cannot carry {', '.join(carried)}")
        if self.status != "verified" and not self.reason:
            raise ValueError(f"status {self.status!r} needs a reason")
        if self.status == "verified" and not self.checked_on:
            raise ValueError("status 'verified' needs checked_on")
        return self


COLUMNS: tuple[str, ...] = tuple(Record.model_fields)


class _Part(BaseModel):
    """What the readers of a manifest take from an open-ended part of it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Machine(_Part):
    available_bytes: int | None = Field(default=None, ge=0)
    cache_bytes: int | None = Field(default=None, ge=0)


class _Ceilings(_Part):
    gemm_tflops: dict[str, Positive | None] | None = None
    copy_gbs: Positive | None = None
    read_gbs: Positive | None = None


class _Provider(_Part):
    version: str | None = None
    hash: str | None = None
    unavailable: str | None = None


PARTS: dict[str, TypeAdapter[Any]] = {
    "machine": TypeAdapter(_Machine),
    "ceilings": TypeAdapter(_Ceilings | None),
    "providers": TypeAdapter(dict[str, _Provider]),
}


class Manifest(BaseModel):
    """Everything about where and how a run was made (manifest.json).

    Attributes:
        suite_hash: digest of the suite text and the overrides; `--resume` requires the same.
        suite_text: the suite file(s) as read.
        joined: providers that `--provider` adds to the suite's own.
        files: router files and traces that the suite names -> digest of what they held.
        shard: (i, n), the share of the blocks.
        check_only: whether points are checked and not timed.
        versions: moebench, python, torch, triton, numpy, ...
        machine: host facts: cpu, cores, memory, gpu, driver, os.
        ceilings: measured on this machine: {"gemm_tflops": {precision: x}, "copy_gbs": x, "read_gbs": x, ...};
            null: not measured.
        hardware: the data-sheet row that applied, or null.
        cost: inputs of the cost columns with their dates, or null where the device has no price.
        providers: provider -> {"version", "hash"} or {"unavailable": reason}.
        finished: "complete", "interrupted", or null while running (or killed).
        seconds: wall time by phase (`moebench.stopwatch`), of all sessions that ended.
        expected_seconds: what `moebench.estimate` said of the whole suite, with these ceilings and nothing else.
        expected_by: its `model_hash`.
        published: of a published copy (`moebench publish`), the fields that private text was cut from; else null.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    run_id: str
    suite: str
    question: str = ""
    suite_hash: str
    suite_text: str
    overrides: dict[str, list[Any]] = {}
    joined: list[str] = []
    files: dict[str, str] = {}
    shard: tuple[int, int] = (1, 1)
    check_only: bool = False
    command: str
    git_commit: str | None = None
    git_dirty: bool | None = None
    device: str
    device_kind: Literal["cpu", "cuda"]
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    ceilings: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    providers: dict[str, dict[str, Any]] = {}
    points: int = 0
    started_at: str
    finished_at: str | None = None
    finished: Literal["complete", "interrupted"] | None = None
    sessions: int = 1  # 1 + number of resumes
    seconds: dict[str, float] = {}

    @field_validator(*PARTS)
    @classmethod
    def _fits_its_readers(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            PARTS[str(info.field_name)].validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return value

    expected_seconds: dict[str, float] = {}
    expected_by: str | None = None
    published: list[str] | None = None
