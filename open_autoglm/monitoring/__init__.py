"""Whether what is served still is as fast as when it was chosen, and as fast as was promised."""
