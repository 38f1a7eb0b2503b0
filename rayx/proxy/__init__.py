"""The proxies: the only part of rayx that imports torch."""

from rayx.proxy.train import set_threads, train_pack

__all__ = ["set_threads", "train_pack"]
