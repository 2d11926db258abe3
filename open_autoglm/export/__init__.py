"""Turning a checkpoint into the files an engine needs: routes, quantisers, store, preflight."""
