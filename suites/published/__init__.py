"""The tables of README.md, reports/README.md and docs/kernel-notes.md, made of the runs under reports/. No torch.

python -m moebench_suites.published [--check] [--reports DIR]
"""
