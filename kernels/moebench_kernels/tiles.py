"""Tile configurations: frozen data, picked by shape and device by one function. No autotuner in the hot path."""


def tile_rows(rows_per_expert: float) -> int:
    """block_m of a plan, by mean load: 16 (HMMA's least), 64 (WGMMA's least) or 128."""
    if rows_per_expert <= 16:
        return 16
    return 64 if rows_per_expert <= 64 else 128
