"""The proxies: the only part of rayx that imports torch."""

from rayx.proxy.train import train_pack

__all__ = ["train_pack"]
