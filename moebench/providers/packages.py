"""What a peer needs to be there, and whether it is: found without importing it. No torch but to ask for a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A library behind a provider.

    Attributes:
        module: its importable name.
        distributions: what may bring it, the one to recommend first.
        known: the version whose interface the adapter was written for.
        install: the command that brings it, where that is not `pip install DISTRIBUTION==KNOWN`.
        gpu: whether it runs on CUDA devices only.
    """

    module: str
    distributions: tuple[str, ...]
    known: str
    install: str = ""
    gpu: bool = True

    @property
    def command(self) -> str:
        """How to get it."""
        return self.install or f"pip install '{self.distributions[0]}=={self.known}'"

    def version(self) -> str:
        """Name and version of the distribution that is installed."""
        from importlib.metadata import PackageNotFoundError, version

        for name in self.distributions:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        return f"{self.module} of unknown version" if is_there(self.module) else f"{self.module} is not installed"


def is_there(module: str) -> bool:
    """Whether a top-level module could be imported; nothing is imported to find out."""
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ValueError:  # something in sys.modules that has no spec, such as a stand-in
        return True


def missing(package: Package) -> str | None:
    """Why the library cannot be used here, or None. Its own import is not tried."""
    gpu = "it needs a CUDA GPU, and PyTorch finds none here" if package.gpu and not _has_gpu() else None
    if not is_there(package.module):
        reason = f"{package.module} is not installed ({package.command})"
        return f"{reason}; {gpu}" if gpu else reason
    return gpu


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
