"""Measurements that train whole networks."""
