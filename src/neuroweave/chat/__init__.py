"""Talks with a model: search providers, answers grounded on what they find, chats, and an OpenAI-compatible server."""
