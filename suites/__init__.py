"""The suites that ship with moebench: TOML files, one question each."""
