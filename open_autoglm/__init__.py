"""Open-AutoGLM: the fastest way to serve a language model on your own hardware, with evidence."""
