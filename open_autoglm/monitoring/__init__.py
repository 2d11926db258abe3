"""Watching what is served: what happened in a window, whether it keeps the promise, and why not."""
