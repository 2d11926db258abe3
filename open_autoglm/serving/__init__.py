"""The endpoint: a bundle behind OpenAI's HTTP interface.

Two processes. The engine's holds the model and decides, call by call, what it reads next; the server's
speaks HTTP, turns text into tokens and back, and outlives the engine's crashes.
"""
